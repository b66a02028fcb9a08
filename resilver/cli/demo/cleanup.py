"""Undoing, in the reverse order of doing, whatever happens.

Each thing that is made says at once how it is undone. Undoing goes on past a step that fails, each step is bounded by
its own time, and Ctrl-C does not interrupt it: what was started is stopped, what was mounted is unmounted.
"""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType

_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class Cleanup:
    """A context that ends by undoing all that was `add`ed; `failures` says what could not be undone."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], None]]] = []
        self.failures: list[str] = []

    def add(self, what: str, undo: Callable[[], None]) -> None:
        self._steps.append((what, undo))

    def __enter__(self) -> Self:
        # A closed terminal or a plain kill must end like Ctrl-C, not leave mounts behind. So must a SIGINT to a demo
        # that a shell has put in the background: such a one is started with SIGINT ignored.
        self._before = {number: signal.signal(number, _interrupt) for number in _ENDING}
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        try:
            while self._steps:
                what, undo = self._steps.pop()
                try:
                    undo()
                except (OSError, subprocess.SubprocessError) as error:
                    self.failures.append(f"{what}: {error}")
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
