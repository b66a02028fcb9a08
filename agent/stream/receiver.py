"""The target's side of the block stream: fetches what a stage lacks, from whoever has it.

The rules:

* The journal says what is done; everything else of the map is fetched. Zero ranges are made here and ask nobody.
* A chunk is written only after its digest has been checked, and journaled only after a sync (`flusher.py`).
* One source at a time, the first one first; one that works is kept. `rounds.py` says when another is asked, and when
  the run ends without one. What was received by then is journaled, so that the next run goes on there.
* An error of the stage's own disk ends the run as it is; after a failed sync nothing more is journaled.

In memory: one buffer of 4 MiB for frames, a window of requests, one mark's records, one byte for each chunk.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from agent.backends.base import Stage
from agent.delta import DeltaMap
from agent.stream.counters import Counters, Meter
from agent.stream.flusher import Flusher
from agent.stream.frame import (
    NO_DIGEST,
    Frame,
    FrameBuffer,
    Hello,
    Kind,
    encode_request,
    zero_digest,
)
from agent.stream.journal import Journal
from agent.stream.link import Link, SourceAddress, SourceFailed, Verdict
from agent.stream.readback import check_map, verify
from agent.stream.rounds import IDLE_TIMEOUT_S, SILENCE_TIMEOUT_S, Rounds, SourceProblem
from agent.stream.throttle import Throttle
from agent.stream.work import Chunk, Stopped, Work
from resilver.errors import Damaged, ResilverError

__all__ = [
    "Counters",
    "Received",
    "SourceAddress",
    "SourceProblem",
    "Stopped",
    "receive",
    "verify",
]

# Requests for a whole window fit the socket's buffers, so that neither side can wait for the other to read first.
IN_FLIGHT_CHUNKS_MAX: Final = 2048
IN_FLIGHT_BYTES_MAX: Final = 32 << 20
BUFFER_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Received:
    """A transfer that has everything; `problems` are those of the sources on the way, the last one of each."""

    counters: Counters
    problems: tuple[SourceProblem, ...]


def receive(
    stage: Stage,
    delta: DeltaMap,
    journal: Journal,
    sources: Sequence[SourceAddress],
    hello: Hello,
    *,
    on_progress: Callable[[Counters], None],
    stop: threading.Event,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
    silence_timeout_s: float = SILENCE_TIMEOUT_S,
    throttle: Throttle | None = None,
) -> Received:
    """Brings the stage to the target; returns when all of it is on the disk and journaled.

    Stopped if `stop` is set. With no source left: the one reason that all of them gave, SOURCE_DAMAGED if damage was
    among several, NO_SOURCE otherwise. Errors of the stage pass through. `on_progress` is called from this thread.
    """
    check_map(delta, journal)
    run = _Run(
        stage,
        journal,
        sources,
        hello=hello,
        on_progress=on_progress,
        stop=stop,
        idle_timeout_s=idle_timeout_s,
        silence_timeout_s=silence_timeout_s,
        throttle=throttle,
    )
    try:
        run.make_zeros()
        run.fetch_all()
        run.flusher.finish()
    except ResilverError:
        # What has been received is true, whatever ended the run. A sync that failed is not tried again.
        with contextlib.suppress(ResilverError):
            run.flusher.finish()
        raise
    finally:
        run.flusher.close()
        on_progress(run.meter.read())
    return Received(run.meter.read(), tuple(run.rounds.problems.values()))


class _Run:
    """One call of `receive`."""

    def __init__(
        self,
        stage: Stage,
        journal: Journal,
        sources: Sequence[SourceAddress],
        *,
        hello: Hello,
        on_progress: Callable[[Counters], None],
        stop: threading.Event,
        idle_timeout_s: float,
        silence_timeout_s: float,
        throttle: Throttle | None,
    ) -> None:
        self.stage = stage
        self.capacity_bytes = journal.delta.capacity_bytes
        self.hello = hello
        self.silence_timeout_s = silence_timeout_s
        self.throttle = throttle
        self.work = Work(journal.table, journal.done)
        self.flusher = Flusher(stage, journal)
        self.buffer = FrameBuffer(buffer_bytes=BUFFER_BYTES)
        self.meter = Meter(
            [source.node for source in sources],
            done_bytes=journal.done_bytes,
            total_bytes=journal.delta.data_bytes,
            clock=time.monotonic,
        )
        self.rounds = Rounds(sources, self.meter, on_progress=on_progress, stop=stop, idle_timeout_s=idle_timeout_s)
        self.good_frames = 0

    def make_zeros(self) -> None:
        for chunk in self.work.zero_chunks():
            self.stage.zero(chunk.offset, chunk.length)
            self.flusher.add(chunk.number, NO_DIGEST, 0)
            self.rounds.tick()

    def fetch_all(self) -> None:
        """Goes from source to source until nothing is left to fetch."""
        at = fruitless = 0
        alive = self.rounds.alive
        while self.work.left:
            self.rounds.check()
            at %= len(alive)
            before = self.good_frames
            try:
                self.fetch(alive[at])
            except SourceFailed as failed:
                self.rounds.leave(alive[at], failed)
                if failed.verdict is Verdict.AWAY:
                    at += 1
                    fruitless = 1 if self.good_frames > before else fruitless + 1
                    if fruitless % len(alive) == 0:
                        self.rounds.pause(fruitless // len(alive))

    def fetch(self, source: SourceAddress) -> None:
        """Takes work and has it done by one source, until nothing is left or the source fails."""
        in_flight: deque[Chunk] = deque()
        with Link(
            source,
            self.buffer,
            self.meter,
            waited=self.rounds.waited,
            silence_timeout_s=self.silence_timeout_s,
            throttle=self.throttle,
        ) as link:
            welcome = link.greet(self.hello)
            if welcome.size_bytes != self.capacity_bytes:
                raise SourceFailed(Verdict.GONE, _other_size(source, welcome.size_bytes, self.capacity_bytes))
            try:
                while self.ask(link, in_flight):
                    link.wait()
                    while (frame := link.next()) is not None:
                        self.take_in(frame, in_flight, link, source)
                link.bye()
            except SourceFailed as failed:
                if failed.verdict is Verdict.DAMAGED and in_flight:
                    self.meter.resent(in_flight[0].length)
                raise
            finally:
                self.work.give_back(in_flight)

    def ask(self, link: Link, in_flight: deque[Chunk]) -> bool:
        """Fills the window up once it is half empty; False if nothing is left to wait for."""
        waiting = sum(chunk.length for chunk in in_flight) if len(in_flight) <= IN_FLIGHT_CHUNKS_MAX // 2 else 0
        if len(in_flight) <= IN_FLIGHT_CHUNKS_MAX // 2 and waiting <= IN_FLIGHT_BYTES_MAX // 2:
            chunks = self.work.take(IN_FLIGHT_CHUNKS_MAX - len(in_flight), IN_FLIGHT_BYTES_MAX - waiting)
            if chunks:
                in_flight.extend(chunks)
                link.send(encode_request([(chunk.offset, chunk.length) for chunk in chunks]))
        return bool(in_flight)

    def take_in(self, frame: Frame, in_flight: deque[Chunk], link: Link, source: SourceAddress) -> None:
        """Writes the answer to the oldest request, or puts the request back if the answer is damaged."""
        kind, _flags, offset, length, _stored, digest = frame.header
        if kind is Kind.WAIT:
            return
        if kind not in {Kind.DATA, Kind.ZERO} or not in_flight or in_flight[0][1:] != (offset, length):
            raise link.unexpected(frame)
        chunk = in_flight[0]
        try:
            body = frame.payload()
        except Damaged as error:
            self.rounds.damaged_payload(source, error)
            self.meter.resent(chunk.length)
            in_flight.popleft()
            self.work.give_back([chunk])
            return
        in_flight.popleft()
        if kind is Kind.ZERO:
            self.stage.zero(offset, length)
            digest = zero_digest(length)
        else:
            self.stage.write(offset, body)
        self.flusher.add(chunk.number, digest, length)
        self.meter.done(length)
        self.good_frames += 1
        self.rounds.good()


def _other_size(source: SourceAddress, there: int, here: int) -> Damaged:
    return Damaged(
        "SOURCE_DAMAGED",
        f"{source.node} has the target with {there} bytes, and the delta map is of one with {here}",
        node=source.node,
    )
