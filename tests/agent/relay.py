"""A way to a port that can be held: so that a transfer is in its middle for as long as a test needs it to be."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self

BUFFER_BYTES = 64 << 10


class Relay:
    """Passes what comes back from a port until `hold_after` bytes have gone by; then all wait until `release`."""

    def __init__(self, port: int, hold_after: int) -> None:
        self.held = threading.Event()
        self._released = threading.Event()
        self._port = port
        self._left = hold_after
        self._mutex = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def release(self) -> None:
        self._released.set()

    def hold(self, after: int) -> None:
        """Again, once so many more bytes have gone by."""
        with self._mutex:
            self._left = after
            self.held.clear()
            self._released.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._port), timeout=5)
                    server.settimeout(None)
                except OSError:
                    client.close()
                    continue
                for pair in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(BUFFER_BYTES):
                if counted:
                    self._wait(len(data))
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _wait(self, count: int) -> None:
        with self._mutex:
            self._left -= count
            if self._left > 0:
                return
        self.held.set()
        self._released.wait()
