"""One connection after another, in a thread of its own, each to the source whose turn it is.

A lane takes no more work at a time than its source does in about half a second, so that a slow one never holds much
that others could do; and no more than the way to it holds, beside a few MiB, so that little is lost by a crash. What it
could not finish it gives back.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from agent.stream.counters import RATE_WINDOW_S, Rate
from agent.stream.frame import FrameBuffer, Hello, Kind, encode_request
from agent.stream.group import pieces
from agent.stream.link import Link, SourceAddress, SourceFailed, Verdict
from resilver.errors import Damaged, Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.backends.base import Stage
    from agent.stream.counters import Meter
    from agent.stream.flusher import Flusher
    from agent.stream.frame import Frame
    from agent.stream.lanes import Lanes
    from agent.stream.sources import Sources
    from agent.stream.throttle import Throttle
    from agent.stream.work import Chunk, Work

# Requests for a whole window fit the socket's buffers, so that neither side can wait for the other to read first.
IN_FLIGHT_CHUNKS_MAX: Final = 2048
IN_FLIGHT_BYTES_MAX: Final = 32 << 20
IN_FLIGHT_BYTES_MIN: Final = 2 << 20
"""Of scattered blocks of 4 KiB twice as many as a source announces to its disk: it is filled up when half empty."""
IN_FLIGHT_BYTES: Final = 4 << 20
"""Of all lanes together, beside what a long way holds by itself: with the two marks of the flusher that is what a crash
can lose."""
IN_FLIGHT_S: Final = 0.5
BUFFER_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Desk:
    """What all lanes of one transfer work on."""

    stage: Stage
    work: Work
    flusher: Flusher
    meter: Meter
    sources: Sources
    throttle: Throttle
    hello: Hello
    capacity_bytes: int
    silence_timeout_s: float


class Lane:
    """`run` is the thread's; the rest of what is public may be read by others."""

    def __init__(self, desk: Desk, lanes: Lanes, number: int, *, share: int) -> None:
        self._desk: Final = desk
        self._share: Final = share
        self._lanes: Final = lanes
        self._buffer: Final = FrameBuffer(buffer_bytes=BUFFER_BYTES)
        self._in_flight: Final[deque[Chunk]] = deque()
        self._in_flight_bytes = 0
        self._rate = Rate()
        self._since = 0.0
        self._cut = threading.Event()
        self.source: SourceAddress | None = None
        self._link: Link | None = None
        self._at_disk = self._packed = False
        self.good_frames = 0
        # What is logged in the thread carries what the transfer's own logs do.
        run = partial(contextvars.copy_context().run, self._run)
        self.thread: Final = threading.Thread(target=run, name=f"stream-lane-{number}", daemon=True)

    @property
    def busy(self) -> bool:
        """Whether it is at what has come already: no source is waited for meanwhile."""
        link = self._link
        return self._at_disk or (link is not None and link.paying)

    def left_s(self, now: float, *, lanes: int) -> float:
        """How long its source will take for what it was asked for, as it goes; 0 if nothing can be said yet.

        What this node's own cap makes of it, which so many lanes share, is not the source's doing.
        """
        left_bytes, cap = self._in_flight_bytes, self._desk.throttle.bytes_s
        if self.source is None or not left_bytes or now - self._since < RATE_WINDOW_S:
            return 0.0
        own_s = lanes * left_bytes / cap if cap else 0.0
        return left_bytes / max(1, self._rate.per_second(now)) - own_s

    def cut(self) -> None:
        """Its source is to be left: others can do sooner what it was asked for."""
        self._cut.set()

    def _run(self) -> None:
        try:
            while (turn := self._lanes.next_turn()) is not None:
                before = self.good_frames
                try:
                    self._fetch(turn.source)
                except SourceFailed as failed:
                    self._desk.sources.leave(turn.source, failed)
                    self._lanes.failed(turn, fruitful=self.good_frames > before)
                else:
                    self._lanes.give_back(turn)
        except BaseException as error:  # noqa: BLE001 - the thread's end: the transfer's own thread raises it
            self._lanes.end(error)

    def _fetch(self, source: SourceAddress) -> None:
        """Takes work and has it done by one source, until nothing is left to take or the source fails."""
        desk = self._desk
        self.source, self._since, self._rate = source, time.monotonic(), Rate()
        self._cut.clear()
        try:
            with Link(
                source,
                self._buffer,
                desk.meter,
                waited=self._waited,
                silence_timeout_s=desk.silence_timeout_s,
                throttle=desk.throttle,
            ) as link:
                self._link = link
                welcome = link.greet(desk.hello)
                _check_size(source, welcome.size_bytes, desk.capacity_bytes)
                self._packed = welcome.packed_requests
                while self._ask(link):
                    link.wait()
                    self._take_all(link, source)
                link.bye()
        except SourceFailed as failed:
            if failed.verdict is Verdict.DAMAGED and self._in_flight:
                desk.meter.resent(self._in_flight[0].length)
            raise
        finally:
            self.source = self._link = None
            desk.work.give_back(self._in_flight)
            self._in_flight.clear()
            self._in_flight_bytes = 0

    def _waited(self, _seconds: float) -> None:
        self._lanes.check()
        if self._cut.is_set():
            raise SourceFailed(Verdict.AWAY, Unavailable("DEADLINE", "it is slow, and others have nothing left to do"))

    def _ask(self, link: Link) -> bool:
        """Fills the window up once it is half empty; False if nothing is left to wait for."""
        pending, waiting = len(self._in_flight), self._in_flight_bytes
        window = self._window(link)
        if pending <= IN_FLIGHT_CHUNKS_MAX // 2 and waiting <= window // 2:
            chunks = self._desk.work.take(IN_FLIGHT_CHUNKS_MAX - pending, window - waiting)
            if chunks:
                self._in_flight.extend(chunks)
                self._in_flight_bytes += sum(chunk.length for chunk in chunks)
                ranges = [(chunk.offset, chunk.length) for chunk in chunks]
                link.send(encode_request(ranges, packed=self._packed))
        return bool(self._in_flight)

    def _window(self, link: Link) -> int:
        """How much may be asked for and not answered, in bytes."""
        rate = self._rate.per_second(time.monotonic())
        useful = IN_FLIGHT_BYTES // self._share + int(2 * rate * link.round_trip_s())
        fair = int(rate * IN_FLIGHT_S)
        return min(max(min(useful, fair), IN_FLIGHT_BYTES_MIN), IN_FLIGHT_BYTES_MAX)

    def _take_all(self, link: Link, source: SourceAddress) -> None:
        """Whatever has come whole."""
        taken = 0
        self._at_disk = True
        try:
            while (frame := link.next()) is not None:
                taken += self._take_in(frame, link, source)
        finally:
            self._at_disk = False
            if taken:
                self._rate.add(taken, time.monotonic())
                self._lanes.good()

    def _take_in(self, frame: Frame, link: Link, source: SourceAddress) -> int:
        """Writes the answer to the oldest requests, or puts them back if the answer is damaged; its bytes."""
        header, desk = frame.header, self._desk
        if header.kind is Kind.WAIT:
            return 0
        chunks = self._answered_by(frame)
        if not chunks:
            raise link.unexpected(frame)
        try:
            found = pieces(frame, [chunk[1:] for chunk in chunks])
        except Damaged as error:
            desk.sources.damaged_payload(source, error)
            desk.meter.resent(header.length)
            self._answered(chunks)
            desk.work.give_back(chunks)
            return 0
        for chunk, piece in zip(chunks, found, strict=True):
            if header.kind is Kind.ZERO:
                desk.stage.zero(chunk.offset, chunk.length)
            else:
                desk.stage.write(chunk.offset, piece.body)
            desk.flusher.add(chunk.number, piece.digest, chunk.length)
        self._answered(chunks)
        desk.work.finished(len(chunks))
        desk.meter.done(header.length)
        self.good_frames += 1
        return header.length

    def _answered(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._in_flight.popleft()
            self._in_flight_bytes -= chunk.length

    def _answered_by(self, frame: Frame) -> list[Chunk]:
        """The oldest of what was asked for, as far as the frame answers it; nothing if it answers something else."""
        kind, _flags, offset, left, _stored, _digest = frame.header
        if kind not in {Kind.DATA, Kind.GROUP, Kind.ZERO} or not self._in_flight or self._in_flight[0].offset != offset:
            return []
        chunks: list[Chunk] = []
        for chunk in self._in_flight:
            if left <= 0:
                break
            chunks.append(chunk)
            left -= chunk.length
        return chunks if not left and (len(chunks) == 1 or kind is Kind.GROUP) else []


def _check_size(source: SourceAddress, there: int, here: int) -> None:
    if there != here:
        said = f"{source.node} has the target with {there} bytes, and the delta map is of one with {here}"
        raise SourceFailed(Verdict.GONE, Damaged("SOURCE_DAMAGED", said, node=source.node))
