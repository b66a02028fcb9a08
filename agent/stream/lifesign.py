"""What a source says while its disk is read: WAIT, every few seconds, so that its silence means that it hangs.

The connection's own thread is at the disk then, and another one says it. That one never waits: who has yet to read what
was sent before needs no sign. A disk that does not answer for `DISK_MAX_S` hangs too, and is told of no longer.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from agent.stream import frame as frames
from agent.stream.frame import Kind

WAIT_S: Final = 2.0
DISK_MAX_S: Final = 30.0


class LifeSign:
    """Of one connection; `tell` is called by another thread, again and again."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._mutex: Final = threading.Lock()
        self._disk_since: float | None = None
        self._told_at = 0.0

    def speaks_by(self, secured: socket.socket) -> None:
        """From here on the connection is that one, with TLS around it; said before the first `at_disk`."""
        self._socket = secured

    @contextmanager
    def at_disk(self) -> Iterator[None]:
        """Around what may take long, and leaves the socket alone meanwhile."""
        self._disk_since = time.monotonic()
        try:
            yield
        finally:
            # Whoever tells is done with the socket by then.
            with self._mutex:
                self._disk_since = None

    def tell(self, wait_s: float) -> None:
        """Says WAIT if nothing has been said for that long because of the disk."""
        with self._mutex:
            now, since = time.monotonic(), self._disk_since
            if since is None or now - since > DISK_MAX_S or now - max(since, self._told_at) < wait_s:
                return
            self._told_at, told = now, frames.encode(Kind.WAIT)
            with suppress(OSError, ValueError):  # gone, which the next answer will meet
                # Asked first: TLS that has met a full buffer takes whatever is sent next for what it could not send.
                if not self._has_room():
                    return
                self._socket.settimeout(0)
                if self._socket.send(told) < len(told):
                    # Half a frame would put all that follows out of step.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _has_room(self) -> bool:
        room = select.poll()
        room.register(self._socket, select.POLLOUT)
        return any(event & select.POLLOUT for _, event in room.poll(0))
