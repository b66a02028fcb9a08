"""`btrfs send` as a child process: the stream itself, and what can be known from one without data.

* The child writes into a pipe; a reader that goes away, also by dying, ends it. What it says goes to a file in memory.
* A stream is whole only if the child ended well: its words become the error otherwise.
* Without data (`--no-data`) a stream names what differs, and how long it is, without reading it: that is how the length
  of a delta is told, and whether a live copy is its tip. It takes as long as there are differences to walk through.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import subprocess
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.backends.btrfs_stream import Attribute, Command, Kind, Meter, Parser
from agent.disk.advance import advanced
from resilver.errors import Damaged, Invalid, Refused, ResilverError

PLAIN: Final = "btrfs-1"
COMPRESSED: Final = "btrfs-2c"
PIPE_BYTES: Final = 1 << 20
END_MAX_S: Final = 30.0
_WORDS_MAX: Final = 2000
_READ_BYTES: Final = 1 << 20
_TOLD_ANYWAY: Final = frozenset({int(Kind.UTIMES), int(Kind.SET_XATTR)})
_BOUNDS: Final = frozenset({int(Kind.SNAPSHOT), int(Kind.END)})
_VERSION: Final = Path("/sys/fs/btrfs/features/send_stream_version")


def environment() -> dict[str, str]:
    """The child's: its words are read here."""
    return {**os.environ, "LC_ALL": "C"}


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that the kernel and the installed btrfs-progs both have, the best first."""
    try:
        version = int(_VERSION.read_text())
        helps = [
            subprocess.run(["btrfs", verb, "--help"], capture_output=True, timeout=30, check=False, env=environment())
            for verb in ("send", "receive")
        ]
    except (OSError, ValueError):
        return (PLAIN,)
    if version >= 2 and b"--compressed-data" in helps[0].stdout and b"--force-decompress" in helps[1].stdout:
        return (COMPRESSED, PLAIN)
    return (PLAIN,)


class Words:
    """What a child says, in memory: the last of it is what an operator is told."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("words", os.MFD_CLOEXEC)

    def read(self) -> str:
        size = os.fstat(self.fd).st_size
        raw = os.pread(self.fd, _WORDS_MAX, max(0, size - _WORDS_MAX))
        return " / ".join(raw.decode(errors="replace").split("\n")).strip(" /")

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def failed(what: str, words: str, path: Path) -> Exception:
    """The error that a child's words stand for."""
    if "No space left" in words or "Disk quota" in words:
        return Refused("NO_SPACE", f"{path}: {what}: {words}; free some space there and try again", path=str(path))
    return Damaged("IO_ERROR", f"{path}: {what}: {words or 'it ended without a word'}", path=str(path))


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a child and takes its exit; one that the kernel does not let go is left to it."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_MAX_S)


