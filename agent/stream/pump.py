"""A file system's own stream on its way to a target: read ahead in a thread, sent in pieces of 1 MiB.

* Only the last piece is shorter than 1 MiB, so that every break is at a multiple of it.
* Whoever had a part already gets the rest only if the chain of digests of that part is the same here. If it is not,
  or the stream is over before, it is `STREAM_CHANGED`, and nothing of it counts.
* While nothing comes from the file system (it may walk a large tree, or make again what the target has) the target is
  told so every few seconds: silence means a source that hangs.
* `END` is sent only after the file system has said that the stream is whole.

In memory: four pieces.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from agent.backends.base import SendStream
from agent.stream import frame as frames
from agent.stream.frame import (
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    VOLUME_BYTES_MAX,
    Kind,
    StreamEnd,
    StreamWish,
)
from agent.stream.group import seal
from agent.stream.lifesign import WAIT_S
from agent.stream.packing import Packer
from resilver.errors import Invalid, Refused
from resilver.fields import check_text, check_texts

PIECES_MAX: Final = 4
STOP_LOOK_S: Final = 0.5
ENDING_S: Final = 5.0
FORMATS_MAX: Final = 16
TOKEN_CHARS_MAX: Final = 16_384
CHAIN_CHARS_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class _Piece:
    """A buffer with room for a header before its payload; `length` 0: the stream is over, or `error` says why not."""

    buffer: memoryview
    length: int
    error: BaseException | None = None


class Pump:
    """One stream to one target. `send` may raise; `stopping` is looked at while nothing comes."""

    def __init__(self, stream: SendStream, name: str) -> None:
        self._stream: Final = stream
        self._free: Final[queue.SimpleQueue[memoryview]] = queue.SimpleQueue()
        self._ready: Final[queue.SimpleQueue[_Piece]] = queue.SimpleQueue()
        for _ in range(PIECES_MAX):
            self._free.put(memoryview(bytearray(HEADER_BYTES + PAYLOAD_BYTES_MAX)))
        self._packer: Final = Packer(time.monotonic())
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name=f"stream-read-{name}", daemon=True)
        self._thread.start()

    def run(
        self,
        wish: StreamWish,
        send: Callable[[bytes | memoryview], None],
        stopping: Callable[[], bool],
    ) -> bool:
        """Sends what is wished for and its END; False if it was stopped before."""
        chain, position, sent_at = b"", 0, time.monotonic()
        while True:
            piece = self._next()
            if piece is None and stopping():
                return False
            if time.monotonic() - sent_at >= WAIT_S:
                send(frames.encode(Kind.WAIT))
                sent_at = time.monotonic()
            if piece is None:
                continue
            if piece.error is not None:
                raise piece.error
            if not piece.length:
                break
            skipped = position < wish.offset
            chain = frames.extend_chain(chain, self._pass_on(piece, position, None if skipped else send))
            position += piece.length
            if not skipped:
                sent_at = time.monotonic()
            elif position >= wish.offset and (position, chain.hex()) != (wish.offset, wish.chain):
                raise _changed(f"its first {position} bytes are others than those that came before")
            self._free.put(piece.buffer)
        if position < wish.offset:
            raise _changed(f"it is over after {position} bytes, and {wish.offset} had come before")
        send(frames.encode_end(StreamEnd(position, chain.hex())))
        return True

    def _pass_on(self, piece: _Piece, position: int, send: Callable[[bytes | memoryview], None] | None) -> bytes:
        """The digest of a piece, which is sent if anybody wants it."""
        if send is None:
            return blake3(piece.buffer[HEADER_BYTES : HEADER_BYTES + piece.length]).digest()
        size = seal(piece.buffer, 0, position, piece.length, self._packer.pack)
        header = frames.unpack_header(piece.buffer)
        send(piece.buffer[:size])
        self._packer.chooser.sent(piece.length, size, time.monotonic())
        return frames.zero_digest(header.length) if header.kind is Kind.ZERO else header.digest

    def close(self) -> None:
        """Ends the stream and the thread that reads it."""
        self._closed.set()
        self._stream.close()
        self._free.put(memoryview(b""))  # wakes a reader that waits for room
        self._thread.join(ENDING_S)

    def _next(self) -> _Piece | None:
        try:
            return self._ready.get(timeout=STOP_LOOK_S)
        except queue.Empty:
            return None

    def _read(self) -> None:
        while True:
            buffer = self._free.get()
            if self._closed.is_set():
                return
            try:
                length = _filled(self._stream, buffer[HEADER_BYTES:])
            except Exception as error:  # noqa: BLE001 - the thread's end: whoever sends must learn of it
                self._ready.put(_Piece(buffer, 0, error))
                return
            self._ready.put(_Piece(buffer, length))
            if length < PAYLOAD_BYTES_MAX:
                if length:
                    self._ready.put(_Piece(buffer, 0))
                return


def check_wish(wish: StreamWish) -> None:
    """Raises Invalid for a wish that nobody can have."""
    check_texts(wish.formats, "stream.formats", FORMATS_MAX)
    check_text(wish.token, "stream.token", chars_max=TOKEN_CHARS_MAX)
    check_text(wish.chain, "stream.chain", chars_max=CHAIN_CHARS_MAX)
    if not 0 <= wish.offset <= VOLUME_BYTES_MAX or wish.offset % PAYLOAD_BYTES_MAX:
        raise Invalid("INVALID_FIELD", f"stream.offset is {wish.offset}, no multiple of 1 MiB", field="stream.offset")


def _filled(stream: SendStream, view: memoryview) -> int:
    """Reads until the view is full or the stream is over."""
    at = 0
    while at < len(view):
        count = stream.read_into(view[at:])
        if not count:
            break
        at += count
    return at


def _changed(why: str) -> Refused:
    return Refused("STREAM_CHANGED", f"the stream is not the one that was begun: {why}")
