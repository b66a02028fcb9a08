"""Work that may take hours says that it goes on, to whoever waits for it.

Large files are copied and compared deep below whoever has ordered that. So he names a listener, and the work calls
`advanced` with each piece that is done, or that an external command has given: in the same thread, or in a worker's,
which takes on the context of whoever gave it the job. Where nobody listens it does nothing, and costs as much.

Only what is done counts. No clock and no thread of its own says anything: a disk that hangs is silent, so that whoever
waits may count it as gone.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_listener: ContextVar[Callable[[], None] | None] = ContextVar("listener", default=None)


@contextmanager
def told_to(listener: Callable[[], None]) -> Iterator[None]:
    """For a block: who is called, on the thread that does the work, and for each piece: thousands of times a second."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def advanced() -> None:
    """Some more is done."""
    listener = _listener.get()
    if listener is not None:
        listener()


def step(_name: str) -> None:
    """What a backend calls at each of its steps where nobody wants to know their names."""
    advanced()
