"""The server against clients that are wrong, slow, silent or too many."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections import deque

import pytest

from agent.stream import frame as frames
from agent.stream.connection import PENDING_RANGES_MAX, ServedSnapshot
from agent.stream.frame import PAYLOAD_BYTES_MAX, FrameBuffer, Kind
from agent.stream.group import pieces
from agent.stream.sender import RUN_CONNECTIONS_MAX, BlockServer
from resilver.address import Address
from resilver.errors import Invalid
from tests.agent.stream.support import HELLO, MIB, FileReader, authorize, random_file, serving, until


@pytest.fixture
def image(tmp_path):
    return random_file(tmp_path / "image", 4 * MIB)


class Client:
    """A client that says what it is told to say."""

    def __init__(self, port, host="127.0.0.1"):
        self.socket = socket.create_connection((host, port), timeout=20)
        self.buffer = FrameBuffer()

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.socket.close()

    def say(self, data):
        self.socket.sendall(data)
        return self

    def hear(self):
        """The next frame, None at the end."""
        while (frame := self.buffer.next()) is None:
            count = self.socket.recv_into(self.buffer.space())
            if count == 0:
                self.buffer.finish()
                return None
            self.buffer.filled(count)
        return frame

    def refusal(self):
        """The reason of an ERROR after which the server closes."""
        frame = self.hear()
        assert frame.header.kind is Kind.ERROR
        error = frames.decode_error(frame)
        assert self.hear() is None
        return error.reason

    def answers(self, wanted):
        """The bytes of each range, from however many frames, which must answer just these in their order."""
        left, bodies = deque(wanted), []
        while left:
            frame, asked, length = self.hear(), [], 0
            assert frame.header.offset == left[0][0]
            while length < frame.header.length:
                asked.append(left.popleft())
                length += asked[-1][1]
            assert length == frame.header.length
            bodies += [bytes(piece.body) for piece in pieces(frame, asked)]
        return bodies

    def greeted(self):
        self.say(frames.encode_hello(HELLO))
        assert frames.decode_welcome(self.hear()) == frames.Welcome(4 * MIB, packed_requests=True)
        return self


def works(port, image):
    """Whether the server still serves."""
    with Client(port) as client:
        client.greeted().say(frames.encode_request([(4096, 100)]))
        return bytes(client.hear().payload()) == image.read_bytes()[4096:4196]


@pytest.mark.parametrize("packed", [False, True])
def test_ranges_are_answered_in_the_order_of_their_requests(image, packed):
    data = image.read_bytes()
    wanted = [(MIB, 17), (0, PAYLOAD_BYTES_MAX), (4 * MIB - 16, 16), (5, 4096), (5, 4096)]
    wanted += [(at * 8192, 4096) for at in range(64)]
    with serving(image) as server, Client(server.port) as client:
        client.greeted().say(frames.encode_request(wanted[:2])).say(frames.encode_request(wanted[2:], packed=packed))
        assert client.answers(wanted) == [data[offset : offset + length] for offset, length in wanted]
        client.say(frames.encode(Kind.BYE))
        assert client.hear().header.kind is Kind.BYE
        assert client.hear() is None


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 4,
        bytes(1000),
        os.urandom(100_000),
        frames.encode(Kind.HELLO, b"{}"),
        frames.encode(Kind.HELLO, b"\xff" * 100),
        frames.encode_request([(0, 4096)]),
        frames.encode(Kind.DATA, bytes(200_000)),
    ],
    ids=["http", "zeros", "random", "empty-hello", "no-json", "request-first", "large"],
)
def test_garbage_ends_its_own_connection_alone(image, garbage):
    with serving(image) as server, Client(server.port) as bystander:
        bystander.greeted()
        with Client(server.port) as client:
            assert client.say(garbage).refusal() == "DIGEST_MISMATCH"
        bystander.say(frames.encode_request([(0, 10)]))
        assert bystander.hear().header.length == 10
        assert works(server.port, image)


def test_a_damaged_request_after_the_hello_ends_the_connection(image):
    request = bytearray(frames.encode_request([(0, 4096)]))
    request[-1] ^= 1
    with serving(image) as server, Client(server.port) as client:
        assert client.greeted().say(bytes(request)).refusal() == "DIGEST_MISMATCH"
        assert works(server.port, image)


def test_half_a_request_and_then_nothing_ends_the_connection(image):
    with serving(image) as server, Client(server.port) as client:
        client.greeted().say(frames.encode_request([(0, 4096)])[:50])
        client.socket.shutdown(socket.SHUT_WR)
        assert client.refusal() == "DIGEST_MISMATCH"


def test_a_ticket_that_is_not_known_is_refused(image):
    with serving(image) as server, Client(server.port) as client:
        wrong = frames.Hello("other", "r", "v", "t", "n")
        assert client.say(frames.encode_hello(wrong)).refusal() == "TICKET_INVALID"


@pytest.mark.parametrize("field", ["ticket", "resync_id", "volume", "target", "target_node"])
@pytest.mark.parametrize("text", ["", "../../etc/passwd", "a\0b", "x" * 1000])
def test_names_that_are_no_names_never_reach_the_tickets(image, field, text):
    asked = []
    server = BlockServer(Address("127.0.0.1", 0), asked.append)
    server.start()
    with Client(server.port) as client:
        hello = dataclasses.replace(HELLO, **{field: text})
        assert client.say(frames.encode_hello(hello)).refusal() == "INVALID_FIELD"
    assert server.stop(5)
    assert not asked


def test_a_range_beyond_the_end_is_refused(image):
    with serving(image) as server, Client(server.port) as client:
        client.greeted().say(frames.encode_request([(4 * MIB - 10, 11)]))
        assert client.refusal() == "INVALID_FIELD"


def test_too_many_ranges_at_once_are_refused(image):
    gate = threading.Event()
    most = [(0, 1)] * frames.REQUEST_RANGES_MAX
    with serving(image, lambda path: FileReader(path, lambda _offset: gate.wait(30))) as server:
        with Client(server.port) as client:
            client.greeted()
            for _ in range(2 * PENDING_RANGES_MAX // len(most) + 1):
                client.say(frames.encode_request(most))
            gate.set()
            reasons = set()
            while (frame := client.hear()) is not None:
                if frame.header.kind is Kind.ERROR:
                    reasons.add(frames.decode_error(frame).reason)
        assert reasons == {"TOO_LARGE"}
        assert works(server.port, image)


def test_a_client_that_says_nothing_is_dropped(image):
    with serving(image, hello_timeout_s=0.3, idle_timeout_s=0.6) as server:
        with Client(server.port) as mute:
            assert mute.refusal() == "DEADLINE"
        with Client(server.port) as idle:
            assert idle.greeted().refusal() == "DEADLINE"


def test_a_client_that_trickles_is_dropped(image):
    with serving(image, hello_timeout_s=0.5) as server, Client(server.port) as client:
        hello = frames.encode_hello(HELLO)
        ended = threading.Event()

        def trickle():
            for byte in hello:
                try:
                    client.say(bytes([byte]))
                except OSError:
                    return
                if ended.wait(0.05):
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        started = time.monotonic()
        assert client.refusal() == "DEADLINE"
        assert time.monotonic() - started < 30
        ended.set()
        thread.join(5)


def test_a_client_that_does_not_read_is_dropped(image):
    closed = threading.Event()

    class Reader(FileReader):
        def close(self):
            super().close()
            closed.set()

    with serving(image, Reader, idle_timeout_s=0.5) as server, Client(server.port) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.greeted().say(frames.encode_request([(0, MIB)] * 64))
        assert closed.wait(15)


def test_more_clients_than_allowed_are_told_so(image):
    with serving(image, connections_max=2) as server:
        with Client(server.port) as first, Client(server.port) as second:
            first.greeted()
            second.greeted()
            with Client(server.port) as third:
                assert third.refusal() == "TOO_MANY_RESYNCS"
        until(lambda: not server._connections)
        assert works(server.port, image)


def _of_run(resync):
    return frames.encode_hello(dataclasses.replace(HELLO, resync_id=resync))


def test_one_host_leaves_room_for_others(image):
    """Whoever says nothing holds a place until its deadline: not all of them are one host's."""
    with serving(image, host_connections_max=2) as server, Client(server.port) as first, Client(server.port):
        first.greeted()
        with Client(server.port) as third:
            assert third.refusal() == "TOO_MANY_RESYNCS"
        with Client(server.port, "127.0.0.1") as again:
            assert again.refusal() == "TOO_MANY_RESYNCS"
        first.say(frames.encode_request([(0, 10)]))
        assert first.hear() is not None


