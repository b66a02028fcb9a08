"""Reading what `zfs send` writes: for a peer, for a comparison, or to be received on the same pool."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import threading
import time
from collections.abc import Callable
from typing import IO, Final

from agent.disk import zfs
from resilver.errors import Damaged, Unauthenticated

PLAIN: Final = "zfs"
LARGE: Final = "zfs-lc"
ZSTD: Final = "zfs-lcz"
SILENT_MAX_S: Final = 600.0
_END_S: Final = 30.0
_POLL_MS: Final = 200
_WORDS_MAX: Final = 64 << 10


class ZfsSend:
    """A running `zfs send`. Read by one thread, closed from any; `on_close` is called once."""

    def __init__(self, arguments: list[str], stream_format: str, on_close: Callable[[], None] | None = None) -> None:
        self.format = stream_format
        self._closing: Final = threading.Lock()
        self._reading: Final = threading.Lock()
        self._on_close = on_close
        self._name: Final = arguments[-1]
        self._closed = False
        self._process: Final = subprocess.Popen(
            [zfs.command("zfs"), "send", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=zfs.environment(),
        )
        self._words = Words(self._process.stderr)

    def read_into(self, view: memoryview) -> int:
        """See `SendStream.read_into`."""
        out = self._process.stdout
        assert out is not None
        with self._reading:
            if not self._ready():
                raise Damaged("IO_ERROR", f"zfs send {self._name} was ended")
            got = os.readv(out.fileno(), [view])
        if got == 0:
            self._check_end()
        return got

    def _ready(self) -> bool:
        """Waits until there is something; False if it was closed. Never closed while somebody waits here."""
        poll = select.poll()
        assert self._process.stdout is not None
        deadline = time.monotonic() + SILENT_MAX_S
        if not self._closed:
            poll.register(self._process.stdout.fileno(), select.POLLIN | select.POLLHUP)
        while not self._closed:
            if poll.poll(_POLL_MS):
                return not self._closed
            if time.monotonic() > deadline:
                raise Damaged("IO_ERROR", f"zfs send {self._name} has said nothing for {SILENT_MAX_S:.0f} s")
        return False

    def _check_end(self) -> None:
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            raise Damaged("IO_ERROR", f"zfs send {self._name} does not end") from None
        if code != 0 or self._closed:
            said = zfs.brief(self._words.told()) or f"ended with {code}"
            raise zfs.ZfsError(f"zfs send {self._name}", said).refused()

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._process.kill()
        out = self._process.stdout
        assert out is not None
        # zfs-fuse's daemon writes into the pipe itself, and ends when nobody can read it any more.
        with self._reading, contextlib.suppress(OSError):
            out.close()
        reap(self._process)
        if self._on_close is not None:
            self._on_close()


class Words:
    """What a running command says, read as it comes so that it never waits for a reader, and bounded."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        assert pipe is not None
        self._pipe: Final = pipe
        self._said = bytearray()
        self._thread: Final = threading.Thread(target=self._read, name="zfs words", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._pipe:
            while data := os.read(self._pipe.fileno(), 4096):
                self._said += data[: max(0, _WORDS_MAX - len(self._said))]

    def told(self) -> bytes:
        """All of it, once the command has ended."""
        self._thread.join(_END_S)
        return bytes(self._said)


def reap(process: subprocess.Popen[bytes]) -> None:
    """Waits for a command that was killed; one that hangs in the kernel is left to it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)


def formats(pool: str) -> tuple[str, ...]:
    """What this end can write and read. Blocks as they are stored need features of the pool besides the command's.

    Not embedded ones: an encrypted dataset takes no stream that may have them.
    """
    if not zfs.features().send_large or not _features(pool, "large_blocks", "lz4_compress"):
        return (PLAIN,)
    return (ZSTD, LARGE, PLAIN) if _features(pool, "zstd_compress") else (LARGE, PLAIN)


def _features(pool: str, *names: str) -> bool:
    try:
        said = zfs.run("zpool", "list", "-H", "-o", ",".join(f"feature@{name}" for name in names), pool)
    except zfs.ZfsError:
        return False
    return set(said.split()) <= {"enabled", "active"}


def _flags(stream_format: str, snapshot: str) -> list[str]:
    """For a pool without zstd, one that has it sends large blocks, but none as they are stored."""
    if stream_format == PLAIN:
        return []
    bare = stream_format == LARGE and _features(zfs.pool_of(snapshot), "zstd_compress")
    return ["-L"] if bare else ["-L", "-c"]


def open_stream(
    base: str, target: str, stream_format: str, token: str = "", on_close: Callable[[], None] | None = None
) -> ZfsSend:
    """Begins to write a stream; base and target are names of snapshots, the base empty for a whole one."""
    if token:
        return ZfsSend(["-t", token], stream_format, on_close)
    between = ["-i", base] if base else []
    return ZfsSend([*_flags(stream_format, target), *between, target], stream_format, on_close)


def estimate(base: str, target: str) -> int | None:
    """About how long the stream would be; None where the command cannot say."""
    if not zfs.features().estimate:
        return None
    between = ["-i", base] if base else []
    flags = _flags(formats(zfs.pool_of(target))[0], target)
    return parse_estimate(zfs.run("zfs", "send", "-nP", *flags, *between, target))


def parse_estimate(text: str) -> int | None:
    """The size that `zfs send -nP` prints; None if it prints none."""
    for line in text.splitlines():
        fields = line.split("\t") if "\t" in line else line.split()
        if fields and fields[0] == "size" and re.fullmatch(r"[0-9]{1,18}", fields[-1]):
            return int(fields[-1])
    return None


def check_token(token: str, native_base: str, native_target: str) -> None:
    """A token must speak of the two snapshots that were asked for, and of no others."""
    if not zfs.features().resume:
        raise Unauthenticated("TICKET_INVALID", "this node's zfs cannot go on with a stream where it stopped")
    if re.fullmatch(r"[0-9a-zA-Z][0-9a-zA-Z-]{0,8191}", token) is None:
        raise Unauthenticated("TICKET_INVALID", "that is no resume token of zfs")
    try:
        told = zfs.run("zfs", "send", "-nvt", token)
    except zfs.ZfsError as error:
        raise Unauthenticated("TICKET_INVALID", f"the resume token is refused: {error.text}") from error
    found = parse_token(told)
    if found.get("toguid") != native_target or found.get("fromguid", "0") != (native_base or "0"):
        raise Unauthenticated("TICKET_INVALID", "the resume token is of another base or target")


def parse_token(text: str) -> dict[str, str]:
    """The guids that `zfs send -nvt` says a token speaks of, as decimal numbers."""
    found = re.findall(r"^[ \t]*([a-z]{1,16}guid) = (0x[0-9a-f]{1,16}|[0-9]{1,20})[ \t]*$", text, re.MULTILINE)
    return {key: str(int(value, 16 if value.startswith("0x") else 10)) for key, value in found}
