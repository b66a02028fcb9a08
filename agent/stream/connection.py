"""One client of the block stream, from its HELLO to its end, on a blocking socket in a thread of its own.

The rules:

* Where there are certificates a connection begins with a handshake, as long as a HELLO may take, and the other must be
  a node of this cluster; its HELLO must be for that very node.
* A connection begins with a HELLO within `hello_timeout_s`; the server's `authorize` decides on it, and its refusal is
  told as an ERROR frame. Only then is anything read from a disk or any buffer of size made. What a HELLO names is
  checked before: ids and names become paths.
* Requests are answered in their order (`group.py`), many frames to one system call; compressed where that is seen to be
  faster (`packing.py`).
* Whoever sends nothing for `idle_timeout_s`, takes so long over one request or reads nothing for that time, is dropped.
  So is whoever sends a damaged frame: that ends its own connection, with an ERROR frame if it still listens, and no
  other.
* What is sent is paid for at the node's `throttle`, a piece at a time.
* Whoever wishes for a file system's own stream requests nothing: `pump.py` sends it from its beginning to its end.
* While the disk is read, WAIT says that this end lives (`lifesign.py`): whoever is silent is left soon.
"""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import ssl
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from agent.backends.base import SendStream, SnapshotReader
from agent.disk.ioprio import set_io_priority
from agent.stream import frame as frames
from agent.stream.announcer import Announcer
from agent.stream.frame import (
    CONTROL_BYTES_MAX,
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    Frame,
    FrameBuffer,
    Hello,
    Kind,
    Range,
)
from agent.stream.group import answer_next
from agent.stream.lifesign import LifeSign
from agent.stream.packing import Packer
from agent.stream.pump import Pump, check_wish
from resilver.access import Caller
from resilver.address import Address
from resilver.credentials import Credentials, greeted
from resilver.errors import Damaged, Exhausted, Invalid, ResilverError, Unavailable
from resilver.fields import check_id, check_name
from resilver.names import Name

if TYPE_CHECKING:
    from agent.stream.sender import BlockServer

ERROR_TIMEOUT_S: Final = 2.0
PENDING_RANGES_MAX: Final = 4 * frames.REQUEST_RANGES_MAX
SEND_BUFFER_BYTES: Final = 2 * (HEADER_BYTES + PAYLOAD_BYTES_MAX)

log = structlog.get_logger(__name__)


def _nothing(_count: int) -> None:
    return None


def _go_on() -> None:
    return None


@dataclass(frozen=True, slots=True)
class ServedSnapshot:
    """What an authorized connection reads from; the server closes the reader.

    `on_sent` is told the bytes of each buffer after it was sent (it renews a ticket, counts); a ResilverError from
    it ends the connection with its reason.
    """

    reader: SnapshotReader
    on_sent: Callable[[int], None] = _nothing


@dataclass(frozen=True, slots=True)
class ServedStream:
    """A file system's own stream for an authorized connection, which wished for one; the server closes it."""

    stream: SendStream
    on_sent: Callable[[int], None] = _nothing


class _Gone(Exception):
    """The client has ended the connection, or the server is stopping: nothing is wrong."""


class _Closed(Exception):
    """There is nobody to say a word to; why is in the log."""


