"""The network of these tests does to its machines what it says."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import pytest

from tests.partitions.net import Network, Weather, needs_network, network

pytestmark = needs_network

PORT = 7000
DATAGRAMS = 1000
SILENCE_S = 0.7
_SO_RCVBUFFORCE = 33


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    with network(("a", "b", "c")) as made:
        yield made


def reaches(net: Network, one: str, other: str, timeout_s: float = SILENCE_S) -> bool:
    """Whether a connection comes about; it waits, because nobody says that it cannot."""
    address = (net.addresses[other], PORT)
    with net.machines[other].within.submit(socket.create_server, address).result():
        try:
            net.machines[one].within.submit(socket.create_connection, address, timeout_s).result().close()
        except TimeoutError:
            return False
    return True


def test_a_cut_is_between_two_and_hides_itself(net: Network) -> None:
    assert reaches(net, "a", "b")
    net.cut(["a"], ["b"])
    assert not reaches(net, "a", "b")
    assert not reaches(net, "b", "a")
    assert reaches(net, "a", "c")
    net.heal()
    assert reaches(net, "a", "b", 10.0)


def test_a_link_goes_down_and_up(net: Network) -> None:
    net.unplug("a")
    assert not reaches(net, "b", "a")
    assert reaches(net, "b", "c")
    net.plug("a")
    assert reaches(net, "b", "a", 10.0)


def test_weather_is_what_it_says(net: Network) -> None:
    """Datagrams are lost, late, and overtake each other; without it none of that."""
    fair = _journey(net)
    assert [number for number, _ in fair] == list(range(DATAGRAMS))
    weather = Weather()
    net.rain(weather)
    bad = _journey(net)
    net.heal()
    assert 0.2 * weather.loss < 1 - len(bad) / DATAGRAMS < 4 * weather.loss
    assert [number for number, _ in bad] != sorted(number for number, _ in bad)
    # Three of four do not overtake, and are late by what the delay is at least; a busy machine makes it more.
    late_s = sorted(late_s for _, late_s in bad)
    assert late_s[len(bad) // 2] * 1000 >= weather.delay_ms - weather.jitter_ms
    assert reaches(net, "a", "b", 10.0)


def _journey(net: Network) -> list[tuple[int, float]]:
    """The numbers of the datagrams that came from `a` to `b`, in their order, and how long each was under way."""
    made = [net.machines[name].within.submit(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) for name in ("a", "b")]
    came: list[tuple[int, float]] = []
    with made[0].result() as sender, made[1].result() as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 4 << 20)
        receiver.bind((net.addresses["b"], PORT))
        receiver.settimeout(1.0)
        for number in range(DATAGRAMS):
            sender.sendto(struct.pack("<Id", number, time.monotonic()), (net.addresses["b"], PORT))
            if number % 20 == 0:
                time.sleep(0.002)  # a pace that no queue is too short for
        while True:
            try:
                number, sent_at = struct.unpack("<Id", receiver.recv(100))
            except TimeoutError:
                return came
            came.append((number, time.monotonic() - sent_at))
