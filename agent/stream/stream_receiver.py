"""The target's side of a file system's own stream: fetched from one source from its first byte to its last.

The rules:

* A piece is given to the file system only after its digest has been checked, and only in its order.
* The stream of another source is another stream. So the source it was begun with is asked again for a while if it
  goes away, and makes it anew from where it broke off; whoever comes in its place begins at the first byte, and what
  had come is counted as sent again.
* What has come is spooled (`spool.py`) while the spool has room for it: a restarted target feeds its file system from
  there and asks for the rest. What the file system itself can go on from (a resume token) goes before the spool;
  a source that cannot go on from there (the snapshot has another name by now, or it is another pool) begins anew.
* `rounds.py` says whom else to ask, and when the run ends. Errors of this side's own file system end it as they are.

In memory: one buffer of 4 MiB for frames.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from agent.backends.base import StreamOrigin, StreamStage
from agent.stream.counters import Counters, Meter
from agent.stream.frame import (
    Frame,
    FrameBuffer,
    Hello,
    Kind,
    StreamWish,
    decode_end,
    extend_chain,
    zero_digest,
)
from agent.stream.link import Link, SourceAddress, SourceFailed, Verdict
from agent.stream.rounds import IDLE_TIMEOUT_S, SILENCE_TIMEOUT_S, Rounds
from agent.stream.spool import Spool, StreamKey
from agent.stream.throttle import Throttle
from resilver.errors import Damaged, Refused

BUFFER_BYTES: Final = 4 << 20
STAY_S: Final = 60.0
BEGINNINGS_MAX: Final = 8
_TOKEN_REFUSED: Final = frozenset({"TICKET_INVALID", "NOT_SUPPORTED", "SOURCE_DAMAGED"})


def receive_stream(
    stage: StreamStage,
    spool: Spool,
    origin: StreamOrigin,
    sources: Sequence[SourceAddress],
    hello: Hello,
    *,
    formats: Sequence[str],
    on_progress: Callable[[Counters], None],
    stop: threading.Event,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
    silence_timeout_s: float = SILENCE_TIMEOUT_S,
    throttle: Throttle | None = None,
) -> Counters:
    """Brings the stage to the target; returns when the file system has all of it on the disk.

    Stopped if `stop` is set: what came is in the spool. `on_progress` is called from this thread.
    """
    run = _StreamRun(
        stage,
        spool,
        origin,
        sources,
        hello=hello,
        formats=tuple(formats),
        on_progress=on_progress,
        stop=stop,
        idle_timeout_s=idle_timeout_s,
        silence_timeout_s=silence_timeout_s,
        throttle=throttle,
    )
    try:
        run.resume()
        run.fetch_all()
        return run.meter.read()
    finally:
        spool.close()
        on_progress(run.meter.read())


class _StreamRun:
    """One call of `receive_stream`. `key` names the stream that was begun; without one nothing has been fed."""

    def __init__(
        self,
        stage: StreamStage,
        spool: Spool,
        origin: StreamOrigin,
        sources: Sequence[SourceAddress],
        *,
        hello: Hello,
        formats: tuple[str, ...],
        on_progress: Callable[[Counters], None],
        stop: threading.Event,
        idle_timeout_s: float,
        silence_timeout_s: float,
        throttle: Throttle | None,
    ) -> None:
        self.stage = stage
        self.spool = spool
        self.origin = origin
        self.hello = hello
        self.formats = formats
        self.silence_timeout_s = silence_timeout_s
        self.throttle = throttle
        self.buffer = FrameBuffer(buffer_bytes=BUFFER_BYTES)
        self.meter = Meter([source.node for source in sources], done_bytes=0, total_bytes=0, clock=time.monotonic)
        self.rounds = Rounds(sources, self.meter, on_progress=on_progress, stop=stop, idle_timeout_s=idle_timeout_s)
        self.key: StreamKey | None = None
        self.token = ""
        self.position = 0
        self.chain = b""
        self.beginnings = 0
        self.away_since: float | None = None

    def resume(self) -> None:
        """Feeds the file system what an earlier start has left, unless it can go on by itself."""
        self.token = "" if self.stage.complete else self.stage.resume_token()
        if self.token or self.stage.complete or not self.stage.spools:
            self.spool.clear()
            return
        for piece, chain in self.spool.pieces():
            key = self.spool.key
            if self.key is None:
                if key is None or not self.is_still(key):
                    break
                self.stage.start(key.format)
                self.key = key
            self.stage.feed(piece)
            self.position += len(piece)
            self.chain = chain
            self.meter.done(len(piece))
            self.rounds.tick()
        if self.key is None:
            self.spool.clear()

    def is_still(self, key: StreamKey) -> bool:
        """Whether the node of an earlier stream is a source now, and the stream is between the same ends."""
        return (
            any(source.node == key.node for source in self.rounds.sources.alive)
            and key.format in self.formats
            and (self.origin.native_base, self.origin.native_target) == (key.native_base, key.native_target)
        )

    def fetch_all(self) -> None:
        """Goes from source to source until one has sent its stream to the end."""
        at = fruitless = 0
        while not self.stage.complete:
            self.rounds.check()
            alive = self.rounds.sources.alive
            source = self.begun_by() or alive[at % len(alive)]
            before = self.position
            try:
                self.fetch(source)
            except SourceFailed as failed:
                self.rounds.sources.leave(source, failed)
                if failed.verdict is Verdict.AWAY:
                    at += 1
                    fruitless = 1 if self.position > before else fruitless + 1
                    self.rounds.pause(-(-fruitless // max(len(alive), 1)))

    def begun_by(self) -> SourceAddress | None:
        """The source whose stream was begun, while it is worth waiting for."""
        if self.key is None:
            return None
        mine = next((source for source in self.rounds.sources.alive if source.node == self.key.node), None)
        waited_s = 0.0 if self.away_since is None else time.monotonic() - self.away_since
        if mine is None or (waited_s > STAY_S and len(self.rounds.sources.alive) > 1):
            self.forget()
            return None
        return mine

    def forget(self) -> None:
        """Nothing of what has come counts any more."""
        self.meter.resent(self.position)
        self.meter.done(-self.position)
        self.position, self.chain, self.key, self.token, self.away_since = 0, b"", None, "", None
        self.spool.clear()

    def fetch(self, source: SourceAddress) -> None:
        """Takes the stream from one source, until it is whole or the source fails."""
        if self.away_since is None:
            self.away_since = time.monotonic()
        formats = self.formats if self.key is None else (self.key.format,)
        wish = StreamWish(formats, self.position, self.chain.hex(), self.token)
        with Link(
            source,
            self.buffer,
            self.meter,
            waited=self.rounds.waited,
            silence_timeout_s=self.silence_timeout_s,
            throttle=self.throttle,
        ) as link:
            try:
                welcome = link.greet(replace(self.hello, stream=wish))
                self.begin(source, welcome.format)
                while True:
                    while (frame := link.next()) is not None:
                        if self.take_in(frame, link):
                            link.bye()
                            return
                    link.wait()
            except SourceFailed as failed:
                changed = failed.error.reason == "STREAM_CHANGED" and self.key is not None
                if changed or self.is_refused(failed):
                    self.forget()
                    raise SourceFailed(Verdict.DAMAGED, failed.error) from failed
                raise

    def is_refused(self, failed: SourceFailed) -> bool:
        """Whether it may be the token that the source could do nothing with. Without it the source tells the truth."""
        return bool(self.token) and not self.position and failed.error.reason in _TOKEN_REFUSED

    def begin(self, source: SourceAddress, stream_format: str) -> None:
        """The first byte is about to come, or the one after what has come."""
        if self.key is not None:
            return
        if stream_format not in self.formats:
            said = f"{source.node} would send a stream of the format {stream_format!r}, which was not asked for"
            raise SourceFailed(Verdict.GONE, Refused("NOT_SUPPORTED", said))
        self.beginnings += 1
        if self.beginnings > BEGINNINGS_MAX:
            raise Damaged("SOURCE_DAMAGED", f"the stream was begun {BEGINNINGS_MAX} times and never came to its end")
        self.key = StreamKey(source.node, stream_format, self.origin.native_base, self.origin.native_target)
        self.stage.start(stream_format, self.token)
        if not self.token and self.stage.spools:
            self.spool.begin(self.key)

    def take_in(self, frame: Frame, link: Link) -> bool:
        """Feeds one piece; whether the stream is whole."""
        kind, _flags, offset, length, _stored, digest = frame.header
        if kind is Kind.WAIT:
            self.rounds.good()
            return False
        if kind is Kind.END:
            return self.end(frame)
        if kind not in {Kind.DATA, Kind.ZERO} or offset != self.position:
            raise link.unexpected(frame)
        try:
            body = memoryview(bytes(length)) if kind is Kind.ZERO else frame.payload()
        except Damaged as error:
            # What follows is of no use without it: the source is asked again from here.
            self.meter.resent(length)
            raise SourceFailed(Verdict.DAMAGED, error) from error
        self.chain = extend_chain(self.chain, zero_digest(length) if kind is Kind.ZERO else digest)
        self.spool.add(body, self.chain)
        self.stage.feed(body)
        self.position += length
        self.meter.done(length)
        self.rounds.good()
        self.away_since = None
        return False

    def end(self, frame: Frame) -> bool:
        """The source says that it was all; the file system must agree."""
        try:
            told = decode_end(frame)
        except Damaged as error:
            raise SourceFailed(Verdict.DAMAGED, error) from error
        if (told.length, told.chain) != (self.position, self.chain.hex()):
            self.forget()
            raise SourceFailed(Verdict.DAMAGED, Damaged("DIGEST_MISMATCH", "the stream ended where it should not"))
        try:
            self.stage.finish()
        except Damaged:
            # All of it came as it was sent, and was no good: the same again would be no better.
            self.spool.clear()
            raise
        self.spool.clear()
        return True
