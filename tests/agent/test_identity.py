"""Whom an agent obeys, as a table; and that it is still so after a restart."""

from __future__ import annotations

import subprocess
import sys

import pytest

from agent.identity import Identity, Pin, Remembered
from resilver.errors import Invalid, ResilverError
from resilver.volume import Order


def order(term, leader="L1", store="S1", cluster="prod"):
    return Order(cluster, store, term, leader, "vm1")


def test_a_state_dir_that_is_a_file_is_a_mistake_in_the_configuration(tmp_path):
    path = tmp_path / "state"
    path.write_text("mine")
    with pytest.raises(Invalid) as caught:
        Identity(path, "prod", "a")
    assert caught.value.reason == "CONFIG_INVALID"
    assert str(path) in caught.value.message
    assert path.read_text() == "mine"


@pytest.fixture
def identity(tmp_path):
    opened = Identity(tmp_path / "state", "prod", "a")
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("seen", "then", "reason"),
    [
        ([], order(1), ""),
        ([], order(7), ""),
        ([order(3)], order(3), ""),
        ([order(3)], order(4, "L2"), ""),
        ([order(3)], order(4), ""),
        ([order(3)], order(2), "STALE_TERM"),
        ([order(3)], order(2, "L2"), "STALE_TERM"),
        ([order(3)], order(3, "L2"), "STALE_TERM"),
        ([order(3), order(5, "L2")], order(3), "STALE_TERM"),
        ([order(3)], order(9, "L2", store="S2"), "WRONG_STORE"),
        ([order(3)], order(3, store="S2"), "WRONG_STORE"),
        ([], order(1, cluster="test"), "CLUSTER_MISMATCH"),
        ([order(3)], order(9, cluster="test", store="S2"), "CLUSTER_MISMATCH"),
    ],
)
def test_whom_it_obeys(tmp_path, identity, seen, then, reason):
    for each in seen:
        identity.admit(each)
    before = identity.pin
    if not reason:
        identity.admit(then)
        assert identity.pin == Pin("prod", then.store_id, then.term, then.leader_id)
    else:
        with pytest.raises(ResilverError) as caught:
            identity.admit(then)
        assert caught.value.reason == reason
        assert identity.pin == before
    pin = identity.pin
    identity.close()
    again = Identity(tmp_path / "state", "prod", "a")
    assert again.pin == pin, "it is on the disk"
    assert again.boot != identity.boot
    again.close()


def test_a_refused_cluster_pins_nothing(identity):
    with pytest.raises(ResilverError):
        identity.admit(order(9, cluster="test"))
    assert identity.pin == Pin("prod")


def test_adopting_a_store_counts_its_terms_anew(identity):
    identity.admit(order(9))
    identity.adopt_store("S2")
    identity.admit(order(1, "L7", store="S2"))
    with pytest.raises(ResilverError) as caught:
        identity.admit(order(10))
    assert caught.value.reason == "WRONG_STORE"
    identity.adopt_store("S2")
    assert identity.pin.term == 1, "adopting what is ours already changes nothing"


def test_two_agents_cannot_share_a_state_dir(tmp_path, identity):
    with pytest.raises(Invalid, match="in use by the agent with pid"):
        Identity(tmp_path / "state", "prod", "a")
    identity.admit(order(1))


def test_another_process_is_refused_and_a_kill_lets_go(tmp_path):
    script = (
        "import sys, pathlib; from agent.identity import Identity;"
        "Identity(pathlib.Path(sys.argv[1]), 'prod', 'a'); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Invalid, match=f"pid {holder.pid}"):
            Identity(tmp_path, "prod", "a")
        holder.kill()
        holder.wait()
    Identity(tmp_path, "prod", "a").close()


@pytest.mark.parametrize(("cluster", "node"), [("test", "a"), ("prod", "b")])
def test_a_state_dir_keeps_its_cluster_and_node(tmp_path, identity, cluster, node):
    identity.close()
    with pytest.raises(Invalid, match="belongs to"):
        Identity(tmp_path / "state", cluster, node)
    again = Identity(tmp_path / "state", "prod", "a")
    again.close()


def test_where_data_was_is_remembered(tmp_path, identity):
    assert identity.remembered("vm1") is None
    identity.remember("vm1", Remembered("fs", "s1", "v"))
    identity.remember("vm1", Remembered("fs", "s2", "v"))
    assert identity.remembered("vm1") == Remembered("fs", "s2", "v")
    assert identity.remembered("vm2") is None
    file = tmp_path / "state" / "volumes" / "vm1.json"
    kept = file.read_bytes()
    file.unlink()
    assert identity.remembered("vm1") is None
    file.write_bytes(kept)
    assert identity.remembered("vm1") == Remembered("fs", "s2", "v")
    file.write_bytes(b"{}")
    with pytest.raises(ResilverError, match="damaged"):
        identity.remembered("vm1")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
