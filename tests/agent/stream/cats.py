"""A stand-in for a file system's own stream: a file that `cat` reads and writes, and short ways to send it."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.backends.base import StreamOrigin
from agent.stream.connection import ServedStream
from agent.stream.counters import Counters
from agent.stream.frame import Hello
from agent.stream.link import SourceAddress
from agent.stream.sender import BlockServer
from agent.stream.spool import Spool
from agent.stream.stream_receiver import receive_stream
from agent.stream.throttle import Throttle
from resilver.address import Address
from resilver.errors import Damaged, Refused, ResilverError
from tests.agent.stream.support import HELLO, MIB, at, until

ORIGIN = StreamOrigin("base-uuid", "target-uuid", ("cat-2", "cat-1"))

WHOLE = 5 * MIB + 12345


class CatStream:
    """`cat` writes a file as the file system would write a stream."""

    def __init__(self, path: Path, stream_format: str, before: Callable[[int], None]) -> None:
        self.format = stream_format
        self._before = before
        self._at = 0
        self._cat = subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def read_into(self, view: memoryview) -> int:
        self._before(self._at)
        assert self._cat.stdout is not None
        count = self._cat.stdout.readinto1(view)
        self._at += count
        if not count and self._cat.wait(10):
            raise Damaged("IO_ERROR", "cat: it could not")
        return count

    def close(self) -> None:
        self._cat.kill()
        self._cat.wait()


class CatStage:
    """`cat` takes a stream; a broken one is of no use, a whole one is renamed to `whole`."""

    base = "base-1"
    target = "target-1"
    spools = True

    def __init__(self, directory: Path, token: str = "") -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.whole = directory / "whole"
        self.resumed = any(directory.iterdir())
        self.starts: list[tuple[str, str]] = []
        self.fed = 0
        self._token = token
        self._cat: subprocess.Popen[bytes] | None = None

    @property
    def complete(self) -> bool:
        return self.whole.exists()

    def resume_token(self) -> str:
        return self._token

    def start(self, stream_format: str, token: str = "") -> None:
        self.close()
        self.starts.append((stream_format, token))
        with (self.directory / "part").open("wb") as file:
            self._cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)

    def feed(self, data: memoryview) -> None:
        assert self._cat is not None
        assert self._cat.stdin is not None
        self._cat.stdin.write(data)
        self.fed += len(data)

    def finish(self) -> None:
        assert self._cat is not None
        self._cat.communicate(timeout=10)
        (self.directory / "part").rename(self.whole)

    def verify(self, stop: threading.Event) -> None: ...

    def close(self) -> None:
        if self._cat is not None:
            self._cat.kill()
            self._cat.wait()
            with contextlib.suppress(OSError):
                self._cat.stdin.close()  # type: ignore[union-attr]

    @property
    def digest(self) -> str:
        return digest(self.whole)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def nothing(_at: int) -> None:
    return None


@contextlib.contextmanager
def serving(
    path: Path,
    *,
    formats: tuple[str, ...] = ("cat-2", "cat-1"),
    before: Callable[[int], None] = nothing,
    throttle: Throttle | None = None,
) -> Iterator[BlockServer]:
    def authorize(hello: Hello) -> ServedStream:
        assert hello.stream is not None
        chosen = next((each for each in formats if each in hello.stream.formats), None)
        if chosen is None:
            raise Refused("NOT_SUPPORTED", "no such format")
        return ServedStream(CatStream(path, chosen, before))

    server = BlockServer(Address("127.0.0.1", 0), authorize, throttle=throttle)
    server.start()
    try:
        yield server
    finally:
        assert server.stop(10.0)


class Call:
    """One call of `receive_stream`."""

    def __init__(self, stage: CatStage, spool_bytes: int = 1 << 30, origin: StreamOrigin = ORIGIN) -> None:
        self.stage = stage
        self.spool = Spool(stage.directory, spool_bytes)
        self.origin = origin
        self.stop = threading.Event()
        self.last = Counters()
        self.on_progress: Callable[[Counters], None] = lambda _counters: None
        self.throttle = Throttle()

    def run(self, *sources: SourceAddress, idle: float = 20.0, formats: tuple[str, ...] = ("cat-1",)) -> Counters:
        def tell(counters: Counters) -> None:
            self.last = counters
            self.on_progress(counters)

        return receive_stream(
            self.stage,
            self.spool,
            self.origin,
            sources,
            HELLO,
            formats=formats,
            on_progress=tell,
            stop=self.stop,
            idle_timeout_s=idle,
            silence_timeout_s=5.0,
            throttle=self.throttle,
        )

    def in_background(self, *sources: SourceAddress, idle: float = 20.0) -> threading.Thread:
        def work() -> None:
            with contextlib.suppress(ResilverError):
                self.run(*sources, idle=idle)

        thread = threading.Thread(target=work)
        thread.start()
        return thread


def broken_off(stage: CatStage, source: Path, after: int, spool_bytes: int = 1 << 30) -> int:
    """A transfer that is stopped once so much has been fed; the bytes that were."""
    held = threading.Event()

    def before(position: int) -> None:
        if position >= after:
            held.wait(30)

    call = Call(stage, spool_bytes)
    with serving(source, before=before) as server:
        thread = call.in_background(at(server.port))
        until(lambda: stage.fed >= after // MIB * MIB)
        call.stop.set()
        thread.join(20)
        assert not thread.is_alive()
        held.set()
    stage.close()
    return stage.fed
