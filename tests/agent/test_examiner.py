"""What an agent makes of what it sees: data that was here and is not, and disks that cannot be looked at."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from agent.backends import image_live
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


def test_a_change_that_was_not_compared_is_left_for_the_next_look(looks, place):
    image = place / "vm1.img"
    image.write_bytes(os.urandom(8192))
    os.truncate(image, 1 << 20)
    looks.examine(compare_live=True)
    snapshot(looks)
    assert looks.examine(compare_live=True).live.state is LiveState.UNMODIFIED
    with image.open("r+b") as file:
        os.pwrite(file.fileno(), b"x", 1 << 19)
        os.fsync(file.fileno())
    assert looks.examine(compare_live=False).live.state is LiveState.UNMODIFIED, "as it was compared last"
    assert looks.changed()
    assert looks.examine(compare_live=True).live.state is LiveState.MODIFIED
    assert not looks.changed()


@pytest.fixture
def quiet(looks, place, monkeypatch):
    """A mirrored volume at which a glance is enough, and what it has cost to look at it so far."""
    monkeypatch.setattr(image_live, "FRESH_NS", 20_000_000)
    (place / "vm1.img").write_bytes(os.urandom(8192))
    looks._backend.save_record(VolumeRecord("vm1", "V", 1, "e1", "a"))
    looks._backend.save_grant(Grant("V", 1, "e1"))
    snapshot(looks)
    looks.examine(compare_live=True)
    whole = looks._backend.examine
    looked = []

    def examine(**how):
        looked.append(how)
        return whole(**how)

    monkeypatch.setattr(looks._backend, "examine", examine)
    until_still(looks, looked)
    return looked


def until_still(looks, looked):
    """Until what was just written is old enough for a glance to be trusted."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        looked.clear()
        assert not looks.changed()
        if not looked:
            return
        time.sleep(0.01)
    raise AssertionError("a glance was never enough")


def write(place):
    with (place / "vm1.img").open("r+b") as file:
        os.pwrite(file.fileno(), b"x", 100)


CHANGES = {
    "a write to the live copy": write,
    "another size": lambda place: os.truncate(place / "vm1.img", 4096),
    "the live copy is gone": lambda place: (place / "vm1.img").unlink(),
    "another live copy": lambda place: (
        shutil.copy(place / "vm1.img", place / "other"), (place / "other").replace(place / "vm1.img")
    ),
    "another name for it": lambda place: os.link(place / "vm1.img", place / "other"),
    "another mode": lambda place: (place / "vm1.img").chmod(0o600),
    "no grant any more": lambda place: (place / ".resilver/vm1/grant.json").unlink(),
    "a snapshot is gone": lambda place: shutil.rmtree(place / ".resilver/vm1/s1"),
    "a file beside the snapshots": lambda place: (place / ".resilver/vm1/commit.json").write_text("{}"),
    "no snapshots any more": lambda place: shutil.rmtree(place / ".resilver"),
    "the disk is gone": shutil.rmtree,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_glance_sees_whatever_changes(looks, place, quiet, change):
    CHANGES[change](place)
    looks.changed()
    assert quiet, "it was looked at"


def test_a_glance_is_not_enough_where_somebody_has_it_open(looks, place, quiet):
    with (place / "vm1.img").open("rb"):
        assert looks.changed()
        assert quiet


def test_now_and_then_more_than_a_glance_is_taken(looks, place, quiet):
    (place / ".resilver/vm1/s1/data").unlink()
    assert not looks.changed()
    assert not quiet
    assert looks.changed(surely=True)


def test_free_space_is_seen_at_a_glance(looks, quiet):
    looks._backend.set_reserve(1.0, 0)
    assert looks.changed()
    assert quiet
