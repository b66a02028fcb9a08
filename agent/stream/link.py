"""A target's connection to one source: frames in and out, and what a failure says of the source.

Every wait is cut in ticks, so that a stop is noticed and progress is told while nothing comes. Time is counted only
while waiting for the source: a slow disk on this side is not the source's silence, nor is this node's own cap.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Final, Self

from agent.stream import frame as frames
from agent.stream.counters import Meter
from agent.stream.frame import Frame, FrameBuffer, Hello, Kind, Welcome
from agent.stream.throttle import Throttle
from resilver.credentials import Credentials, greeted
from resilver.errors import Damaged, Forbidden, Refused, ResilverError, Unauthenticated, Unavailable

TICK_S: Final = 0.25
CONNECT_TIMEOUT_S: Final = 5.0
GATHER_BYTES: Final = 1 << 20

# `tcpi_min_rtt` of struct tcp_info (linux/tcp.h), in microseconds: what queues at either end is not in it.
_RTT_US: Final = struct.Struct("=I")
_RTT_US_AT: Final = 148

# A source that says one of these may serve later; every other reason holds for the whole run.
_PASSING: Final = frozenset({"TOO_MANY_RESYNCS", "INTERNAL", "CANCELLED"})
OF_ITS_DISK: Final = frozenset({"IO_ERROR", "NO_SPACE", "SOURCE_DAMAGED", "READBACK_MISMATCH", "BASE_MISMATCH"})
"""What a source says of its own disk and copy. Said of ours, the same words would cost us the stage."""


@dataclass(frozen=True, slots=True)
class SourceAddress:
    """A node that has the target, and where its block stream listens; with `tls` nobody else is taken for it."""

    node: str
    host: str
    port: int
    tls: Credentials | None = field(default=None, compare=False, repr=False)


class Verdict(Enum):
    """What is to become of a source that failed."""

    AWAY = "away"  # ask again later
    DAMAGED = "damaged"  # ask again, but not for ever
    GONE = "gone"  # not again in this run


class SourceFailed(Exception):
    """A source did not do its part; `error` says why in the words of the error tree.

    It never leaves the receiver, whose loop takes another turn by it.
    """

    def __init__(self, verdict: Verdict, error: ResilverError) -> None:
        super().__init__(error.message)
        self.verdict: Final = verdict
        self.error: Final = error


class Link:
    """One connection; a context manager. `waited` is told of every wait, in seconds, and may raise."""

    def __init__(
        self,
        source: SourceAddress,
        buffer: FrameBuffer,
        meter: Meter,
        *,
        waited: Callable[[float], None],
        silence_timeout_s: float,
        throttle: Throttle | None = None,
    ) -> None:
        self._source = source
        self._buffer = buffer
        self._meter = meter
        self._waited = waited
        self._silence_timeout_s = silence_timeout_s
        self._silent_s = 0.0
        self.paying = False
        """Whether it waits for this node's own cap; its source's silence means nothing meanwhile."""
        buffer.clear()
        self._share = (throttle or Throttle()).share()
        self._socket = self._connected()

    def __enter__(self) -> Self:
        self._share.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()
        self._share.close()

    def greet(self, hello: Hello) -> Welcome:
        """Says who asks, and waits for the answer."""
        self.send(frames.encode_hello(hello))
        while (frame := self.next()) is None or frame.header.kind is Kind.WAIT:
            if frame is None:
                self.wait()
        if frame.header.kind is not Kind.WELCOME:
            raise self.unexpected(frame)
        try:
            return frames.decode_welcome(frame)
        except Damaged as error:
            raise SourceFailed(Verdict.DAMAGED, error) from error

    def send(self, data: bytes) -> None:
        """Sends all of it; what is sent is small enough to fit the socket's buffers."""
        started = time.monotonic()
        try:
            self._socket.settimeout(self._silence_timeout_s)
            self._socket.sendall(data)
            self._socket.settimeout(TICK_S)
        except OSError as error:
            raise self._lost(error) from error
        finally:
            self._waited(time.monotonic() - started)

    def round_trip_s(self) -> float:
        """How long the way to the source and back takes, as the kernel has measured it."""
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT_US.size + _RTT_US_AT)
        return float(_RTT_US.unpack_from(info, _RTT_US_AT)[0]) / 1e6

    def bye(self) -> None:
        """Ends politely; whether the source hears it does not matter."""
        with contextlib.suppress(OSError):
            self._socket.sendall(frames.encode(Kind.BYE))

    def wait(self) -> None:
        """Waits for bytes for one tick; SourceFailed if the connection ended or has been silent for too long."""
        started = time.monotonic()
        count = -1
        try:
            room = self._share.room(self._buffer.space())
            count = self._socket.recv_into(room)
            if count > 0 and self._source.tls is not None:
                count += self._at_hand(room[count:GATHER_BYTES])
        except TimeoutError:
            pass
        except OSError as error:
            raise self._lost(error) from error
        waited = time.monotonic() - started
        if count == 0:
            raise SourceFailed(Verdict.AWAY, self._unreachable("closed the connection"))
        if count > 0:
            self._buffer.filled(count)
            self._meter.came(self._source.node, count)
            self._silent_s = 0.0
        else:
            self._silent_s += waited
        self._waited(waited)
        if count > 0:
            self.paying = True
            self._share.spend(count, lambda: self._waited(0.0))
            self.paying = False
        if self._silent_s >= self._silence_timeout_s:
            raise SourceFailed(Verdict.AWAY, self._silent())

    def _at_hand(self, room: memoryview) -> int:
        """Reads what has come already. TLS gives a record of 16 KiB at a time, and a look at each would cost more."""
        count = 0
        self._socket.settimeout(0)
        try:
            while count < len(room):
                more = self._socket.recv_into(room[count:])
                if not more:
                    break
                count += more
        except OSError:
            pass  # nothing more now, or an end, which the next wait meets
        finally:
            self._socket.settimeout(TICK_S)
        return count

    def next(self) -> Frame | None:
        """The next frame that has come whole; its payload is not looked at yet."""
        try:
            return self._buffer.next()
        except Damaged as error:
            raise SourceFailed(Verdict.DAMAGED, error) from error
        except Refused as error:
            raise SourceFailed(Verdict.GONE, error) from error

    def unexpected(self, frame: Frame) -> SourceFailed:
        """What a frame means that is no answer: an ERROR, a BYE, or nonsense."""
        if frame.header.kind is Kind.BYE:
            return SourceFailed(Verdict.AWAY, self._unreachable("is stopping"))
        if frame.header.kind is not Kind.ERROR:
            error = Damaged("DIGEST_MISMATCH", f"{self._source.node} sent what was not asked for")
            return SourceFailed(Verdict.DAMAGED, error)
        try:
            return _told(self._source.node, frames.decode_error(frame))
        except Damaged as error:
            return SourceFailed(Verdict.DAMAGED, error)

    def _connected(self) -> socket.socket:
        started = time.monotonic()
        try:
            timeout = min(CONNECT_TIMEOUT_S, self._silence_timeout_s)
            made = socket.create_connection((self._source.host, self._source.port), timeout=timeout)
        except (OSError, UnicodeError) as error:
            self._waited(time.monotonic() - started)
            raise self._lost(error) from error
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if size := self._share.buffer_bytes():
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        if self._source.tls is not None:
            made = self._secured(made, self._source.tls, timeout)
        made.settimeout(TICK_S)
        return made

    def _secured(self, made: socket.socket, tls: Credentials, timeout_s: float) -> socket.socket:
        """The connection with TLS around it, to that node and no other."""
        started = time.monotonic()
        secured = made
        try:
            secured = encrypted = tls.dial(made, timeout_s)
            greeted(encrypted, tls.name.cluster, self._source.node)
        except OSError as error:
            secured.close()
            self._waited(time.monotonic() - started)
            raise self._lost(error) from error
        except (Unauthenticated, Forbidden) as error:
            secured.close()
            raise SourceFailed(Verdict.GONE, error) from error
        return secured

    def _lost(self, error: OSError | UnicodeError) -> SourceFailed:
        if isinstance(error, TimeoutError):
            return SourceFailed(Verdict.AWAY, self._silent())
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return SourceFailed(Verdict.AWAY, self._unreachable(f"cannot be reached: {why}"))

    def _silent(self) -> Unavailable:
        where = f"{self._source.node} ({self._source.host} port {self._source.port})"
        return Unavailable("DEADLINE", f"{where} has not answered for {self._silence_timeout_s:g} seconds")

    def _unreachable(self, what: str) -> Unavailable:
        where = f"{self._source.node} ({self._source.host} port {self._source.port})"
        return Unavailable("NODE_UNREACHABLE", f"{where} {what}")


def _told(node: str, error: ResilverError) -> SourceFailed:
    """What an ERROR frame makes of its sender."""
    if error.reason == "DIGEST_MISMATCH":
        return SourceFailed(Verdict.DAMAGED, Damaged(error.reason, f"{node} got damaged frames: {error.message}"))
    if error.reason in _PASSING or isinstance(error, Unavailable):
        return SourceFailed(Verdict.AWAY, error)
    if error.reason in OF_ITS_DISK:
        error = Damaged("SOURCE_DAMAGED", f"{node} cannot read its copy: {error.message}", node=node)
    return SourceFailed(Verdict.GONE, error)
