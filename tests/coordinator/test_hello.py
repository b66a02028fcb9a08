"""What a stream begins with is checked, and an agent's address is one that others can dial."""

from __future__ import annotations

import pytest

from coordinator.core.cluster import NodeView
from coordinator.core.events import AgentConnected
from coordinator.pace import Pace
from coordinator.reports import peer_host, reached_at, read_hello
from resilver.errors import Invalid
from resilver.v1 import agent_pb2

BOOT = "0b5c9d0e-1111-4222-8333-444455556666"


def hello(boot=BOOT, seq=1, **changes):
    fields = {
        "node": "a",
        "cluster": "demo",
        "store_id": "st1",
        "version": "0.1.0",
        "address": "10.0.0.1:7401",
        "stream_address": "[::]:7402",
        "highest_term": 12,
        "volumes": ["vm1", "db1"],
        "highest_leader_id": "leader1",
    }
    return agent_pb2.ReportRequest(boot=boot, seq=seq, hello=agent_pb2.AgentHello(**{**fields, **changes}))


def test_a_hello_introduces_a_node():
    assert read_hello(hello(), "ipv4:10.0.0.1:5123", "stream1", 7000) == AgentConnected(
        "stream1",
        NodeView("a", BOOT, "10.0.0.1:7401", "10.0.0.1:7402", "0.1.0", ("vm1", "db1"), True, False, 7000),
        "demo",
        "st1",
        12,
        "leader1",
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"boot": ""}, "boot"),
        ({"boot": "../x"}, "boot"),
        ({"node": ""}, "hello.node"),
        ({"node": "a/b"}, "hello.node"),
        ({"cluster": ""}, "hello.cluster"),
        ({"store_id": "\n"}, "hello.store_id"),
        ({"version": "v" * 65}, "hello.version"),
        ({"address": ""}, "hello.address"),
        ({"address": "10.0.0.1"}, "hello.address"),
        ({"address": "10.0.0.1:0"}, "hello.address"),
        ({"stream_address": "10.0.0.1:70000"}, "hello.stream_address"),
        ({"stream_address": "x" * 400 + ":1"}, "hello.stream_address"),
        ({"volumes": ["vm1", ".."]}, "hello.volumes[1]"),
        ({"volumes": [f"v{number}" for number in range(10_001)]}, "hello.volumes"),
        ({"highest_term": 2**63}, "hello.highest_term"),
        ({"highest_leader_id": "a\nb"}, "hello.highest_leader_id"),
    ],
)
def test_a_hello_that_is_wrong_names_its_field(changes, field):
    with pytest.raises(Invalid) as caught:
        read_hello(hello(**changes), "ipv4:10.0.0.1:5123", "stream1", 7000)
    assert caught.value.metadata["field"] == field


def test_something_else_is_no_hello():
    with pytest.raises(Invalid):
        read_hello(agent_pb2.ReportRequest(boot=BOOT, heartbeat=agent_pb2.Heartbeat()), "ipv4:1.2.3.4:5", "s", 0)


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.1:5123", "10.0.0.1"),
        ("ipv6:%5B2001:db8::1%5D:5123", "2001:db8::1"),
        ("ipv6:[::1]:5123", "::1"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:5123", "10.0.0.1"),
        ("unix:/run/x", "/run/x"),
        ("unknown", "unknown"),
    ],
)
def test_the_host_of_a_caller(peer, host):
    assert peer_host(peer) == host


@pytest.mark.parametrize(
    ("text", "host", "address"),
    [
        ("node-a:7401", "10.0.0.1", "node-a:7401"),
        (":7401", "10.0.0.1", "10.0.0.1:7401"),
        ("0.0.0.0:7401", "10.0.0.1", "10.0.0.1:7401"),
        ("[::]:7401", "2001:db8::1", "[2001:db8::1]:7401"),
        ("127.0.0.1:7401", "127.0.0.1", "127.0.0.1:7401"),
        ("127.0.0.1:7401", "::1", "127.0.0.1:7401"),
    ],
)
def test_an_address_that_names_no_host_is_where_the_agent_calls_from(text, host, address):
    assert reached_at(text, host, "f") == address


def test_loopback_is_not_taken_from_another_host():
    with pytest.raises(Invalid, match="advertise"):
        reached_at("127.0.0.1:7401", "10.0.0.1", "f")


def test_a_flood_is_slowed_down_and_a_burst_is_not():
    now = 0.0
    pace = Pace(10.0, 5.0, lambda: now)
    assert [pace.wait_s() for _ in range(5)] == [0.0] * 5
    assert pace.wait_s() == pytest.approx(0.1)
    assert pace.wait_s() == pytest.approx(0.2)
    now = 100.0
    assert [pace.wait_s() for _ in range(5)] == [0.0] * 5
    assert pace.wait_s() > 0
