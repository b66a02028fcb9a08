"""The target's side of the block stream: fetches what a stage lacks, from whoever has it.

The rules:

* The journal says what is done; everything else of the map is fetched. Zero ranges are made here and ask nobody.
* A chunk is written only after its digest has been checked, and journaled only after a sync (`flusher.py`).
* One source at a time, the first one first; one that works is kept. A source that is away (closed, silent, stopping)
  is passed over and asked again in the next round, after a pause that grows from round to round. One that says that
  it has not what is wanted, or whose frames came damaged three times, is not asked again in this run.
* Whatever happens, the run ends: with all of it, with the reason why no source is left, or after `idle_timeout_s` of
  waiting without one good frame. What was received by then is journaled, so that the next run goes on there.
* An error of the stage's own disk ends the run as it is; after a failed sync nothing more is journaled.

In memory: one buffer of 4 MiB for frames, a window of requests, one mark's records, one byte for each chunk.
"""

from __future__ import annotations

import contextlib
import random
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
from agent.stream.work import Chunk, Stopped, Work
from resilver.errors import Damaged, ResilverError, Unavailable, error_for

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
DAMAGED_FRAMES_MAX: Final = 3
BACKOFF_FIRST_S: Final = 0.2
BACKOFF_MAX_S: Final = 5.0
PROGRESS_S: Final = 0.25
IDLE_TIMEOUT_S: Final = 600.0
SILENCE_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class SourceProblem:
    """Why a source was left, for good or for now."""

    node: str
    reason: str
    message: str


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
    return Received(run.meter.read(), tuple(run.problems.values()))


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
    ) -> None:
        self.stage = stage
        self.capacity_bytes = journal.delta.capacity_bytes
        self.hello = hello
        self.on_progress = on_progress
        self.stop = stop
        self.idle_timeout_s = idle_timeout_s
        self.silence_timeout_s = silence_timeout_s
        self.alive = list(sources)
        self.work = Work(journal.table, journal.done)
        self.flusher = Flusher(stage, journal)
        self.buffer = FrameBuffer(buffer_bytes=BUFFER_BYTES)
        self.meter = Meter(
            [source.node for source in sources],
            done_bytes=journal.done_bytes,
            total_bytes=journal.delta.data_bytes,
            clock=time.monotonic,
        )
        self.problems: dict[str, SourceProblem] = {}
        self.damaged: dict[SourceAddress, int] = dict.fromkeys(sources, 0)
        self.good_frames = 0
        self.idle_s = 0.0
        self.told = 0.0

    def make_zeros(self) -> None:
        for chunk in self.work.zero_chunks():
            self.stage.zero(chunk.offset, chunk.length)
            self.flusher.add(chunk.number, NO_DIGEST, 0)
            self.tick()

    def fetch_all(self) -> None:
        """Goes from source to source until nothing is left to fetch."""
        at = fruitless = 0
        while self.work.left:
            if not self.alive:
                raise self.no_source("no source is left")
            if self.idle_s >= self.idle_timeout_s:
                raise self.no_source(f"no source has sent anything for {self.idle_timeout_s:g} seconds")
            at %= len(self.alive)
            before = self.good_frames
            try:
                self.fetch(self.alive[at])
            except SourceFailed as failed:
                self.leave(self.alive[at], failed)
                if failed.verdict is Verdict.AWAY:
                    at += 1
                    fruitless = 1 if self.good_frames > before else fruitless + 1
                    if fruitless % len(self.alive) == 0:
                        self.pause(fruitless // len(self.alive))

    def leave(self, source: SourceAddress, failed: SourceFailed) -> None:
        """Notes why a source failed, and whether it may be asked again."""
        error = failed.error
        gone = failed.verdict is Verdict.GONE
        if failed.verdict is Verdict.DAMAGED:
            self.damaged[source] += 1
            gone = self.damaged[source] >= DAMAGED_FRAMES_MAX
            if gone:
                error = Damaged(
                    "SOURCE_DAMAGED", f"{DAMAGED_FRAMES_MAX} frames of {source.node} came damaged", node=source.node
                )
        self.problems[source.node] = SourceProblem(source.node, error.reason, error.message)
        if gone:
            self.alive.remove(source)

    def pause(self, rounds: int) -> None:
        """Waits before another round; longer each time, and not in step with others that wait."""
        longest = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(rounds - 1, 16))
        jittered = longest * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
        started = time.monotonic()
        self.stop.wait(min(jittered, max(0.0, self.idle_timeout_s - self.idle_s)))
        self.idle_s += time.monotonic() - started
        self.tick()

    def fetch(self, source: SourceAddress) -> None:
        """Takes work and has it done by one source, until nothing is left or the source fails."""
        in_flight: deque[Chunk] = deque()
        with Link(
            source, self.buffer, self.meter, waited=self.waited, silence_timeout_s=self.silence_timeout_s
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
        if kind not in {Kind.DATA, Kind.ZERO} or not in_flight or in_flight[0][1:] != (offset, length):
            raise link.unexpected(frame)
        chunk = in_flight[0]
        try:
            body = frame.payload()
        except Damaged as error:
            self.damaged_payload(source, chunk, error)
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
        self.idle_s = 0.0

    def damaged_payload(self, source: SourceAddress, chunk: Chunk, error: Damaged) -> None:
        """The stream is still in step: the same connection is asked again, unless it has been so too often."""
        if self.damaged[source] + 1 >= DAMAGED_FRAMES_MAX:
            raise SourceFailed(Verdict.DAMAGED, error)
        self.damaged[source] += 1
        self.meter.resent(chunk.length)
        self.problems[source.node] = SourceProblem(source.node, error.reason, error.message)

    def waited(self, seconds: float) -> None:
        """After every wait for a source; ends the wait for one that trickles."""
        self.idle_s += seconds
        self.tick()
        if self.idle_s >= self.idle_timeout_s:
            raise SourceFailed(Verdict.AWAY, Unavailable("DEADLINE", "no whole frame came for too long"))

    def tick(self) -> None:
        """Tells progress now and then, and notices a stop."""
        now = time.monotonic()
        if now - self.told >= PROGRESS_S:
            self.told = now
            self.on_progress(self.meter.read())
        if self.stop.is_set():
            raise Stopped

    def no_source(self, why: str) -> ResilverError:
        """The error that ends a run without sources: the one reason they all gave, or the gravest word for many."""
        told = list(self.problems.values())
        text = "; ".join(f"{problem.node}: {problem.message}" for problem in told) or "none was given"
        reasons = {problem.reason for problem in told}
        reason = "NO_SOURCE"
        if not self.alive and len(reasons) == 1:
            reason = reasons.pop()
        elif not self.alive and "SOURCE_DAMAGED" in reasons:
            reason = "SOURCE_DAMAGED"
        return error_for(reason, f"{why}: {text}", sources=",".join(problem.node for problem in told))


def _other_size(source: SourceAddress, there: int, here: int) -> Damaged:
    return Damaged(
        "SOURCE_DAMAGED",
        f"{source.node} has the target with {there} bytes, and the delta map is of one with {here}",
        node=source.node,
    )
