"""The block stream with TLS around it: what it moves, what it says while it waits, and how it ends."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from agent.delta import DeltaMap, DeltaRange
from agent.stream import frame as frames
from agent.stream.frame import Kind
from agent.stream.link import SourceAddress
from resilver.credentials import Credentials
from resilver.names import Role
from tests.agent.stream.support import (
    HELLO,
    MIB,
    FileReader,
    FileStage,
    Transfer,
    random_file,
    same,
    serving,
)
from tests.agent.stream.test_server import Client
from tests.certificates import Authority

SIZE = 24 * MIB


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("blocks") / "certs")


@pytest.fixture
def a(authority: Authority) -> Credentials:
    return Credentials(authority.issue(Role.NODE, "a"))


@pytest.fixture
def target(authority: Authority) -> Credentials:
    return Credentials(authority.issue(Role.NODE, HELLO.target_node))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return random_file(tmp_path / "image", SIZE)


class Secured(Client):
    """A client that says what it is told to say, with TLS around it."""

    def __init__(self, port: int, tls: Credentials) -> None:
        super().__init__(port)
        self.socket = tls.dial(self.socket, 20)
        self.socket.do_handshake()


def test_large_and_small_ranges_arrive_as_they_were_sent(tmp_path, image, a, target) -> None:
    small = [DeltaRange(number * 16384, 4096) for number in range(512)]
    delta = DeltaMap.of(SIZE, [*small, DeltaRange(8 * MIB, 16 * MIB)])
    stage = FileStage(tmp_path / "stage", SIZE)
    with serving(image, tls=a) as server:
        received = Transfer(stage, delta).run(SourceAddress("a", "127.0.0.1", server.port, target))
    stage.close()
    assert received.counters.resent_bytes == 0
    assert received.counters.done_bytes == delta.data_bytes
    assert not received.problems
    assert same(image, tmp_path / "stage", delta)


def test_a_source_says_that_it_lives_while_its_disk_is_slow_and_stays_in_step(image, a, target) -> None:
    go_on = threading.Event()

    class Slow(FileReader):
        def read_into(self, offset: int, view: memoryview) -> None:
            if offset >= 2 * MIB:
                assert go_on.wait(20)
            super().read_into(offset, view)

    wanted = [(number * MIB, MIB) for number in range(4)]
    with serving(image, Slow, tls=a, wait_s=0.05) as server, Secured(server.port, target) as client:
        client.say(frames.encode_hello(HELLO)).say(frames.encode_request(wanted))
        came, waits = {}, 0
        while len(came) < len(wanted):
            frame = client.hear()
            waits += frame.header.kind is Kind.WAIT
            if frame.header.kind is Kind.WAIT and waits == 3:
                go_on.set()
            if frame.header.kind is Kind.DATA:
                came[frame.header.offset] = bytes(frame.payload())
    data = image.read_bytes()
    assert waits >= 3
    assert came == {offset: data[offset : offset + length] for offset, length in wanted}


def test_stopping_says_bye_under_tls(image, a, target) -> None:
    with serving(image, tls=a) as server, Secured(server.port, target) as client:
        client.say(frames.encode_hello(HELLO))
        assert client.hear().header.kind is Kind.WELCOME
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert client.hear().header.kind is Kind.BYE
        assert client.hear() is None
        client.socket.close()
        stopping.join(20)


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00\x01", os.urandom(600)], ids=["nothing", "half", "noise"])
def test_a_handshake_that_is_none_ends_by_itself(image, a, target, said: bytes) -> None:
    with (
        serving(image, tls=a, hello_timeout_s=0.5) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as stranger,
    ):
        stranger.sendall(said)
        heard = b""
        try:
            while data := stranger.recv(4096):
                heard += data
        except ConnectionResetError:
            pass
        assert len(heard) < 16, "an alert of TLS at most"
        with Secured(server.port, target) as client:
            assert client.say(frames.encode_hello(HELLO)).hear().header.kind is Kind.WELCOME


def test_stopping_waits_for_nobody_who_has_not_said_who_it_is(image, a) -> None:
    with serving(image, tls=a) as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as stranger:
        stranger.sendall(b"\x16\x03\x01")
        assert server.stop(10.0)
