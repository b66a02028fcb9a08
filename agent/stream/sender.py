"""The source's side of the block stream: a server of blocking sockets, one thread for each connection.

* What a connection may do, and how long for, is in `connection.py`.
* So many runs at once, `runs_max`, however many connections each of them has: what is beyond is told so and closed. So
  is a connection beyond `CONNECTIONS_MAX`, whoever it is of, or beyond `HOST_CONNECTIONS_MAX` of one host: half of all,
  so that one that says nothing leaves room for the others.
* `stop` lets each connection finish the buffer that it is sending, says BYE, and cuts what is left at its deadline; a
  connection that waits at the throttle is cut at once.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import structlog

from agent.stream.connection import Connection, ServedSnapshot, ServedStream
from agent.stream.frame import Hello
from agent.stream.lifesign import WAIT_S
from agent.stream.throttle import Throttle
from resilver.address import Address
from resilver.config import IoPriority
from resilver.credentials import Credentials
from resilver.errors import Exhausted, Invalid

RUNS_MAX: Final = 32
CONNECTIONS_MAX: Final = 256
HOST_CONNECTIONS_MAX: Final = 128
RUN_CONNECTIONS_MAX: Final = 8
IDLE_TIMEOUT_S: Final = 60.0
HELLO_TIMEOUT_S: Final = 10.0
ACCEPT_PAUSE_S: Final = 0.1
BACKLOG: Final = 64

log = structlog.get_logger(__name__)

Authorize = Callable[[Hello], ServedSnapshot | ServedStream]


class BlockServer:
    """Listens from `start` to `stop`; `authorize` is called from many threads."""

    def __init__(
        self,
        listen: Address,
        authorize: Authorize,
        *,
        runs_max: int = RUNS_MAX,
        connections_max: int = CONNECTIONS_MAX,
        host_connections_max: int = HOST_CONNECTIONS_MAX,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        hello_timeout_s: float = HELLO_TIMEOUT_S,
        wait_s: float = WAIT_S,
        throttle: Throttle | None = None,
        tls: Credentials | None = None,
    ) -> None:
        self._listen = listen
        self.tls: Final = tls
        self._authorize = authorize
        self._runs_max = runs_max
        self._connections_max = connections_max
        self._host_connections_max = host_connections_max
        self._idle_timeout_s = idle_timeout_s
        self._hello_timeout_s = hello_timeout_s
        self._wait_s = wait_s
        self.throttle: Final = throttle or Throttle()
        self.io_priority: IoPriority = "normal"
        self._lock = threading.Lock()
        self._runs: Counter[tuple[str, str]] = Counter()
        self._connections: set[Connection] = set()
        self._stopping = threading.Event()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port that is listened on; 0 if it is not started."""
        port = 0 if self._listener is None else self._listener.getsockname()[1]
        assert isinstance(port, int)
        return port

    def resize(self, runs_max: int) -> None:
        """Another bound, for runs that come from now on."""
        self._runs_max = runs_max

    def start(self) -> None:
        """Returns when connections are taken; Invalid("CONFIG_INVALID") if the address cannot be had."""
        assert self._listener is None, "a block server starts once"
        self._listener = _listener(self._listen)
        self._acceptor = threading.Thread(
            target=self._accept, args=(self._listener,), name="stream-accept", daemon=True
        )
        self._acceptor.start()
        threading.Thread(target=self._give_signs, name="stream-wait", daemon=True).start()

    def stop(self, deadline_s: float = 5.0) -> bool:
        """Returns when all connections have ended, at the latest after the deadline; False if a disk held one up."""
        until = time.monotonic() + deadline_s
        self._stopping.set()
        if self._listener is not None and self._acceptor is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() does not
            self._acceptor.join()
            self._listener.close()
        with self._lock:
            left = list(self._connections)
        for connection in left:
            connection.finish()
        for connection in left:
            connection.thread.join(max(0.0, until - deadline_s / 2 - time.monotonic()))
        for connection in left:
            connection.cut()
        for connection in left:
            connection.thread.join(max(0.0, until - time.monotonic()))
        return not any(connection.thread.is_alive() for connection in left)

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                accepted, peer = listener.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                # Out of descriptors or memory, or a client that went before it was taken: it may pass.
                log.warning("stream.accept_failed", error=str(error))
                self._stopping.wait(ACCEPT_PAUSE_S)
                continue
            self._admit(accepted, Address(str(peer[0]), int(peer[1])))

    def _give_signs(self) -> None:
        while not self._stopping.wait(self._wait_s / 4):
            with self._lock:
                connections = list(self._connections)
            for connection in connections:
                connection.life.tell(self._wait_s)

    def _admit(self, accepted: socket.socket, peer: Address) -> None:
        connection = Connection(self, accepted, peer)
        with self._lock:
            message = self._full(peer.host)
            if not message:
                self._connections.add(connection)
        if message:
            log.warning("stream.too_many_connections", peer=str(peer), why=message)
            if self.tls is None:
                connection.refuse(Exhausted("TOO_MANY_RESYNCS", message), timeout_s=0.0)
            accepted.close()
            return
        try:
            connection.thread.start()
        except RuntimeError as error:  # no thread can be had
            log.warning("stream.accept_failed", error=str(error))
            self.ended(connection)
            accepted.close()

    def _full(self, host: str) -> str:
        """Why no more connections of a host are taken; empty if one is. The lock is held."""
        if len(self._connections) >= self._connections_max:
            return f"this node serves {self._connections_max} connections already"
        if sum(one.host == host for one in self._connections) >= self._host_connections_max:
            return f"this node serves {self._host_connections_max} connections of {host} already"
        return ""

    def ended(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    @contextlib.contextmanager
    def serving(self, hello: Hello) -> Iterator[None]:
        """Around a connection's service: Exhausted("TOO_MANY_RESYNCS") if its run has no place, or too many of them."""
        run = (hello.resync_id, hello.target_node)
        with self._lock:
            if run not in self._runs and len(self._runs) >= self._runs_max:
                raise Exhausted("TOO_MANY_RESYNCS", f"this node serves {len(self._runs)} resyncs already")
            if self._runs[run] >= RUN_CONNECTIONS_MAX:
                raise Exhausted("TOO_MANY_RESYNCS", f"this resync has {RUN_CONNECTIONS_MAX} connections here already")
            self._runs[run] += 1
        try:
            yield
        finally:
            with self._lock:
                self._runs[run] -= 1
                if not self._runs[run]:
                    del self._runs[run]

    def authorize(self, hello: Hello) -> ServedSnapshot | ServedStream:
        return self._authorize(hello)

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    @property
    def idle_timeout_s(self) -> float:
        return self._idle_timeout_s

    @property
    def hello_timeout_s(self) -> float:
        return self._hello_timeout_s


def _listener(listen: Address) -> socket.socket:
    """A listening socket; on every interface it takes IPv4 and IPv6 where the machine has both."""
    try:
        if listen.host in {"", "::"} and socket.has_dualstack_ipv6():
            return socket.create_server(
                ("::", listen.port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True
            )
        found = socket.getaddrinfo(listen.host or None, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _type, _proto, _name, address = found[0]
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        why = f"{error.strerror or error}; stop what uses it, or choose another address"
        raise Invalid(
            "CONFIG_INVALID", f"stream_listen: cannot listen on {listen}: {why}", field="stream_listen"
        ) from error
