"""Pairs that plain scripts have made, and snapshots of other tools: adopted, used, and never touched."""

from __future__ import annotations

import subprocess

import pytest

from resilver.errors import Refused
from resilver.lineage import NO_CP, Origin, newest_in_common
from resilver.volume import LiveState
from tests.agent.backends.zfs.replica import Replica, equal
from tests.zfsfs import zfs


def pipe(send: list[str], receive: list[str]) -> None:
    """What a replication script does."""
    sending = subprocess.Popen(["zfs", "send", *send], stdout=subprocess.PIPE)
    subprocess.run(["zfs", "receive", *receive], stdin=sending.stdout, check=True)
    assert sending.stdout is not None
    sending.stdout.close()
    assert sending.wait() == 0


def foreign(replica: Replica) -> list[list[str]]:
    """All that there is of other tools': names, guids, properties and holds."""
    found = []
    for name in zfs("list", "-H", "-r", "-t", "snapshot", "-o", "name", replica.dataset).split("\n")[:-1]:
        if "@resilver-" not in name:
            found.append(zfs("get", "-Hp", "-o", "name,property,value", "guid,creation,userrefs", name).split("\n"))
            assert "resilver" not in zfs("get", "-H", "-o", "property,source", "all", name)
    return found


@pytest.fixture
def pair(replica, other):
    """Five snapshots at one side, three at the other, by zfs send and receive alone."""
    replica.create()
    names = ["autosnap_2026-01-01_daily", "zrepl_1", "syncoid here", "cron.4", "cron:5"]
    for number, name in enumerate(names):
        if number:
            replica.write(number)
        zfs("snapshot", f"{replica.dataset}@{name}")
    pipe([f"{replica.dataset}@{names[0]}"], [other.dataset])
    before = names[0]
    for name in (names[1], names[3]):
        pipe(["-i", f"@{before}", f"{replica.dataset}@{name}"], ["-F", other.dataset])
        before = name
    replica.write(20)
    return replica, other


def test_a_pair_of_plain_scripts_is_adopted(pair):
    one, two = pair
    mine, theirs = foreign(one), foreign(two)
    assert (len(mine), len(theirs)) == (5, 3)
    names = [record.note for record in one.lineage]
    assert names == ["cron:5", "cron.4", "syncoid here", "zrepl_1", "autosnap_2026-01-01_daily"]
    assert {record.origin for record in one.lineage} == {Origin.ADOPTED}
    assert {record.cp for record in one.lineage} == {NO_CP}
    assert one.lineage.contains(two.lineage)
    assert two.state is LiveState.UNMODIFIED
    assert one.backend.examine().volume_id == ""
    traces = [each.traces() for each in (one, two)]
    for each in (one, two):
        each.backend.examine()
    assert [each.traces() for each in (one, two)] == traces, "looking makes nothing"

    base = newest_in_common(two.lineage, one.lineage)
    assert base.note == "cron.4"
    taken = one.snapshot()
    assert taken.parent == one.lineage.records[1].id
    assert one.lineage.records[1].note == "cron:5"
    stage = two.fill(one, base.id, taken.id)
    received = stage.plan
    assert two.backend.commit(stage, two.order(one.lineage)) == ()
    assert received.native_base == base.id, "an incremental stream, and no full copy"
    assert equal(one, two)
    assert two.tip == taken
    assert two.lineage.ids() == one.lineage.ids()
    assert (foreign(one), foreign(two)) == (mine, theirs)
    assert [two.lineage.find(record.id).present for record in one.lineage] == [True, False, True, False, True, True]

    # And on: what comes later is shown, and is never a tip.
    zfs("snapshot", f"{one.dataset}@later")
    assert one.tip == taken
    assert [other.note for other in one.backend.examine().others] == ["later"]
    for each in (one, two):
        for record in each.lineage.records[1:]:
            if record.present:
                with pytest.raises(Refused, match="another tool") as refused:
                    each.backend.drop(record.id)
                assert refused.value.reason == "PINNED"
        assert each.backend.prune(1, frozenset()) == ()
    again = two.again()
    again.backend.recover()
    assert again.lineage == two.lineage


def test_snapshots_of_others_on_the_target_do_not_hinder(replica, other):
    """A job that snapshots every dataset of a machine does so with replicas: they stay where they are."""
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    for turn in range(2):
        zfs("snapshot", f"{other.dataset}@hourly {turn}")
        zfs("hold", "theirs", f"{other.dataset}@hourly {turn}")
        replica.write(turn)
        zfs("snapshot", f"{replica.dataset}@hourly {turn}")
        taken = replica.snapshot()
        before = foreign(other)
        assert other.receive(replica, base.id) == ()
        base = taken
        assert equal(replica, other)
        assert foreign(other) == before
        assert other.state is LiveState.UNMODIFIED
        assert [one.note for one in other.backend.examine().others] == [f"hourly {n}" for n in range(turn + 1)]
    for turn in range(2):
        zfs("release", "theirs", f"{other.dataset}@hourly {turn}")


def test_a_snapshot_of_others_on_what_has_to_be_replaced_is_kept_with_it(replica, other):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    other.write(1)
    zfs("snapshot", f"{other.dataset}@theirs")
    guid = zfs("get", "-Hp", "-o", "value", "guid", f"{other.dataset}@theirs")
    replica.write(2)
    replica.snapshot()
    (kept,) = other.receive(replica, base.id, replace_own_data=True)
    assert equal(replica, other)
    assert zfs("get", "-Hp", "-o", "value", "guid", f"{kept.path}@theirs") == guid
    with pytest.raises(Refused, match="@theirs") as refused:
        other.backend.drop(kept.id)
    assert refused.value.reason == "PINNED"
    zfs("destroy", f"{kept.path}@theirs")
    other.backend.drop(kept.id)
    assert other.backend.examine().preserved == ()
    assert not [name for name in other.traces() if "/kept-" in name]


def test_a_snapshot_that_was_made_again_is_not_the_same(replica, other):
    """Under its name and with its properties, but of other contents: its guid gives it away."""
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    name = next(one for one in other.traces() if one.startswith(f"{other.dataset}@resilver-1-1"))
    record = zfs("get", "-H", "-o", "value", "resilver:record", name).strip()
    zfs("release", "resilver", name)
    zfs("destroy", name)
    other.write(1)
    zfs("snapshot", "-o", f"resilver:record={record}", name)
    found = other.again().backend.examine()
    assert found.lineage.find(base.id).present is False
    assert any("is not the snapshot 1-1" in problem for problem in found.problems)
    with pytest.raises(Refused) as refused:
        other.backend.check_base(base.id, replica.backend.native_id(base.id))
    assert refused.value.reason == "BASE_GONE"


def test_a_copy_of_ours_that_another_tool_made_is_a_snapshot_like_any(replica, other):
    """A script has sent our snapshots on, without their properties: they are adopted by guid."""
    replica.create()
    replica.snapshot()
    name = next(one for one in replica.traces() if "@resilver-1-1" in one)
    pipe([name], [other.dataset])
    (record,) = other.lineage.records
    assert record.origin is Origin.ADOPTED
    assert record.id == replica.backend.native_id(replica.tip.id)
