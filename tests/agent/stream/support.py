"""Plain files as snapshot and stage, a proxy that can hurt what passes, and short ways to build transfers."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from agent.backends.base import SnapshotReader
from agent.delta import DeltaMap, DeltaRange
from agent.disk import contents, ioctl
from agent.stream.connection import ServedSnapshot
from agent.stream.frame import Hello
from agent.stream.journal import Journal, JournalKey
from agent.stream.link import SourceAddress
from agent.stream.receiver import Counters, Received, receive
from agent.stream.sender import BlockServer
from agent.stream.throttle import Throttle
from resilver.address import Address
from resilver.errors import Damaged, Unauthenticated

MIB = 1 << 20
TICKET = "ticket-1"
HELLO = Hello(TICKET, "resync-1", "vm1", "target-1", "c")


class FileReader:
    """A file as a snapshot; `before_read` is called with the offset of each read."""

    def __init__(self, path: Path, before_read: Callable[[int], None] = lambda _offset: None) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        self.size_bytes = os.fstat(self._fd).st_size
        self.announced = 0
        self._before_read = before_read

    def read_into(self, offset: int, view: memoryview) -> None:
        self._before_read(offset)
        if os.preadv(self._fd, [view], offset) != len(view):
            raise Damaged("IO_ERROR", "the file is too short")

    def announce(self, ranges: Sequence[DeltaRange]) -> None:
        for row in ranges:
            os.posix_fadvise(self._fd, row.offset, row.length, os.POSIX_FADV_WILLNEED)
        self.announced += len(ranges)

    def close(self) -> None:
        os.close(self._fd)
        self._fd = -1


class FileStage:
    """A file as a stage, with a directory beside it for the journal."""

    base = "base-1"
    target = "target-1"

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.resumed = path.exists()
        self.directory = path.with_suffix(".stage")
        self.directory.mkdir(exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(self._fd, size_bytes)
        self.size_bytes = size_bytes
        self.writes = 0
        self.syncs = 0
        self.read_bytes = 0

    def write(self, offset: int, data: memoryview) -> None:
        self.writes += 1
        assert os.pwrite(self._fd, data, offset) == len(data)

    def zero(self, offset: int, length: int) -> None:
        ioctl.punch_hole(self._fd, offset, length)

    def sync(self) -> None:
        self.syncs += 1
        os.fdatasync(self._fd)

    def drop_cache(self) -> None:
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def announce(self, ranges: Sequence[DeltaRange]) -> None:
        contents.announce(self._fd, ranges)

    def read_into(self, offset: int, view: memoryview) -> None:
        self.read_bytes += len(view)
        assert os.preadv(self._fd, [view], offset) == len(view)

    def data_within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        yield from contents.data_windows((self._fd,), offset, offset + length)

    def close(self) -> None:
        os.close(self._fd)


def authorize(path: Path, make: Callable[[Path], SnapshotReader] = FileReader) -> Callable[[Hello], ServedSnapshot]:
    def check(hello: Hello) -> ServedSnapshot:
        if hello.ticket != TICKET:
            raise Unauthenticated("TICKET_INVALID", "this ticket was never given out")
        return ServedSnapshot(make(path))

    return check


@contextlib.contextmanager
def serving(path: Path, make: Callable[[Path], SnapshotReader] = FileReader, **bounds: Any) -> Iterator[BlockServer]:
    server = BlockServer(Address("127.0.0.1", 0), authorize(path, make), **bounds)
    server.start()
    try:
        yield server
    finally:
        assert server.stop(10.0)


def at(port: int, node: str = "a") -> SourceAddress:
    return SourceAddress(node, "127.0.0.1", port)


def open_journal(stage: FileStage, delta: DeltaMap) -> Journal:
    return Journal.open(stage.directory, JournalKey.of(stage.base, stage.target, delta), delta)


class Transfer:
    """One call of `receive` with everything around it; `seen` are the counters it told."""

    def __init__(self, stage: FileStage, delta: DeltaMap) -> None:
        self.stage = stage
        self.delta = delta
        self.journal = open_journal(stage, delta)
        self.stop = threading.Event()
        self.seen: list[Counters] = []
        self.on_progress: Callable[[Counters], None] = lambda _counters: None

    def run(
        self,
        *sources: SourceAddress,
        hello: Hello = HELLO,
        idle: float = 20.0,
        silence: float = 5.0,
        throttle: Throttle | None = None,
    ) -> Received:
        def tell(counters: Counters) -> None:
            self.seen.append(counters)
            self.on_progress(counters)

        return receive(
            self.stage,
            self.delta,
            self.journal,
            sources,
            hello,
            on_progress=tell,
            stop=self.stop,
            idle_timeout_s=idle,
            silence_timeout_s=silence,
            throttle=throttle,
        )


def scattered(count: int, *, step: int = 16384, size: int = 4096) -> list[DeltaRange]:
    return [DeltaRange(number * step, size) for number in range(count)]


def same(one: Path, other: Path, delta: DeltaMap) -> bool:
    """Whether two files read the same in every range of the map."""
    with one.open("rb") as first, other.open("rb") as second:
        for row in delta:
            first.seek(row.offset)
            second.seek(row.offset)
            if first.read(row.length) != second.read(row.length):
                return False
    return True


def random_file(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        for start in range(0, size, MIB):
            file.write(os.urandom(min(MIB, size - start)))
    return path


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to pass"
        threading.Event().wait(0.01)


class Proxy:
    """Stands between target and source; `hurt(data, passed_bytes)` may change what the source says."""

    def __init__(
        self,
        server_port: int,
        hurt: Callable[[bytearray, int], None] = lambda _data, _passed: None,
        *,
        port: int = 0,
    ) -> None:
        self._port = server_port
        self._hurt = hurt
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self._sockets: list[socket.socket] = []
        self._pumps: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)
        self.cut()
        for pump in self._pumps:
            pump.join(5)
        for each in self._sockets:
            each.close()

    def cut(self) -> None:
        """Ends what is connected now, at once."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _peer = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            # What has passed is to be on its way, and not to lie in a buffer of this end.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
            self.connections += 1
            self._sockets += [client, server]
            for pump in ((client, server, None), (server, client, self._hurt)):
                self._pumps.append(threading.Thread(target=self._pump, args=pump, daemon=True))
                self._pumps[-1].start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, hurt: Callable[[bytearray, int], None] | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(65536)):
                if hurt is not None:
                    hurt(data, passed)
                passed += len(data)
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
