"""Flows: what takes several events to do, written so that it reads from top to bottom.

A flow is a generator. It yields a `Wait` where it needs something that has not happened yet, and is resumed with True
when that is ready, or with False when the wait's deadline has passed. It does no I/O and reads no clock, so a run of
events and times always gives the same actions.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from resilver.errors import ResilverError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wait:
    """`ready` is asked again whenever one of the topics is touched. `deadline_ms` is Unix time."""

    topics: frozenset[str]
    ready: Callable[[], bool]
    deadline_ms: int


Flow = Generator[Wait, bool, T]


@dataclass(eq=False, slots=True)
class Task(Generic[T]):
    """A running flow. `value`, or the `error` that ended it, is there once it is `finished`."""

    number: int
    flow: Flow[T]
    finished: bool = False
    value: T | None = None
    wait: Wait | None = None
    error: ResilverError | None = None
    error_taken: bool = False

    @property
    def topic(self) -> str:
        return f"task:{self.number}"

    @property
    def result(self) -> T:
        """The flow's return value, or what it raised; only for a task that has finished."""
        assert self.finished
        if self.error is not None:
            self.error_taken = True
            raise self.error
        return self.value  # type: ignore[return-value]  # None only where T is None


@dataclass(slots=True)
class Tasks:
    """Runs flows in the order in which they became ready."""

    _waiting: dict[str, set[Task[Any]]] = field(default_factory=lambda: defaultdict(set))
    _all: dict[int, Task[Any]] = field(default_factory=dict)
    _touched: deque[str] = field(default_factory=deque)
    _fresh: deque[Task[Any]] = field(default_factory=deque)
    _failed: list[Task[Any]] = field(default_factory=list)
    _next: int = 0

    def spawn(self, flow: Flow[T]) -> Task[T]:
        self._next += 1
        task = Task(self._next, flow)
        self._all[task.number] = task
        self._fresh.append(task)
        return task

    def touch(self, *topics: str) -> None:
        self._touched.extend(topics)

    def settle(self, now_ms: int, *, deadlines: bool = False) -> None:
        """Resumes every flow that can go on, until none can; with `deadlines`, also those whose time has run out."""
        if deadlines:
            for task in sorted(self._all.values(), key=lambda one: one.number):
                if task.wait is not None and now_ms >= task.wait.deadline_ms:
                    self._resume(task, ready=task.wait.ready())
        while self._fresh or self._touched:
            if self._fresh:
                self._resume(self._fresh.popleft(), ready=True)
                continue
            waiting = self._waiting.get(self._touched.popleft(), set())
            for task in sorted(waiting, key=lambda one: one.number):
                if task.wait is not None and task.wait.ready():
                    self._resume(task, ready=True)

    def failures(self) -> list[ResilverError]:
        """What ended flows since this was last asked, and nobody who joined them has taken on."""
        failed, self._failed = self._failed, []
        return [task.error for task in failed if task.error is not None and not task.error_taken]

    def _resume(self, task: Task[Any], *, ready: bool) -> None:
        started = task.wait is not None
        self._forget(task)
        try:
            task.wait = task.flow.send(ready) if started else next(task.flow)
        except StopIteration as stop:
            task.finished = True
            task.value = stop.value
            del self._all[task.number]
            self.touch(task.topic)
            return
        except ResilverError as error:
            # It ends this flow and no other; whoever joins it is told.
            task.finished = True
            task.error = error
            self._failed.append(task)
            del self._all[task.number]
            self.touch(task.topic)
            return
        for topic in task.wait.topics:
            self._waiting[topic].add(task)
        if task.wait.ready():
            self.touch(min(task.wait.topics))

    def _forget(self, task: Task[Any]) -> None:
        if task.wait is None:
            return
        for topic in task.wait.topics:
            there = self._waiting[topic]
            there.discard(task)
            if not there:
                del self._waiting[topic]
        task.wait = None


def join(tasks: Iterable[Task[Any]], deadline_ms: int) -> Flow[bool]:
    """Waits until all have finished; False if the deadline came first."""
    those = tuple(tasks)
    if not those:
        return True
    left = deque(those)

    def done() -> bool:
        while left and left[-1].finished:
            left.pop()
        return not left

    return (yield Wait(frozenset(task.topic for task in those), done, deadline_ms))


def at_once() -> Flow[None]:
    """A flow that waits for nothing, for what is done in one step."""
    yield from ()
