"""Processes of the suite's own that are told a line and answer one."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

from bench.suite.measure import DIES_WITH_US, Used, cpu_s, peak_bytes

WORKER_TIMEOUT_S: Final = 600.0


class Worker:
    """A Python process that is told a line and answers one: what starting it takes is not what is measured."""

    def __init__(self, module: str, role: str) -> None:
        words = [*DIES_WITH_US, sys.executable, "-m", module, role]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, **what: Any) -> dict[str, Any]:
        """The answer to one order; fails if the process ends instead, or says nothing for ten minutes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        there, _, _ = select.select([self.process.stdout], [], [], WORKER_TIMEOUT_S)
        line = self.process.stdout.readline() if there else ""
        if not line:
            raise RuntimeError(f"{self.process.args!r} has not answered {what}")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    @property
    def cpu_s(self) -> float:
        return cpu_s(self.process.pid)

    @property
    def peak_bytes(self) -> int:
        return peak_bytes(self.process.pid)

    def close(self) -> None:
        """Ends it: it ends when its input does, and is killed if it does not."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def orders() -> Iterator[dict[str, Any]]:
    """A worker's side: the orders, until there are no more."""
    for line in sys.stdin:
        yield json.loads(line)


def answer(**what: Any) -> None:
    """A worker's side: the answer to the last order."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


class Pair:
    """A worker that serves and one that receives, of one module."""

    def __init__(self, module: str) -> None:
        self.serve, self.receive = Worker(module, "serve"), Worker(module, "receive")
        self._both = (self.serve, self.receive)

    def copy(self, port: int) -> Used:
        """Has the one fetch from the other, which listens on that port."""
        before = sum(worker.cpu_s for worker in self._both)
        parts = self.receive.tell(port=port)
        used = sum(worker.cpu_s for worker in self._both) - before
        return Used(used, max(worker.peak_bytes for worker in self._both), parts=parts)

    def close(self) -> None:
        for worker in self._both:
            worker.close()
