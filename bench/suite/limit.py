"""The limit: what copying these ranges must cost whoever copies them.

Two processes that were told the ranges beforehand. The one announces them to the kernel far ahead and sends them with
sendfile; the other takes them in large pieces, writes them in place, and ends with an fsync. Nothing is looked for,
requested, framed, checked, journaled or read back.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.suite.data import BLOCK, MIB, clone, remove
from bench.suite.measure import Used
from bench.suite.workers import Pair, answer, orders

PIECE_BYTES: Final = 4 * MIB
AHEAD_BYTES: Final = 64 * MIB
AHEAD_PIECES: Final = 2048
_MODULE: Final = "bench.suite.limit"


def save_ranges(path: Path, offsets: Any, lengths: Any) -> None:
    """Writes down what is to be copied, and a beginning of it beside it, for `rehearsal`."""
    rows = np.stack([np.asarray(offsets, dtype=np.int64), np.asarray(lengths, dtype=np.int64)])
    np.save(path, rows)
    np.save(rehearsal(path), np.minimum(rows[:, :1], [[np.iinfo(np.int64).max], [BLOCK]]))


def rehearsal(path: Path) -> Path:
    """The first block of the ranges in such a file, as another file."""
    return path.with_suffix(".first.npy")


def pieces(path: Path) -> list[tuple[int, int]]:
    """The ranges of such a file, none larger than a piece."""

    def cut() -> Iterator[tuple[int, int]]:
        for offset, length in np.load(path).T.tolist():
            for at in range(offset, offset + length, PIECE_BYTES):
                yield at, min(PIECE_BYTES, offset + length - at)

    return list(cut())


class Limit:
    """As a competitor. `base` is what the target's file is cloned from; None if it begins empty."""

    name = "the limit"
    how = (
        "sendfile to recv and pwrite over a loopback socket, the ranges known beforehand, no digests, fsync at the end"
    )

    def __init__(self, source: Path, base: Path | None, target: Path, ranges: Path) -> None:
        self._source, self._base, self._target, self._ranges = source, base, target, ranges
        self._pair: Pair | None = None

    def missing(self) -> str:
        return ""

    def before(self) -> None:
        self._pair = Pair(_MODULE)
        self._prepare(rehearsal(self._ranges))  # so that the program itself is in memory
        self.run()
        self._prepare(self._ranges)

    def _prepare(self, ranges: Path) -> None:
        remove(self._target)
        if self._base is not None:
            clone(self._base, self._target)
        pair = self._pair
        assert pair is not None, "before comes first"
        self._port = pair.serve.tell(path=str(self._source), ranges=str(ranges))["port"]
        pair.receive.tell(path=str(self._target), ranges=str(ranges), size=self._source.stat().st_size)

    def run(self) -> Used:
        assert self._pair is not None, "before comes first"
        return self._pair.copy(self._port)

    def result(self) -> Path:
        return self._target

    def after(self) -> None:
        if self._pair is not None:
            self._pair.close()
        self._pair = None
        remove(self._target)


def serve() -> None:
    """Listens, and sends all of it to the first who comes."""
    for order in orders():
        fd = os.open(order["path"], os.O_RDONLY)
        todo = pieces(Path(order["ranges"]))
        listener = socket.create_server(("127.0.0.1", 0))
        answer(port=listener.getsockname()[1])
        taken, _ = listener.accept()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        ahead = threading.Semaphore(min(AHEAD_PIECES, max(1, AHEAD_BYTES // max(length for _, length in todo))))
        announcing = threading.Thread(target=announce, args=(fd, todo, ahead))
        announcing.start()
        for offset, length in todo:
            at, end = offset, offset + length
            while at < end:
                at += os.sendfile(taken.fileno(), fd, at, end - at)
            ahead.release()
        taken.close()
        listener.close()
        announcing.join()
        os.close(fd)


def announce(fd: int, todo: list[tuple[int, int]], ahead: threading.Semaphore) -> None:
    for offset, length in todo:
        ahead.acquire()
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)


def receive() -> None:
    """Is told what to write and prepares, is told the port and goes."""
    todo: list[tuple[int, int]] = []
    fd = -1
    buffer = memoryview(bytearray(PIECE_BYTES))
    for order in orders():
        if "path" in order:
            fd = os.open(order["path"], os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(fd, order["size"])
            todo = pieces(Path(order["ranges"]))
            answer()
            continue
        begun = time.perf_counter()
        with socket.create_connection(("127.0.0.1", order["port"])) as made:
            take(made, fd, todo, buffer)
        came = time.perf_counter()
        os.fsync(fd)
        answer(copy_s=came - begun, fsync_s=time.perf_counter() - came)
        os.close(fd)


def take(made: socket.socket, fd: int, todo: list[tuple[int, int]], buffer: memoryview) -> None:
    """Writes what comes; what lies between `start` and `end` of the buffer is not written yet."""
    start = end = 0
    for offset, length in todo:
        while end - start < length:
            if len(buffer) - start < length:
                buffer[: end - start] = bytes(buffer[start:end])
                start, end = 0, end - start
            count = made.recv_into(buffer[end:])
            if not count:
                raise RuntimeError("the sender has gone")
            end += count
        os.pwrite(fd, buffer[start : start + length], offset)
        start += length
        if start == end:
            start = end = 0


if __name__ == "__main__":
    {"serve": serve, "receive": receive}[sys.argv[1]]()
