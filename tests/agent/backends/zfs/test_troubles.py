"""What goes wrong on the way: broken streams, full pools, wrong bases, things that are in the way."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from agent.backends.base import StreamOrigin
from agent.backends.zfs import ZfsBackend
from resilver.errors import Damaged, Invalid, NotFound, Refused, ResilverError, Unauthenticated
from resilver.volume import LiveState, Presence, VolumeRecord
from tests import zfsfs
from tests.agent.backends.zfs.replica import Replica, differences, equal
from tests.zfsfs import zfs

SMALL_BYTES = 160 << 20


@pytest.fixture
def stale(replica, other):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    replica.write(1)
    return replica, other, base.id, replica.snapshot().id


def clean(replica: Replica) -> None:
    names = replica.traces()
    assert not [name for name in names if "/stage" in name or "look" in name or "incoming" in name], names


def test_what_reads_back_otherwise_is_not_committed(stale):
    source, target, base, tip = stale
    stage = target.fill(source, base, tip)
    object.__setattr__(stage.plan, "digest", "0" * 64)
    with pytest.raises(Damaged) as damaged:
        stage.verify(threading.Event())
    assert damaged.value.reason == "READBACK_MISMATCH"


def test_what_is_sent_is_held(stale):
    source, _target, base, tip = stale
    first, second = (source.backend.open_send(base, tip, "zfs") for _ in range(2))
    for stream in (first, second):
        with pytest.raises(Refused) as refused:
            source.backend.drop(base)
        assert refused.value.reason == "PINNED"
        stream.close()
    source.backend.drop(base)


def test_holds_of_a_killed_agent_are_let_go(stale):
    source, _target, base, tip = stale
    pid = os.fork()
    if pid == 0:
        source.backend.open_send(base, tip, "zfs")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    again = source.again()
    again.backend.recover()
    again.backend.drop(base)


def test_wrong_bases_and_targets(stale):
    source, target, base, tip = stale
    backend = target.backend
    with pytest.raises(Refused) as refused:
        backend.check_base("unknown", "1")
    assert refused.value.reason == "BASE_GONE"
    with pytest.raises(Damaged) as damaged:
        backend.check_base(base, "1")
    assert damaged.value.reason == "BASE_MISMATCH"
    for call in (
        lambda: source.backend.open_send("unknown", tip, "zfs"),
        lambda: source.backend.delta_bytes("unknown", tip),
    ):
        with pytest.raises(Refused) as refused:
            call()
        assert refused.value.reason == "BASE_GONE"
    with pytest.raises(Refused) as refused:
        source.backend.native_id("unknown")
    assert refused.value.reason == "TARGET_GONE"
    with pytest.raises(Invalid):
        source.backend.open_send(base, tip, "zfs-lec")
    with pytest.raises((Refused, Unauthenticated)):
        source.backend.open_send(base, tip, "zfs", token="1-abc-def")
    with pytest.raises(Invalid) as invalid:
        backend.open_stream_stage(base, tip, StreamOrigin("$(reboot)", "1", ("zfs",)))
    assert invalid.value.metadata["field"] == "native_base"
    with pytest.raises(NotFound):
        backend.drop("unknown")


def test_what_shares_nothing_is_replaced_by_name_only(replica, other):
    replica.create(1)
    replica.snapshot()
    other.create(2)
    zfs("set", "compression=on", other.dataset)
    zfs("set", "com.example:note=two words", other.dataset)
    with other.walked() as path:
        held = (path / "holes").read_bytes()
    with pytest.raises(Refused) as refused:
        other.receive(replica)
    assert refused.value.reason == "REPLICA_UNRELATED"
    (kept,) = other.receive(replica, replace_unrelated=True)
    assert equal(replica, other)
    with other.walked(kept.path) as path:
        assert (path / "holes").read_bytes() == held
    local = zfs("get", "-H", "-s", "local", "-o", "property,value", "all", other.dataset)
    for setting in ("compression\ton", "com.example:note\ttwo words", f"mountpoint\t{other.point}"):
        assert setting in local.split("\n")
    with pytest.raises(OSError, match="Read-only"):
        (other.point / "x").touch()
    assert zfs("get", "-H", "-o", "value", "mountpoint", kept.path) == "none\n"
    listed = {copy.id: copy for copy in other.backend.examine().preserved}
    assert listed[kept.id].size_bytes == int(zfs("get", "-Hp", "-o", "value", "referenced", kept.path)) > 0
    other.backend.drop(kept.id)
    assert other.backend.examine().preserved == ()
    assert not [name for name in other.traces() if "/kept-" in name]


def test_the_delta_of_a_replica_that_goes_back_to_its_tip_is_nothing(replica):
    replica.create()
    tip = replica.snapshot()
    assert replica.backend.delta_bytes(tip.id, tip.id) == 0


def test_exports(replica, tmp_path):
    replica.create()
    with pytest.raises(NotFound):
        replica.backend.export("unknown", tmp_path / "x", writable=True)
    assert not [name for name in replica.traces() if ".resilver" in name]
    first = replica.snapshot()
    with replica.walked() as path:
        mine = tmp_path / "by hand"
        os.system(f"cp -a '{path}' '{mine}'")
    replica.write(1)
    out = tmp_path / "Büro №1"
    (name,) = [name for name in replica.traces() if name.startswith(f"{replica.dataset}@")]
    referenced = int(zfs("get", "-Hp", "-o", "value", "referenced", name))
    assert replica.backend.export(first.id, out, writable=True) == referenced > 0
    assert differences(mine, out) == ""
    with pytest.raises(Invalid, match="exists"):
        replica.backend.export(first.id, out, writable=True)
    with pytest.raises(Invalid):
        replica.backend.export(first.id, tmp_path / "no" / "where", writable=True)
    with pytest.raises(NotFound):
        replica.backend.export("unknown", tmp_path / "x", writable=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"by hand", "Büro №1", replica.pool}
    assert not [name for name in replica.traces() if "export" in name or "look" in name]


def test_pruning_passes_over_what_is_needed(replica, other):
    replica.create()
    taken = []
    for turn in range(4):
        replica.write(turn)
        taken.append(replica.snapshot())
        other.receive(replica, taken[-2].id if turn else "")
    other.write(20)
    replica.write(5)
    replica.snapshot()
    (kept,) = other.receive(replica, taken[-1].id)
    going = [record.id for record in (taken[2], taken[0])]
    assert [gone for gone, _freed in other.backend.prune(1, frozenset({taken[1].id}))] == going[::-1]
    assert other.lineage.find(taken[3].id).present, "the preserved copy stands on it"
    with pytest.raises(Refused, match="a clone stands on it") as refused:
        other.backend.drop(taken[3].id)
    assert refused.value.reason == "PINNED"
    with pytest.raises(Refused):
        other.backend.drop(other.tip.id)
    other.backend.drop(kept.id)
    other.backend.drop(taken[3].id)
    assert len(other.lineage) == 5


# Room.


def fill(replica: Replica) -> None:
    """Takes all that is free in a pool, as some other program would."""
    name = f"{replica.pool}/filler"
    point = replica.work / "filler"
    zfs("create", "-o", f"mountpoint={point}", name)
    zfsfs.fill(point / "data")


def make_room(replica: Replica) -> None:
    zfs("destroy", f"{replica.pool}/filler")


@pytest.mark.parametrize(
    "step", ["commit.begun", "commit.logged", "commit.aside", "commit.intended", "commit.received"]
)
def test_a_full_pool_in_a_commit(node, step):
    source, target = node(), node(size_bytes=SMALL_BYTES)
    source.create()
    base = source.snapshot()
    target.receive(source)
    source.write(1)
    tip = source.snapshot()
    target.fill(source, base.id, tip.id).close()

    def filling(name: str) -> None:
        if name == step:
            fill(target)

    full = target.again(step=filling)
    stage = full.open_stage(source, base.id, tip.id)
    reason = ""
    try:
        full.backend.commit(stage, full.order(source.lineage))
    except ResilverError as error:
        reason = error.reason
    stage.close()
    assert reason in {"", "NO_SPACE", "IO_ERROR"}
    make_room(target)
    again = target.again()
    again.backend.recover()
    assert again.tip.id in ({base.id, tip.id} if reason else {tip.id}), "decided or not, when the error came"
    assert again.state is LiveState.UNMODIFIED
    if again.tip.id == base.id:
        assert again.receive(source, base.id) == ()
    assert equal(source, again)


def test_a_full_pool_takes_no_snapshot_and_receives_nothing(node):
    source, target = node(), node(size_bytes=SMALL_BYTES)
    source.create()
    base = source.snapshot()
    target.receive(source)
    source.write(1)
    source.snapshot()
    careful = target.again(reserve_min_bytes=1 << 40)
    with pytest.raises(Refused, match="above the reserve") as refused:
        careful.backend.check_stream_space(1000)
    assert refused.value.reason == "NO_SPACE"
    fill(target)
    for work in (lambda: target.snapshot(epoch=2), lambda: target.receive(source, base.id)):
        with pytest.raises(ResilverError) as error:
            work()
        assert error.value.reason == "NO_SPACE"
    assert target.tip == base
    make_room(target)
    assert target.receive(source, base.id) == ()
    assert equal(source, target)


# What is not there, or is in the way.


def test_a_pool_that_is_not_imported(service, tmp_path):
    missing = ZfsBackend("vm1", Path("nowhere/vm1"), tmp_path / "records")
    found = missing.examine()
    assert (found.presence, found.file_system_id) == (Presence.EMPTY, "")
    assert found.problems == ("pool nowhere is not imported",)
    assert missing.recover() == ""
    with pytest.raises(Invalid) as invalid:
        missing.save_record(VolumeRecord("vm1"))
    assert invalid.value.metadata["field"] == "path"


def test_recovered_is_what_is_below_a_dataset_that_is_there(replica, tmp_path):
    late = ZfsBackend("vm1", Path(f"{replica.pool}/later/vm1"), tmp_path / "late")
    assert late.recover() == ""
    zfs("create", f"{replica.pool}/later")
    assert late.recover() == late.examine().file_system_id != ""


def test_datasets_of_others_are_not_taken_over(replica):
    zfs("create", f"{replica.dataset}.resilver")
    replica.create()
    with pytest.raises(Invalid, match="was not made for volume vm1"):
        replica.snapshot()
    assert replica.traces() == [replica.pool, replica.dataset, f"{replica.dataset}.resilver"]


def test_datasets_below_the_live_copy_hinder_its_replacing(stale):
    source, target, base, tip = stale
    target.write(1)
    zfs("create", "-o", "mountpoint=none", f"{target.dataset}/below")
    assert any("below" in problem for problem in target.backend.examine().problems)
    with pytest.raises(Refused) as refused:
        target.receive(source, base)
    assert refused.value.reason == "NOT_SUPPORTED"
    zfs("destroy", f"{target.dataset}/below")
    (_kept,) = target.receive(source, base)
    assert target.tip.id == tip
