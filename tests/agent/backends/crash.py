"""Kills at steps, and what must hold after them: a forked child does the work, and is gone at a step for real.

Which steps some work takes, and in which order, is found by doing it once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from resilver.errors import ResilverError
from resilver.volume import LiveState
from tests.agent.backends.adapter import Kind, Replica

Step = Callable[[str], None]
Work = Callable[[Step], object]


@dataclass(frozen=True, order=True)
class At:
    """The moment at which a step is called for the nth time (from 1) in some work."""

    step: str
    nth: int = 1

    def __str__(self) -> str:
        return self.step if self.nth == 1 else f"{self.step}({self.nth})"


@dataclass
class Steps:
    """A `step` that calls something at a moment, and writes down every call before it does."""

    at: At | None = None
    then: Callable[[], None] = lambda: None
    called: list[At] = field(default_factory=list)

    def __call__(self, name: str) -> None:
        now = At(name, 1 + sum(before.step == name for before in self.called))
        self.called.append(now)
        if now == self.at:
            self.then()


def killed(work: Work, at: At | str) -> bool:
    """Runs the work in a child that SIGKILLs itself at that moment or step; whether it came that far.

    A child that fails before is a failure of the test.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(Steps(At(at) if isinstance(at, str) else at, lambda: os.kill(os.getpid(), signal.SIGKILL)))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"failed before {at}"
    return os.WIFSIGNALED(status)


def deciding(kind: Kind, what: str, steps: list[At]) -> int | None:
    """Which of the steps is the first from which on the new state is there; None where that cannot be told."""
    named = kind.decides.get(what, ())
    names = {named} if isinstance(named, str) else set(named)
    return next((number for number, at in enumerate(steps) if at.step in names), None)


def whole(replica: Replica) -> None:
    """The records, the snapshots and the live copy agree, and nothing is left over."""
    assert replica.state is LiveState.UNMODIFIED
    assert replica.debris() == []
    for record in replica.lineage:
        assert record.present == (replica.contents(record.id) is not None)


def reason_of(work: Callable[[], object]) -> str:
    """The reason that some work was refused for, empty if it was done."""
    try:
        work()
    except ResilverError as error:
        return error.reason
    return ""
