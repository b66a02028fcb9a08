"""One thread for one volume's disk work.

Jobs run one after another in the order they came. A disk that hangs holds its own thread and nothing else: the queue
is bounded, and a job that cannot be taken is refused with how long the disk has been silent. The thread is a daemon,
because no one can end a thread that the kernel does not let go, and a process must be able to leave.

Whatever a disk's failing call was, whoever waits for the job is told by a reason. What a job logs carries
what its caller had bound, and what the worker is about.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
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

_Job = tuple[Callable[[], Any], "Future[Any]", contextvars.Context]


class Worker:
    """A queue and the thread that works it off."""

    def __init__(self, name: str, *, jobs_max: int = JOBS_MAX, **about: str) -> None:
        self._name = name
        self._about = about
        self._jobs: queue.Queue[_Job | None] = queue.Queue(jobs_max)
        self._since: float | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def busy_s(self) -> float:
        """How long the present job has been running; 0 if none is."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def waiting(self) -> bool:
        """Whether a job waits for the present one."""
        return not self._jobs.empty()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Puts a job in the queue; `Unavailable("DEADLINE")` if it is full."""
        future: Future[T] = Future()
        context = contextvars.copy_context()
        context.run(bind_contextvars, **self._about)
        try:
            self._jobs.put_nowait((job, future, context))
        except queue.Full as error:
            raise Unavailable(
                "DEADLINE",
                f"{self._name}: {self._jobs.maxsize} jobs are waiting for its disk, "
                f"which has been at the present one for {self.busy_s:.0f} s",
            ) from error
        return future

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
        try:
            self._jobs.put_nowait(None)
        except queue.Full:
            return

    def _work(self) -> None:
        while (taken := self._jobs.get()) is not None:
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