class BtrfsSend:
    """A stream that is being written. `read_into` in one thread; `close` from any."""

    def __init__(self, base: Path | None, target: Path, options: tuple[str, ...], stream_format: str) -> None:
        self.format = stream_format
        self._target = target
        self._words = Words()
        self._reading = threading.Lock()
        self._ended = False
        command = ["btrfs", "send", "-q", *options]
        if base is not None:
            command += ["-p", str(base)]
        try:
            self._process = subprocess.Popen(
                [*command, str(target)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._words.fd,
                env=environment(),
            )
        except OSError as error:
            self._words.close()
            raise Damaged("IO_ERROR", f"btrfs cannot be started: {error.strerror}; install btrfs-progs") from error
        assert self._process.stdout is not None
        self._fd = self._process.stdout.fileno()
        with contextlib.suppress(OSError):  # beyond what an unprivileged user may have: a smaller pipe is no harm
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def read_into(self, view: memoryview) -> int:
        with self._reading:
            if self._fd < 0:
                raise Damaged("IO_ERROR", f"{self._target}: the stream was closed")
            if self._ended:
                return 0
            count = os.readv(self._fd, [view])
            if count:
                return count
            self._ended = True
            try:
                code = self._process.wait(END_MAX_S)
            except subprocess.TimeoutExpired:
                code = -1
            if code:
                raise failed(f"btrfs send ended with {code}", self._words.read(), self._target)
            return 0

    def close(self) -> None:
        end(self._process)
        with self._reading:
            if self._fd >= 0:
                self._fd = -1
                assert self._process.stdout is not None
                self._process.stdout.close()
                self._words.close()


def open_send(base: Path | None, target: Path, stream_format: str) -> BtrfsSend:
    """The stream from a base (or nothing) to a target, both read-only subvolumes reached through one mount."""
    if stream_format not in formats():
        raise Invalid(
            "INVALID_FIELD", f"no stream format {stream_format!r} here, but {', '.join(formats())}", field="format"
        )
    options = ("--proto", "2", "--compressed-data") if stream_format == COMPRESSED else ()
    return BtrfsSend(base, target, options, stream_format)


def _pieces(base: Path | None, target: Path, deadline_s: float) -> Generator[memoryview, None, None]:
    """The stream without data, to its end. TimeoutError at the deadline."""
    until = time.monotonic() + deadline_s
    send = BtrfsSend(base, target, ("--no-data",), PLAIN)
    watch = threading.Timer(deadline_s, send.close)
    watch.daemon = True
    watch.start()
    buffer = memoryview(bytearray(_READ_BYTES))
    try:
        while count := send.read_into(buffer):
            yield buffer[:count]
            advanced()
            if time.monotonic() > until:
                raise TimeoutError
    except Damaged:
        if time.monotonic() >= until:
            raise TimeoutError from None
        raise
    finally:
        watch.cancel()
        send.close()


def _check_whole(reader: Parser | Meter, target: Path) -> None:
    if not reader.whole:
        raise Damaged("IO_ERROR", f"{target}: btrfs send ended before the end of its stream")


@dataclass(frozen=True, slots=True)
class Measured:
    """A delta without its data: how much data it would have, and the bytes of all else."""

    data_bytes: int
    other_bytes: int


def measure(base: Path | None, target: Path, deadline_s: float) -> Measured | None:
    """None if it was not counted to the end in that time."""
    meter, seen = Meter(), 0
    try:
        for piece in _pieces(base, target, deadline_s):
            meter.feed(piece)
            seen += len(piece)
    except TimeoutError:
        return None
    _check_whole(meter, target)
    return Measured(meter.data_bytes, seen)


def estimate(base: Path | None, target: Path, deadline_s: float) -> int | None:
    """The bytes of data of a delta that nothing depends on: None where they cannot be counted, for whatever reason."""
    try:
        found = measure(base, target, deadline_s)
    except (OSError, ResilverError):
        return None
    return found.data_bytes if found is not None else None


def differs(base: Path, target: Path, deadline_s: float) -> bool:
    """Whether two subvolumes of the same origin differ in anything but when they were read. TimeoutError."""
    parser = Parser()
    with contextlib.closing(_pieces(base, target, deadline_s)) as pieces:
        for piece in pieces:
            if any(_changes(command, base) for command in parser.feed(piece)):
                return True
    _check_whole(parser, target)
    return False


def _changes(command: Command, base: Path) -> bool:
    if command.kind in _BOUNDS:
        return False
    if command.kind not in _TOLD_ANYWAY:
        return True
    # Times and capabilities are told of every inode that was touched at all, as by being read. Nothing came before, so
    # that the path is the base's too.
    path = b"/".join((os.fsencode(base), command.path()))
    try:
        if command.kind == Kind.UTIMES:
            return os.lstat(path).st_mtime_ns != command.time_ns(Attribute.MTIME)
        name = bytes(command.attributes.get(Attribute.XATTR_NAME, b""))
        return os.getxattr(path, name, follow_symlinks=False) != command.attributes.get(Attribute.XATTR_DATA, b"")
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENODATA}:
            raise
        return True
