"""Who takes another's place on a port is not talked to: no call and no byte reaches it."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from agent.stream.counters import Meter
from agent.stream.frame import FrameBuffer
from agent.stream.link import Link, SourceAddress, SourceFailed, Verdict
from resilver import rpc
from resilver.ca import Signed
from resilver.config import Tls
from resilver.credentials import Credentials
from resilver.names import Role
from tests.certificates import CLIENT, Authority, brought_along, forged

COORDINATOR_DNS = "coordinator.test.resilver.internal"
NODE_A_DNS = "a.node.test.resilver.internal"


class Poser:
    """A place in which somebody else's certificates can be made."""

    def __init__(self, directory: Path) -> None:
        self.byo, self.stranger = brought_along(), brought_along()
        self.authority = Authority(directory / "certs", also=self.byo)
        self.trusted = (directory / "certs" / "ca.crt").read_bytes()
        self._directory = directory
        self._count = 0

    def forge(self, uri: str, *dns: str, by: Signed | None = None, alone: bool = False, **more: object) -> Tls:
        self._count += 1
        signer = None if alone else by or self.byo
        place = self._directory / "forged" / str(self._count)
        return forged(place, uri, by=signer, trusted=self.trusted, dns=dns, **more)


@pytest.fixture(scope="module")
def poser(tmp_path_factory: pytest.TempPathFactory) -> Poser:
    return Poser(tmp_path_factory.mktemp("posing"))


class Anything(grpc.GenericRpcHandler):
    """Answers every call, and remembers it."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def answer(_request: bytes, _context: grpc.ServicerContext) -> bytes:
            self.called.append(details.method)
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@contextlib.contextmanager
def listening(files: Tls | None) -> Iterator[tuple[int, Anything]]:
    """A server of gRPC that shows these and takes everybody; in plaintext without any."""
    handler = Anything()
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[handler])
    if files is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = [(Path(files.key).read_bytes(), Path(files.cert).read_bytes())]
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
    server.start()
    try:
        yield port, handler
    finally:
        server.stop(None)


async def reached(files: Tls, port: int, node: str = "") -> bool:
    """Whether a call got through, of whoever has these and dials that node, or a coordinator."""
    async with rpc.make_channel(f"127.0.0.1:{port}", node, tls=Credentials(files)) as channel:
        try:
            await channel.unary_unary("/resilver.v1.Agent/GetAgent")(b"", timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code() is not grpc.StatusCode.UNAVAILABLE
    return True


POSERS: dict[str, Callable[[Poser], Tls | None]] = {
    "a_node": lambda p: p.authority.issue(Role.NODE, "b"),
    "an_operator": lambda p: p.authority.issue(Role.OPERATOR, "anna"),
    "a_node_with_the_hosts_name": lambda p: p.forge("resilver://test/node/b", "localhost"),
    "a_coordinator_of_another_cluster": lambda p: p.forge(
        "resilver://other/coordinator/c1", "coordinator.other.resilver.internal"
    ),
    "a_coordinator_of_a_cluster_below": lambda p: p.forge(
        "resilver://x.test/coordinator/c1", "coordinator.x_2etest.resilver.internal"
    ),
    "a_client_alone": lambda p: p.forge("resilver://test/coordinator/c1", COORDINATOR_DNS, usages=(CLIENT,)),
    "a_stranger": lambda p: p.forge("resilver://test/coordinator/c1", COORDINATOR_DNS, by=p.stranger),
    "one_signed_by_itself": lambda p: p.forge("resilver://test/coordinator/c1", COORDINATOR_DNS, alone=True),
    "plaintext": lambda _p: None,
}


@pytest.mark.parametrize("who", POSERS)
async def test_an_agent_and_the_command_talk_to_a_coordinator_alone(poser: Poser, who: str) -> None:
    with listening(POSERS[who](poser)) as (port, handler):
        for mine in (poser.authority.issue(Role.NODE, "a"), poser.authority.issue(Role.OPERATOR, "anna")):
            assert not await reached(mine, port)
    assert not handler.called


async def test_a_coordinator_talks_to_the_node_that_it_means(poser: Poser) -> None:
    mine = poser.authority.issue(Role.COORDINATOR, "c1")
    with listening(poser.authority.issue(Role.NODE, "b")) as (port, handler):
        assert not await reached(mine, port, "a")
        assert not await reached(mine, port, "B")
        assert not handler.called
        assert await reached(mine, port, "b")
    with listening(poser.authority.issue(Role.COORDINATOR, "a")) as (port, handler):
        assert not await reached(mine, port, "a")
        assert not handler.called
        assert await reached(poser.authority.issue(Role.NODE, "b"), port)


@contextlib.contextmanager
def streaming(files: Tls | None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> Iterator[tuple[int, list[bytes]]]:
    """A server of the block stream that shows these and takes everybody; what it is told, as it comes."""
    heard: list[bytes] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = version
    if files is not None:
        context.load_cert_chain(files.cert, files.key)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            accepted, _ = listener.accept()
            accepted.settimeout(20)
            with accepted if files is None else context.wrap_socket(accepted, server_side=True) as made:
                heard.append(made.recv(65536))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], heard
    finally:
        listener.close()
        thread.join(20)


def linked(poser: Poser, port: int) -> SourceFailed:
    """How a target's connection to node a fails."""
    mine = Credentials(poser.authority.issue(Role.NODE, "b"))
    source = SourceAddress("a", "127.0.0.1", port, mine)
    meter = Meter(["a"], done_bytes=0, total_bytes=0, clock=lambda: 0.0)
    with pytest.raises(SourceFailed) as failed:
        Link(source, FrameBuffer(), meter, waited=lambda _s: None, silence_timeout_s=2.0)
    return failed.value


