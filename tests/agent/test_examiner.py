"""What an agent makes of what it sees: data that was here and is not, and disks that cannot be looked at."""

from __future__ import annotations

import os
import shutil

import pytest

from agent.backends.base import NewSnapshot
from agent.backends.image import ImageBackend
from agent.examiner import Examiner, ReplicaSettings
from agent.identity import Identity, Remembered
from resilver.lineage import ConsistencyPoint
from resilver.volume import Grant, LiveState, Presence, VolumeRecord


@pytest.fixture
def place(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    return disk


@pytest.fixture
def identity(tmp_path):
    opened = Identity(tmp_path / "state", "prod", "a")
    yield opened
    opened.close()


def examiner(place, identity):
    backend = ImageBackend("vm1", place / "vm1.img", place / ".resilver" / "vm1", reserve_min_bytes=0)
    return Examiner("vm1", "a", backend, identity, ReplicaSettings(priority=3, keep_last=5))


@pytest.fixture
def looks(place, identity):
    return examiner(place, identity)


def snapshot(looks, name="s1"):
    new = NewSnapshot(name, "V", ConsistencyPoint(1, 1), "", "e1", 1)
    return looks._backend.take_snapshot(new)


def test_what_is_configured_and_found_is_reported(looks, place):
    (place / "vm1.img").write_bytes(os.urandom(8192))
    report = looks.examine(compare_live=True)
    assert (report.presence, report.priority, report.keep_last) == (Presence.PRESENT, 3, 5)
    assert report.live.state is LiveState.MODIFIED
    assert looks.last == report


@pytest.mark.parametrize("mirrored", [True, False])
def test_data_that_is_gone_is_lost_also_after_a_restart(looks, place, identity, mirrored):
    (place / "vm1.img").write_bytes(os.urandom(8192))
    looks.examine(compare_live=True)
    if mirrored:
        looks._backend.save_record(VolumeRecord("vm1", "V", 1, "e1", "a"))
        looks._backend.save_grant(Grant("V", 1, "e1"))
        snapshot(looks)
    assert looks.examine(compare_live=True).presence is Presence.PRESENT
    shutil.rmtree(place)
    for again in (looks, examiner(place, identity)):
        report = again.examine(compare_live=True)
        assert report.presence is Presence.LOST
        assert report.problems[0].startswith("REPLICA_LOST: there was data")
        assert (report.record, report.grant, len(report.lineage)) == (None, None, 0)
        assert report.volume_id == ("V" if mirrored else "")


def test_an_image_on_another_file_system_is_no_substitute(looks, place, identity):
    (place / "vm1.img").write_bytes(os.urandom(8192))
    identity.remember("vm1", Remembered("the disk that is not mounted", "s1", "V"))
    report = looks.examine(compare_live=True)
    assert report.presence is Presence.LOST
    assert "another file system" in report.problems[0]
    assert identity.remembered("vm1") == Remembered("the disk that is not mounted", "s1", "V")


def test_a_disk_that_moved_with_its_snapshots_is_found_again(looks, place, identity):
    (place / "vm1.img").write_bytes(os.urandom(8192))
    looks.examine(compare_live=True)
    snapshot(looks)
    identity.remember("vm1", Remembered("where it was", "s1", "V"))
    assert looks.examine(compare_live=True).presence is Presence.PRESENT
    assert identity.remembered("vm1").file_system_id != "where it was"


def test_what_cannot_be_read_is_lost_with_the_reason(looks, place):
    (place / "vm1.img").write_bytes(os.urandom(8192))
    looks.examine(compare_live=True)
    snapshot(looks)
    (place / ".resilver" / "vm1" / "s1" / "record.json").write_text("{}")
    assert looks.changed()
    report = looks.examine_surely()
    assert report.presence is Presence.LOST
    assert report.problems[0].startswith("IO_ERROR: ")
    assert not looks.changed(), "told once"


def test_a_state_dir_that_cannot_be_written_loses_nothing(looks, place, identity):
    (place / "vm1.img").write_bytes(os.urandom(8192))
    shutil.rmtree(identity.state_dir / "volumes")
    report = looks.examine(compare_live=True)
    assert report.presence is Presence.PRESENT
    assert "cannot be remembered" in report.problems[-1]
    looks.remember("s1", "V")


def test_a_cheap_look_notices_and_keeps_what_was_compared(looks, place):
    image = place / "vm1.img"
    image.write_bytes(os.urandom(8192))
    looks.examine(compare_live=True)
    snapshot(looks)
    assert looks.examine(compare_live=True).live.state is LiveState.UNMODIFIED
    assert not looks.changed()
    assert looks.examine(compare_live=False).live.state is LiveState.UNMODIFIED
    with image.open("rb"):
        assert looks.changed()
        assert looks.examine(compare_live=False).live.state is not LiveState.UNMODIFIED
    assert looks.changed()
    image.write_bytes(os.urandom(4096))
    assert looks.changed()
    assert looks.examine(compare_live=True).live.state is LiveState.MODIFIED