def test_a_run_counts_once_however_many_connections_it_has(image):
    with serving(image, runs_max=2) as server:
        with Client(server.port) as first, Client(server.port) as again, Client(server.port) as other:
            for client, resync in ((first, "r1"), (again, "r1"), (other, "r2")):
                assert client.say(_of_run(resync)).hear().header.kind is Kind.WELCOME
            with Client(server.port) as third:
                assert third.say(_of_run("r3")).refusal() == "TOO_MANY_RESYNCS"
            first.socket.close()
            until(lambda: len(server._connections) == 2)
            with Client(server.port) as third:  # one connection of r1 is left, and holds its place
                assert third.say(_of_run("r3")).refusal() == "TOO_MANY_RESYNCS"
            again.socket.close()
            until(lambda: len(server._runs) == 1)
            with Client(server.port) as third:
                assert third.say(_of_run("r3")).hear().header.kind is Kind.WELCOME
        until(lambda: not server._runs)


def test_a_run_has_not_more_connections_than_it_can_use(image):
    with serving(image) as server, contextlib.ExitStack() as stack:
        for _ in range(RUN_CONNECTIONS_MAX):
            stack.enter_context(Client(server.port)).greeted()
        with Client(server.port) as another:
            assert another.say(frames.encode_hello(HELLO)).refusal() == "TOO_MANY_RESYNCS"