@pytest.mark.parametrize(
    ("who", "says"),
    {
        "another_node": (lambda p: p.authority.issue(Role.NODE, "c"), "ROLE_NOT_ALLOWED"),
        "a_node_named_a_in_capitals": (lambda p: p.authority.issue(Role.NODE, "A"), "ROLE_NOT_ALLOWED"),
        "a_coordinator": (lambda p: p.authority.issue(Role.COORDINATOR, "a"), "ROLE_NOT_ALLOWED"),
        "another_cluster": (lambda p: p.forge("resilver://other/node/a", NODE_A_DNS), "CLUSTER_MISMATCH"),
        "no_name_but_in_DNS": (lambda p: p.forge("https://a.example/", NODE_A_DNS), "NO_CERTIFICATE"),
        "a_client_alone": (lambda p: p.forge("resilver://test/node/a", usages=(CLIENT,)), "NODE_UNREACHABLE"),
        "a_stranger": (lambda p: p.forge("resilver://test/node/a", by=p.stranger), "NODE_UNREACHABLE"),
        "one_signed_by_itself": (lambda p: p.forge("resilver://test/node/a", alone=True), "NODE_UNREACHABLE"),
    }.items(),
)
def test_a_target_takes_blocks_from_the_source_that_it_means(poser: Poser, who: str, says: tuple) -> None:
    make, reason = says
    with streaming(make(poser)) as (port, heard):
        failed = linked(poser, port)
    assert failed.error.reason == reason
    assert failed.verdict is (Verdict.AWAY if reason == "NODE_UNREACHABLE" else Verdict.GONE)
    assert not any(heard), "nothing was said to it, not even the ticket"


def test_a_target_does_not_go_down_to_what_a_source_offers(poser: Poser) -> None:
    with streaming(poser.authority.issue(Role.NODE, "a"), ssl.TLSVersion.TLSv1_2) as (port, heard):
        assert linked(poser, port).error.reason == "NODE_UNREACHABLE"
    assert not heard
    with streaming(None) as (port, heard):
        assert linked(poser, port).verdict is Verdict.AWAY
    assert len(heard) == 1
    assert heard[0][:2] == b"\x16\x03", "a handshake, and nothing else"


async def test_a_dialler_of_grpc_does_not_go_down_to_what_a_server_offers(poser: Poser) -> None:
    """Also of a process of which this module is not the first that imports gRPC: see resilver/__init__.py."""
    with streaming(poser.authority.issue(Role.COORDINATOR, "c1"), ssl.TLSVersion.TLSv1_2) as (port, heard):
        assert not await reached(poser.authority.issue(Role.NODE, "a"), port)
    assert not heard


@pytest.mark.parametrize("module", ["agent.app", "coordinator.app", "resilver.cli.client"])
def test_every_process_is_told_the_versions_of_tls_before_grpc_is_imported(module: str) -> None:
    seen = (
        "import sys, os, importlib.abc\n"
        "class Look(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'grpc': print(os.environ.get('GRPC_SSL_CIPHER_SUITES'))\n"
        "sys.meta_path.insert(0, Look())\n"
        f"import {module}\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "GRPC_SSL_CIPHER_SUITES"}
    done = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True, env=env, timeout=60)
    assert done.stdout.split() == ["ECDHE-PSK-AES128-CBC-SHA"]
