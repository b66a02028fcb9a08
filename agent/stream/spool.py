"""What has come of a stream, kept until it is in place, so that a restarted target need not be sent it again.

Three files in the stage's directory: `spool.json` says whose stream it is, `spool.data` holds its bytes from the first
on, `spool.chain` the chain of digests after each piece of 1 MiB. Nothing of it is synced: whoever opens it believes
only what agrees with the chain, and cuts off the rest. A spool that would grow beyond its bound is given up for this
transfer, which goes on without one: only if the target breaks off then does all of it travel again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from blake3 import blake3

from agent.disk.durable import Json, disk_errors, open_own, read_json, remove_file, write_json
from agent.stored import typed
from agent.stream.frame import PAYLOAD_BYTES_MAX, extend_chain
from resilver.errors import Refused, ResilverError

CHAIN_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class StreamKey:
    """Whose stream it is: another node's stream of the same delta is another one."""

    node: str
    format: str
    native_base: str
    native_target: str


class Spool:
    """One stream's spool; one thread uses it. `bytes_max` 0: nothing is kept."""

    def __init__(self, directory: Path, bytes_max: int) -> None:
        self._about: Final = directory / "spool.json"
        self._data: Final = directory / "spool.data"
        self._chain: Final = directory / "spool.chain"
        self._bytes_max: Final = bytes_max
        self._fds: tuple[int, int] | None = None
        self.key: StreamKey | None = None
        self.length = 0

    def pieces(self) -> Iterator[tuple[memoryview, bytes]]:
        """What an earlier start has left, piece by piece, with the chain after each; ready to be added to afterwards.

        Nothing if there is none, or none that can be believed.
        """
        self.key = self._known()
        if self.key is None:
            self.clear()
            return
        with disk_errors(self._data):
            self._open(os.O_RDWR)
            yield from self._believed()

    def begin(self, key: StreamKey) -> None:
        """Begins anew, for that stream."""
        self.clear()
        if not self._bytes_max:
            return
        with disk_errors(self._data):
            self._open(os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        write_json(self._about, asdict(key))
        self.key = key

    def add(self, piece: memoryview, chain: bytes) -> None:
        """Keeps the next piece, or gives up: a spool that does not fit is no reason to fail."""
        if self._fds is None:
            return
        if self.length + len(piece) > self._bytes_max or self.length % PAYLOAD_BYTES_MAX:
            self.clear()
            return
        try:
            with disk_errors(self._data):
                data, chains = self._fds
                _write(data, piece, self.length)
                _write(chains, memoryview(chain), self.length // PAYLOAD_BYTES_MAX * CHAIN_BYTES)
        except Refused:
            self.clear()
            return
        self.length += len(piece)

    @property
    def keeps(self) -> bool:
        return self._fds is not None

    def clear(self) -> None:
        """Forgets and removes all of it."""
        self.close()
        self.key = None
        self.length = 0
        for path in (self._about, self._data, self._chain):
            remove_file(path)

    def close(self) -> None:
        fds, self._fds = self._fds, None
        for fd in fds or ():
            os.close(fd)

    def _known(self) -> StreamKey | None:
        if not self._bytes_max:
            return None
        try:
            value: Json | None = read_json(self._about)
            return typed(self._about, value, StreamKey) if value is not None else None
        except ResilverError:
            return None

    def _open(self, flags: int) -> None:
        self.close()
        with contextlib.ExitStack() as stack:
            fds = []
            for path in (self._data, self._chain):
                fds.append(open_own(path, flags))
                stack.callback(os.close, fds[-1])
            stack.pop_all()
        self._fds = (fds[0], fds[1])

    def _believed(self) -> Iterator[tuple[memoryview, bytes]]:
        assert self._fds is not None, "opened before"
        data, chains = self._fds
        buffer = memoryview(bytearray(PAYLOAD_BYTES_MAX))
        chain, self.length = b"", 0
        while True:
            count = os.preadv(data, [buffer], self.length)
            told = os.pread(chains, CHAIN_BYTES, self.length // PAYLOAD_BYTES_MAX * CHAIN_BYTES)
            piece = buffer[:count]
            # A short piece is the stream's last one, or torn: without it the rest is asked for at a multiple of 1 MiB.
            if count < PAYLOAD_BYTES_MAX or told != (chain := extend_chain(chain, blake3(piece).digest())):
                break
            self.length += count
            yield piece, chain
        os.ftruncate(data, self.length)
        os.ftruncate(chains, self.length // PAYLOAD_BYTES_MAX * CHAIN_BYTES)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
