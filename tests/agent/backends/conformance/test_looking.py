"""Looking at a replica: what is there, and that looking makes nothing."""

from __future__ import annotations

import pytest

from resilver.errors import ResilverError
from resilver.lineage import ConsistencyPoint
from resilver.volume import Grant, LiveState, Presence, VolumeRecord
from tests.agent.backends.adapter import SIZE, VOLUME_ID

RECORD = VolumeRecord("vm1", VOLUME_ID, 3, "e3", "a", ("a", "b"), ConsistencyPoint(3, 42), "s42")


def test_empty_place(replica):
    before = replica.traces()
    found = replica.backend.examine()
    assert found.presence is Presence.EMPTY
    assert found.live.state is LiveState.ABSENT
    assert (found.volume_id, found.record, found.grant, found.preserved, found.problems) == ("", None, None, (), ())
    assert not found.lineage.records
    assert found.file_system_id
    assert found.free_bytes > 0
    assert replica.traces() == before, "looking makes nothing"


def test_first_sight(replica, kind):
    replica.create()
    found = replica.backend.examine()
    assert found.presence is Presence.PRESENT
    assert found.live.state is LiveState.MODIFIED
    assert found.live.in_use is False
    assert found.live.in_use_by == ()
    assert found.live.path
    assert found.volume_id == ""
    assert not found.lineage.records
    if kind.shape == "blocks":
        assert found.live.size_bytes == SIZE


def test_a_record_makes_no_data(replica):
    replica.backend.save_record(RECORD)
    replica.backend.save_grant(Grant(VOLUME_ID, 3, "e3"))
    found = replica.backend.examine()
    assert found.presence is Presence.EMPTY
    assert found.record == RECORD
    assert found.grant == Grant(VOLUME_ID, 3, "e3")
    replica.backend.save_grant(None)
    assert replica.backend.examine().grant is None
    assert replica.again().backend.examine().record == RECORD
    assert replica.root.stat().st_mode & 0o777 == 0o700
    files = [path for path in replica.root.rglob("*.json") if path.is_file()]
    assert files
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)


def test_a_record_replaces_the_one_before(replica):
    replica.create()
    replica.snapshot()
    for epoch in (3, 4):
        replica.backend.save_record(VolumeRecord("vm1", VOLUME_ID, epoch, f"e{epoch}", "a", ("a",)))
        assert replica.backend.examine().record.epoch == epoch
    assert len(replica.lineage) == 1


def test_records_stay_where_the_data_goes(replica, other):
    """A commit that replaces everything leaves what the agent was told."""
    replica.create()
    replica.snapshot()
    other.backend.save_record(RECORD)
    other.receive(replica)
    assert other.again().backend.examine().record == RECORD


def test_a_disk_that_is_not_there(place):
    with place.without_disk() as missing:
        found = missing.backend.examine()
        assert (found.presence, found.file_system_id) == (Presence.EMPTY, "")
        assert found.problems
        assert not found.lineage.records
        with pytest.raises(ResilverError):
            missing.backend.save_record(VolumeRecord("vm1"))
        with pytest.raises(ResilverError):
            missing.snapshot()
        assert missing.backend.recover() == ""


def test_the_file_system_is_told_from_another(place):
    one, again = place.replica("a", "vm1"), place.replica("a", "vm2")
    one.create()
    again.create()
    ids = {replica.backend.examine().file_system_id for replica in (one, again, one.again())}
    two = place.replica("a", "vm3")
    ids |= {replica.backend.recover() for replica in (one.again(), again, two)}
    assert len(ids) == 1, "one file system, one name, whatever is on it"


def test_recover_where_nothing_is(replica):
    before = replica.traces()
    replica.backend.recover()
    assert replica.traces() == before
    replica.create()
    was = replica.contents()
    replica.backend.recover()
    replica.again().backend.recover()
    assert replica.contents() == was


def test_debris_is_swept(replica):
    replica.create()
    taken = replica.snapshot()
    was = replica.contents()
    replica.litter()
    assert replica.debris(), "the litter is seen"
    again = replica.again()
    again.backend.recover()
    assert again.debris() == []
    assert again.lineage.records == (taken,)
    assert again.contents() == again.contents(taken.id) == was
    assert again.state is LiveState.UNMODIFIED
