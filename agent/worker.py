"""One thread for one volume's disk work.

Jobs run one after another in the order they came. A disk that hangs holds its own thread and nothing else: the queue
is bounded, and a job that cannot be taken is refused with how long the disk has been silent. The thread is a daemon,
because no one can end a thread that the kernel does not let go, and a process must be able to leave.

There is a thread only while there is work, and for a moment after: a node may have thousands of volumes, most of which
nobody asks for anything.

Whatever a disk's failing call was, whoever waits for the job is told by a reason. What a job logs carries
what its caller had bound, and what the worker is about.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from structlog.contextvars import bind_contextvars

from agent.disk.durable import OF_THE_DISK, disk_error
from resilver.errors import Unavailable

T = TypeVar("T")

JOBS_MAX: Final = 64
IDLE_S: Final = 0.1

_Job = tuple[Callable[[], Any], "Future[Any]", contextvars.Context]


class Worker:
    """A queue and the thread that works it off; for a volume's, what its jobs log says which."""

    __slots__ = ("_closed", "_idle_s", "_jobs", "_jobs_max", "_name", "_news", "_since", "_thread", "_turn", "_volume")

    def __init__(self, name: str, *, jobs_max: int = JOBS_MAX, idle_s: float = IDLE_S, volume: str = "") -> None:
        self._name = name
        self._volume = volume
        self._jobs_max = jobs_max
        self._idle_s = idle_s
        # A few words for each of thousands: a condition and a deque would be a KiB more.
        self._turn = threading.Lock()
        self._news: threading.Event | None = None
        self._jobs: list[_Job] = []
        self._since: float | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def busy_s(self) -> float:
        """How long the present job has been running; 0 if none is."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def waiting(self) -> bool:
        """Whether a job waits for the present one."""
        return bool(self._jobs)

    def submit(self, job: Callable[[], T], *, later: bool = False) -> Future[T]:
        """Puts a job in the queue; `Unavailable("DEADLINE")` if it is full. `later`: until `wake`, or another job."""
        future: Future[T] = Future()
        context = contextvars.copy_context()
        if self._volume:
            context.run(bind_contextvars, volume=self._volume)
        with self._turn:
            if self._closed:
                raise Unavailable("DEADLINE", f"{self._name}: the agent is stopping")
            if len(self._jobs) >= self._jobs_max:
                raise Unavailable(
                    "DEADLINE",
                    f"{self._name}: {self._jobs_max} jobs are waiting for its disk, "
                    f"which has been at the present one for {self.busy_s:.0f} s",
                )
            self._jobs.append((job, future, context))
            if not later:
                try:
                    self._wake()
                except RuntimeError as error:
                    self._jobs.pop()
                    raise Unavailable("DEADLINE", f"{self._name}: no thread can be had: {error}") from error
        return future

    def wake(self) -> None:
        """Has what waits worked off."""
        with self._turn, contextlib.suppress(RuntimeError):  # without a thread it goes on waiting
            self._wake()

    def _wake(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        elif self._news is not None:
            self._news.set()

    async def run(self, job: Callable[[], T]) -> T:
        """Waits for a job without blocking the event loop. If the caller goes away, a job that has begun is finished,
        and one that waits is not begun.
        """
        return await asyncio.wrap_future(self.submit(job))

    def call(self, job: Callable[[], T]) -> T:
        """Waits for a job, from another thread."""
        return self.submit(job).result()

    def close(self) -> None:
        """Lets the thread end after what is in the queue; does not wait for it."""
        with self._turn:
            self._closed = True
            if self._news is not None:
                self._news.set()

    def _next(self) -> _Job | None:
        """None ends the thread: whoever comes after that has another one started."""
        with self._turn:
            if self._jobs:
                return self._jobs.pop(0)
            news = self._news = threading.Event()
            if self._closed:
                news.set()
        news.wait(self._idle_s)
        with self._turn:
            self._news = None
            if self._jobs:
                return self._jobs.pop(0)
            self._thread = None
            return None

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            job, future, context = taken
            if not future.set_running_or_notify_cancel():
                continue
            self._since = time.monotonic()
            try:
                result = context.run(job)
            except BaseException as error:  # noqa: BLE001 - whatever it was belongs to whoever waits for the job
                future.set_exception(_typed(error, self._name))
            else:
                future.set_result(result)
            finally:
                self._since = None
            del taken, job, future, context


def _typed(error: BaseException, name: str) -> BaseException:
    if not isinstance(error, OSError) or error.errno not in OF_THE_DISK:
        return error
    typed = disk_error(error, error.filename or name)
    typed.__cause__ = error
    return typed