def test_what_was_sent_is_told_and_the_reader_is_closed(image):
    sent, readers = [], []

    def check(_hello):
        readers.append(FileReader(image))
        return ServedSnapshot(readers[-1], sent.append)

    server = BlockServer(Address("127.0.0.1", 0), check)
    server.start()
    with Client(server.port) as client:
        client.greeted().say(frames.encode_request([(0, 1000)]))
        client.hear()
    assert server.stop(5)
    assert sum(sent) == 1000 + frames.HEADER_BYTES
    assert readers[0]._fd == -1


def test_a_fault_of_the_server_is_told_without_its_details(image):
    def broken(_hello):
        raise RuntimeError("secret")

    server = BlockServer(Address("127.0.0.1", 0), broken)
    server.start()
    with Client(server.port) as client:
        frame = client.say(frames.encode_hello(HELLO)).hear()
        error = frames.decode_error(frame)
        assert error.reason == "INTERNAL"
        assert "secret" not in error.message
    assert server.stop(5)


def test_stopping_says_bye_to_those_who_wait(image):
    server = BlockServer(Address("127.0.0.1", 0), authorize(image))
    server.start()
    port = server.port
    with Client(port) as client:
        client.greeted()
        stopped = []
        thread = threading.Thread(target=lambda: stopped.append(server.stop(5)))
        thread.start()
        assert client.hear().header.kind is Kind.BYE
        client.socket.close()
        thread.join(10)
    assert stopped == [True]
    with pytest.raises(ConnectionRefusedError):
        Client(port)


def test_stopping_ends_in_time_though_a_disk_hangs(image):
    reading, gate = threading.Event(), threading.Event()

    def hang(_offset):
        reading.set()
        gate.wait(30)

    server = BlockServer(Address("127.0.0.1", 0), authorize(image, lambda path: FileReader(path, hang)))
    server.start()
    with Client(server.port) as client:
        client.greeted().say(frames.encode_request([(0, 10)]))
        assert reading.wait(5)
        started = time.monotonic()
        assert not server.stop(0.5)
        assert time.monotonic() - started < 30
        gate.set()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_every_interface_means_both_families(image):
    server = BlockServer(Address("::", 0), authorize(image))
    server.start()
    for host in ("127.0.0.1", "::1"):
        with Client(server.port, host) as client:
            client.greeted()
    assert server.stop(5)


def test_a_port_in_use_is_a_fault_of_the_configuration(image):
    with serving(image) as server:
        second = BlockServer(Address("127.0.0.1", server.port), authorize(image))
        with pytest.raises(Invalid) as refused:
            second.start()
    assert refused.value.reason == "CONFIG_INVALID"
    assert "in use" in refused.value.message


def test_many_clients_at_once_each_get_their_own_bytes(image):
    data = image.read_bytes()
    served = []

    def fetch(number):
        with Client(server.port) as client:
            wanted = [((number * 977 + step * 4096) % (3 * MIB), 4096) for step in range(300)]
            client.greeted().say(frames.encode_request(wanted))
            if client.answers(wanted) == [data[offset : offset + length] for offset, length in wanted]:
                served.append(number)

    with serving(image) as server:
        threads = [threading.Thread(target=fetch, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert sorted(served) == list(range(8))