class Connection:
    """One client, from its HELLO to its end."""

    def __init__(self, server: BlockServer, accepted: socket.socket, peer: Address) -> None:
        self._server = server
        self._socket = accepted
        self._peer = peer
        self._buffer = FrameBuffer(CONTROL_BYTES_MAX, 2 * (HEADER_BYTES + CONTROL_BYTES_MAX))
        self._pending: deque[Range] = deque()
        self._readable = select.poll()
        self._readable.register(accepted, select.POLLIN)
        self._share = server.throttle.share()
        self._party: Name | None = None
        self.life: Final = LifeSign(accepted)
        self.thread: Final = threading.Thread(target=self._run, name=f"stream-{peer}", daemon=True)

    @property
    def host(self) -> str:
        return self._peer.host

    def finish(self) -> None:
        """Wakes a connection that waits for requests; one that is sending finishes its buffer first."""
        with contextlib.suppress(OSError):
            _shut(self._socket, socket.SHUT_RD)

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            _shut(self._socket, socket.SHUT_RDWR)

    def refuse(self, error: ResilverError, *, timeout_s: float = ERROR_TIMEOUT_S) -> None:
        """Says why, if the client still listens, and closes."""
        self._last_word(frames.encode_error(error), timeout_s)

    def _run(self) -> None:
        try:
            self._serve()
        except _Gone:
            self._last_word(frames.encode(Kind.BYE), ERROR_TIMEOUT_S)
        except _Closed:
            pass
        except ResilverError as error:
            log.warning("stream.connection_refused", peer=str(self._peer), reason=error.reason, error=error.message)
            self.refuse(error)
        except OSError as error:
            log.info("stream.connection_lost", peer=str(self._peer), error=str(error))
        except Exception:
            log.exception("stream.connection_failed", peer=str(self._peer))
            self.refuse(ResilverError("INTERNAL", "the source has met a fault of its own; its log says more"))
        finally:
            self._socket.close()
            self._share.close()
            self._server.ended(self)

    def _serve(self) -> None:
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._server.tls is not None:
            self._party = self._secured(self._server.tls)
        hello = self._hello()
        with self._server.serving(hello):
            self._serve_run(hello)

    def _secured(self, tls: Credentials) -> Name:
        """Who the other is, once there is TLS around the connection."""
        try:
            secured = tls.accept(self._socket, self._server.hello_timeout_s)
            # The descriptor is the same, so that it can be polled and cut as before.
            self._socket = secured
            self.life.speaks_by(secured)
            return greeted(secured, tls.name.cluster)
        except OSError as error:
            log.warning("stream.handshake_failed", peer=str(self._peer), error=str(error))
            raise _Closed from error

    def _serve_run(self, hello: Hello) -> None:
        """From here on the thread is about nothing else; what it starts has its I/O priority."""
        if self._server.io_priority != "normal":
            set_io_priority(self._server.io_priority)
        with self.life.at_disk():
            served = self._server.authorize(hello)
        # From here on, whatever fails: a reader holds a file open, and a stream a process.
        with contextlib.closing(served.stream if isinstance(served, ServedStream) else served.reader):
            self._serve_on(served, hello)

    def _serve_on(self, served: ServedSnapshot | ServedStream, hello: Hello) -> None:
        self._share.open()
        if size := self._share.buffer_bytes():
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        log.info("stream.connection_opened", peer=str(self._peer))
        if isinstance(served, ServedStream):
            self._stream(served, hello)
            return
        with contextlib.closing(Announcer(served.reader, str(self._peer))) as announcer:
            self._send(frames.encode_welcome(frames.Welcome(served.reader.size_bytes, packed_requests=True)))
            self._answer(served, announcer)

    def _stream(self, served: ServedStream, hello: Hello) -> None:
        """Sends a stream from where the client wants it; the client says nothing more."""
        assert hello.stream is not None, "nobody is given a stream who did not wish for one"

        def send(data: bytes | memoryview) -> None:
            if self._server.stopping or self._left():
                raise _Gone
            self._send(data)
            served.on_sent(len(data))

        with contextlib.closing(Pump(served.stream, str(self._peer))) as pump:
            self._send(frames.encode_welcome(frames.Welcome(0, served.stream.format)))
            pump.run(hello.stream, send, lambda: self._server.stopping or self._left())
        raise _Gone

    def _left(self) -> bool:
        """Whether the client has closed, or said BYE: it says nothing else while it is sent a stream."""
        return self._has_more()

    def _hello(self) -> Hello:
        frame = self._frame(self._server.hello_timeout_s)
        if frame.header.kind is not Kind.HELLO:
            raise Damaged("DIGEST_MISMATCH", "a connection begins with a HELLO")
        hello = frames.decode_hello(frame)
        check_id(hello.ticket, "ticket")
        check_id(hello.resync_id, "resync_id")
        check_name(hello.volume, "volume")
        check_id(hello.target, "target")
        check_name(hello.target_node, "target_node")
        Caller(self._party, str(self._peer)).check_ticket(hello.target_node)
        if hello.stream is not None:
            check_wish(hello.stream)
        return hello

    def _answer(self, served: ServedSnapshot, announcer: Announcer) -> None:
        """Takes requests and sends answers, until the client says BYE or goes."""
        view, packer = memoryview(bytearray(SEND_BUFFER_BYTES)), Packer(time.monotonic())
        while not self._server.stopping:
            if not self._pending:
                self._take(self._frame(self._server.idle_timeout_s), served.reader.size_bytes, announcer)
            while (frame := self._frame_at_hand()) is not None:
                self._take(frame, served.reader.size_bytes, announcer)
            with self.life.at_disk():
                size, raw_bytes = self._fill(view, served.reader, announcer, packer)
            self._send(view[:size])
            packer.chooser.sent(raw_bytes, size, time.monotonic())
            served.on_sent(size)
        raise _Gone

    def _take(self, frame: Frame, size_bytes: int, announcer: Announcer) -> None:
        """Puts the ranges of one REQUEST behind those that are pending."""
        if frame.header.kind is Kind.BYE:
            raise _Gone
        if frame.header.kind is not Kind.REQUEST:
            raise Damaged("DIGEST_MISMATCH", f"a {frame.header.kind.name} is no request")
        ranges = frames.decode_request(frame)
        if len(self._pending) + len(ranges) > PENDING_RANGES_MAX:
            raise Exhausted("TOO_LARGE", f"more than {PENDING_RANGES_MAX} ranges are asked for at once")
        if any(offset + length > size_bytes for offset, length in ranges):
            raise Invalid("INVALID_FIELD", f"a range beyond the end of the snapshot, at {size_bytes}", field="ranges")
        self._pending.extend(ranges)
        announcer.add(ranges)

    def _fill(self, view: memoryview, reader: SnapshotReader, announcer: Announcer, packer: Packer) -> tuple[int, int]:
        """Answers as many ranges as the buffer holds; the bytes to send, and what they are as they read."""
        at = count = raw_bytes = 0
        while self._pending:
            answer = answer_next(self._pending, reader, view, at, packer.pack)
            if not answer.size:
                break
            at += answer.size
            count += answer.count
            raw_bytes += answer.raw_bytes
        announcer.sent(count)
        return at, raw_bytes

    def _frame(self, timeout_s: float) -> Frame:
        """The next frame, whole within the timeout; DEADLINE if it is not, _Gone if the client is.

        Whoever has yet to read what was sent, and does read it, is not waited for.
        """
        until, unread = time.monotonic() + timeout_s, self._unread_bytes()
        while (frame := self._buffer.next()) is None:
            left = until - time.monotonic()
            if left <= 0:
                before, unread = unread, self._unread_bytes()
                if unread < before:
                    until += timeout_s
                    continue
                raise Unavailable("DEADLINE", f"nothing was asked for in {timeout_s:g} seconds")
            self._read_some(left)
        return frame

    def _frame_at_hand(self) -> Frame | None:
        """The next frame if all of it is here already."""
        while (frame := self._buffer.next()) is None:
            if not self._has_more():
                return None
            if not self._read_some(self._server.idle_timeout_s):
                raise Unavailable("DEADLINE", "half a record of TLS came, and nothing after it")
        return frame

    def _unread_bytes(self) -> int:
        """What was sent and has no room yet at the client."""
        answer = fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(answer, sys.byteorder)

    def _has_more(self) -> bool:
        held = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0
        return held or bool(self._readable.poll(0))

    def _read_some(self, timeout_s: float) -> bool:
        """Whether anything came in time."""
        self._socket.settimeout(timeout_s)
        try:
            count = self._socket.recv_into(self._buffer.space())
        except TimeoutError:
            return False
        if count == 0:
            if not self._server.stopping:
                self._buffer.finish()
            raise _Gone
        self._buffer.filled(count)
        return True

    def _send(self, data: bytes | memoryview) -> None:
        """Sends all of it, as fast as the client and the throttle let it go."""
        self._socket.settimeout(self._server.idle_timeout_s)
        left = memoryview(data)
        while left:
            count = self._socket.send(self._share.room(left))
            left = left[count:]
            self._share.spend(count, self._cut_if_stopping if left else _go_on)

    def _cut_if_stopping(self) -> None:
        """Within a frame nothing polite can be said."""
        if self._server.stopping:
            raise ConnectionAbortedError("the server is stopping")

    def _last_word(self, data: bytes, timeout_s: float) -> None:
        """Sends a frame to somebody who may not listen, and closes so that it can still be read."""
        with contextlib.suppress(OSError):
            self._socket.settimeout(timeout_s)
            self._socket.sendall(data)
            _shut(self._socket, socket.SHUT_WR)
            # Closing with unread bytes resets the connection, and the client would lose the frame with it.
            until = time.monotonic() + timeout_s
            while time.monotonic() < until and self._socket.recv(CONTROL_BYTES_MAX):
                pass
        self._socket.close()


def _shut(connection: socket.socket, how: int) -> None:
    """Of the connection itself: TLS would forget that it is there, and what is sent after would go as plain text."""
    socket.socket.shutdown(connection, how)
