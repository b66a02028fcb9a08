"""What every kind of file system must give: each operation of the backend, and what it promises."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from agent.backends.base import NewSnapshot
from agent.delta import DeltaRange
from resilver.errors import Invalid, NotFound, Refused
from resilver.lineage import Consistency, ConsistencyPoint, Lineage
from resilver.volume import Grant, LiveState, Presence, VolumeRecord
from tests.agent.backends.replica import BLOCK, SIZE, VOLUME_ID, Replica, digest, noise, text


def state(replica: Replica) -> LiveState:
    return replica.backend.examine().live.state


def brute_force(old: bytes, new: bytes) -> set[int]:
    """The blocks of the new content that differ from the old, which reads as zero beyond its end."""
    old = old.ljust(len(new), b"\0")
    return {
        at // BLOCK for at in range(0, len(new), BLOCK) if old[at : min(at + BLOCK, len(new))] != new[at : at + BLOCK]
    }


def blocks_of(ranges: list[DeltaRange]) -> set[int]:
    return {block for row in ranges for block in range(row.offset // BLOCK, -(-(row.offset + row.length) // BLOCK))}


# Looking.


def test_empty_place(replica):
    found = replica.backend.examine()
    assert found.presence is Presence.EMPTY
    assert found.live.state is LiveState.ABSENT
    assert (found.volume_id, found.record, found.grant, found.preserved, found.problems) == ("", None, None, (), ())
    assert not found.lineage.records
    assert found.file_system_id
    assert not replica.root.exists(), "looking makes nothing"


def test_first_sight(replica):
    replica.create()
    found = replica.backend.examine()
    assert found.presence is Presence.PRESENT
    assert found.live.state is LiveState.MODIFIED
    assert found.live.size_bytes == SIZE
    assert found.live.allocated_bytes < SIZE
    assert found.live.in_use is False


def test_a_record_makes_no_data(replica):
    record = VolumeRecord("vm1", VOLUME_ID, 3, "e3", "a", ("a", "b"), ConsistencyPoint(3, 42), "s42")
    replica.backend.save_record(record)
    replica.backend.save_grant(Grant(VOLUME_ID, 3, "e3"))
    found = replica.backend.examine()
    assert found.presence is Presence.EMPTY
    assert found.record == record
    assert found.grant == Grant(VOLUME_ID, 3, "e3")
    replica.backend.save_grant(None)
    assert replica.backend.examine().grant is None
    assert replica.root.stat().st_mode & 0o777 == 0o700
    assert (replica.root / "volume.json").stat().st_mode & 0o777 == 0o600


def test_a_disk_that_is_not_there(place):
    missing = Replica(place / "gone")
    missing.directory.rmdir()
    found = missing.backend.examine()
    assert (found.presence, found.file_system_id) == (Presence.EMPTY, "")
    assert str(missing.directory) in found.problems[0]
    with pytest.raises(Invalid, match="no directory"):
        missing.backend.save_record(VolumeRecord("vm1"))


# Snapshots.


def test_snapshot(replica, kind):
    replica.create()
    taken = replica.snapshot(note="first")
    assert taken.size_bytes == SIZE
    assert taken.consistency is Consistency.CLOSED
    found = replica.backend.examine()
    assert found.lineage.records == (taken,)
    assert found.volume_id == VOLUME_ID
    assert (found.live.state, found.live.based_on) == (LiveState.UNMODIFIED, taken.id)
    before = replica.content
    replica.write(12345, b"something else")
    assert replica.data(taken.id).read_bytes() == before
    assert replica.data(taken.id).stat().st_mode & 0o777 == 0o600
    found = replica.backend.examine()
    assert found.live.state is LiveState.MODIFIED
    assert found.live.modified_bytes == (None if kind == "ext4" else BLOCK)
    assert replica.backend.examine(compare_live=False).live.state is LiveState.UNKNOWN
    assert found.reflink is (kind != "ext4")


def test_the_same_snapshot_again_is_the_same(replica):
    replica.create()
    new = NewSnapshot("s1", VOLUME_ID, ConsistencyPoint(1, 1), "", "e", 5)
    assert replica.backend.take_snapshot(new) == replica.backend.take_snapshot(new)


def test_snapshots_that_are_refused(replica):
    new = NewSnapshot("s1", VOLUME_ID, ConsistencyPoint(1, 1), "", "e", 5)
    with pytest.raises(Refused, match="not there") as refused:
        replica.backend.take_snapshot(new)
    assert refused.value.reason == "NO_DATA"
    replica.create()
    replica.backend.take_snapshot(new)
    with pytest.raises(Refused) as refused:
        replica.backend.take_snapshot(NewSnapshot("s2", VOLUME_ID, ConsistencyPoint(1, 2), "other", "e", 5))
    assert refused.value.reason == "TARGET_CHANGED"
    with pytest.raises(Refused) as refused:
        replica.backend.take_snapshot(NewSnapshot("s2", "another volume", ConsistencyPoint(1, 2), "s1", "e", 5))
    assert refused.value.reason == "REPLICA_FOREIGN"
    for bad in ("../s2", "", "stage", ".s2", "a/b"):
        with pytest.raises(Invalid):
            replica.backend.take_snapshot(NewSnapshot(bad, VOLUME_ID, ConsistencyPoint(1, 2), "s1", "e", 5))
    assert len(replica.lineage) == 1


def test_a_snapshot_counts_only_if_whoever_ordered_it_says_so(replica):
    replica.create()
    tip = replica.snapshot()
    before = sorted(path.name for path in replica.root.iterdir())
    asked = []

    def refuse(consistency: Consistency) -> Consistency:
        asked.append((consistency, replica.lineage.tip_id))
        raise Refused("HOOK_FAILED", "the deadline had passed")

    new = NewSnapshot("s2", VOLUME_ID, ConsistencyPoint(1, 2), tip.id, "e", 5, group_id="g1", settle=refuse)
    with pytest.raises(Refused, match="the deadline had passed"):
        replica.backend.take_snapshot(new)
    assert asked == [(Consistency.CLOSED, tip.id)]
    assert replica.lineage.records == (tip,)
    assert sorted(path.name for path in replica.root.iterdir()) == before
    made = replica.backend.take_snapshot(replace(new, settle=lambda _found: Consistency.FROZEN))
    assert (made.consistency, made.group_id) == (Consistency.FROZEN, "g1")
    assert replica.lineage.tip == made
    assert replica.backend.examine().lineage.tip == made


def test_modified_is_found_without_times(replica):
    replica.create()
    replica.snapshot()
    times = replica.path.stat()
    replica.write(SIZE - 1, b"x")
    os.utime(replica.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert state(replica) is LiveState.MODIFIED


def test_touched_is_not_modified(replica):
    replica.create()
    replica.snapshot()
    os.utime(replica.path)
    replica.path.chmod(0o640)
    assert state(replica) is LiveState.UNMODIFIED


@pytest.mark.parametrize("size", [SIZE + BLOCK, SIZE - BLOCK, SIZE + 1, 0])
def test_another_size_is_modified(replica, size):
    replica.create()
    replica.snapshot()
    replica.resize(size)
    assert state(replica) is LiveState.MODIFIED


WRITER = """
import mmap, os, sys
how, path = sys.argv[1:]
with open(path, "r+b", buffering=0) as file:
    size = os.fstat(file.fileno()).st_size
    view = mmap.mmap(file.fileno(), size)
    print("writes", flush=True)
    for count in range(1, 1 << 60):
        raw = count.to_bytes(8, "little")
        for at in (0, size - 8):
            if how == "mapped":
                view[at : at + 8] = raw
            else:
                os.pwrite(file.fileno(), raw, at)
"""


@pytest.mark.parametrize("how", ["plain", "mapped"])
def test_snapshots_under_a_writer_are_one_moment(replica, kind, how):
    """A writer stamps the first block, then the last, over and over: a snapshot never has the last one ahead."""
    replica.create()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, how, str(replica.path)], stdout=subprocess.PIPE)
    refused = []
    try:
        assert writer.stdout.readline() == b"writes\n"
        for _ in range(8):
            before = replica.lineage
            try:
                taken = replica.snapshot()
            except Refused as error:
                refused.append(error)
                assert replica.lineage == before
                continue
            assert taken.consistency is Consistency.CRASH
            raw = replica.data(taken.id).read_bytes()
            first, last = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[-8:], "little")
            assert first - last in {0, 1}
    finally:
        writer.kill()
        writer.communicate()
    # Where files are copied, only a pause of the writer (a busy machine) lets one through.
    assert bool(refused) is (kind == "ext4")
    for error in refused:
        assert error.reason == "SNAPSHOT_NOT_ATOMIC"
        assert f"pid {writer.pid}" in error.message


def test_open_but_still(replica):
    """Somebody has it open for writing and does not write: a point in time everywhere, and never called unmodified."""
    replica.create()
    with replica.path.open("r+b"):
        taken = replica.snapshot()
        assert taken.consistency is Consistency.CRASH
        assert state(replica) is LiveState.MODIFIED
    assert state(replica) is LiveState.UNMODIFIED


# Deltas.


def test_delta_is_exact(replica, kind):
    replica.create()
    old = replica.snapshot()
    chance = random.Random(7)
    for _ in range(40):
        at = chance.randrange(0, SIZE - 9000)
        replica.write(at, chance.choice([noise, text])(at, chance.randrange(1, 9000)))
    replica.punch(BLOCK * 3, BLOCK * 5)
    replica.punch(SIZE // 2 + 100, 20000)
    new = replica.snapshot()
    before, after = replica.data(old.id).read_bytes(), replica.data(new.id).read_bytes()
    delta = replica.backend.delta_map(old.id, new.id)
    named = blocks_of(list(delta))
    changed = brute_force(before, after)
    assert changed <= named
    # Extents tell what was written, which may have been the same bytes; tables tell what differs.
    assert kind != "ext4" or named == changed
    assert len(named - changed) <= 3, "blocks are named that were never written"
    rebuilt = bytearray(before)
    for row in delta:
        assert row.offset % BLOCK == 0
        new_bytes = after[row.offset : row.offset + row.length]
        assert not row.zero or not any(new_bytes)
        rebuilt[row.offset : row.offset + row.length] = new_bytes
    assert bytes(rebuilt) == after


def test_delta_of_one_with_itself_is_empty(replica):
    replica.create()
    taken = replica.snapshot()
    again = replica.snapshot()
    assert len(replica.backend.delta_map(taken.id, taken.id)) == 0
    assert len(replica.backend.delta_map(taken.id, again.id)) == 0


def test_full_map_is_what_is_allocated(replica):
    replica.create()
    taken = replica.snapshot()
    delta = replica.backend.delta_map("", taken.id)
    assert delta.capacity_bytes == SIZE
    assert delta.data_bytes == 1 << 20
    assert delta.zero_bytes == 0
    assert blocks_of(list(delta)) == brute_force(b"", replica.content)


@pytest.mark.parametrize("size", [SIZE + 10 * BLOCK, SIZE + 5001, SIZE - 7 * BLOCK, SIZE - 5001, 100])
def test_delta_with_another_size(replica, other, size):
    replica.create()
    replica.write(SIZE - 3 * BLOCK, noise(9, 3 * BLOCK))
    first = replica.snapshot()
    other.receive(replica)
    replica.resize(size)
    if size > SIZE:
        replica.write(size - 10, b"0123456789")
    new = replica.snapshot()
    delta = replica.backend.delta_map(first.id, new.id)
    assert delta.capacity_bytes == size
    assert delta.data_bytes <= 3 * BLOCK
    other.receive(replica, first.id)
    assert digest(other.path) == digest(replica.path)
    replica.resize(SIZE)
    last = replica.snapshot()
    other.receive(replica, new.id)
    assert other.content == replica.content
    assert other.lineage.tip == last


def test_delta_of_what_is_not_there(replica):
    replica.create()
    taken = replica.snapshot()
    for base, target, reason in (("x", taken.id, "BASE_GONE"), (taken.id, "x", "TARGET_GONE")):
        with pytest.raises(Refused) as refused:
            replica.backend.delta_map(base, target)
        assert refused.value.reason == reason
    with pytest.raises(NotFound):
        replica.backend.open_reader("x")
    with pytest.raises(Invalid):
        replica.backend.delta_map("../../etc", taken.id)


def test_reader(replica):
    replica.create()
    taken = replica.snapshot()
    reader = replica.backend.open_reader(taken.id)
    assert reader.size_bytes == SIZE
    reader.announce([DeltaRange(0, 8192), DeltaRange(8192, 4096, zero=True)])
    data = bytearray(5000)
    reader.read_into(1000, memoryview(data))
    assert bytes(data) == replica.content[1000:6000]
    reader.close()


# Receiving.


def test_holes_stay_holes(replica, other):
    replica.create(size=64 << 20)
    replica.snapshot()
    other.receive(replica)
    assert other.content == replica.content
    for path in (other.path, other.data(other.lineage.tip_id), replica.data(replica.lineage.tip_id)):
        assert path.stat().st_blocks * 512 <= 2 << 20


def test_receive_again_and_again(replica, other):
    """Five consistency points, the last two in one step; live copies and lineages are the same each time."""
    replica.create()
    base = ""
    for turn in range(5):
        replica.write(turn * 50_000, noise(turn, 30_000))
        taken = replica.snapshot()
        if turn == 3:
            continue
        assert other.receive(replica, base) == ()
        base = taken.id
        assert other.content == replica.content
        assert other.lineage.ids() == replica.lineage.ids()
        assert state(other) is LiveState.UNMODIFIED
        assert other.data(taken.id).read_bytes() == replica.content
        assert not (other.root / "stage").exists()
        assert not (other.root / "commit.json").exists()
    present = [record.cp.sequence for record in other.lineage if record.present]
    assert present == [5, 3, 2, 1], "4 was never here, but its record is"


def test_live_copy_keeps_its_attributes(replica, other):
    replica.create()
    first = replica.snapshot()
    other.receive(replica)
    os.chown(other.path, 1234, 4321)
    other.path.chmod(0o640)
    os.setxattr(other.path, "user.label", b"vm one")
    for base in (first.id, ""):
        replica.write(0, noise(11, 100))
        replica.snapshot()
        other.receive(replica, base)
        stat = other.path.stat()
        assert (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) == (1234, 4321, 0o640)
        assert os.getxattr(other.path, "user.label") == b"vm one"


def test_stage_survives_and_is_keyed(replica, other):
    replica.create()
    first = replica.snapshot()
    other.receive(replica)
    replica.write(0, noise(3, 20_000))
    second = replica.snapshot()
    stage = other.backend.open_stage(first.id, second.id, second.size_bytes)
    assert not stage.resumed
    (stage.directory / "journal").write_text("where it was")
    stage.write(0, memoryview(noise(3, 20_000)))
    stage.zero(4096, 4096)
    stage.sync()
    stage.drop_cache()
    data = bytearray(4096)
    stage.read_into(0, memoryview(data))
    assert bytes(data) == noise(3, 20_000)[:4096]
    stage.close()
    again = Replica(other.directory).backend
    again.recover()
    stage = again.open_stage(first.id, second.id, second.size_bytes)
    assert stage.resumed
    assert (stage.directory / "journal").read_text() == "where it was"
    stage.read_into(4096, memoryview(data))
    assert not any(data)
    stage.close()
    stage = again.open_stage("", second.id, second.size_bytes)
    assert not stage.resumed
    assert not (stage.directory / "journal").exists()
    stage.close()
    again.discard_stage()
    assert not (other.root / "stage").exists()
    again.discard_stage()
    with pytest.raises(Refused) as refused:
        again.open_stage("gone", second.id, second.size_bytes)
    assert refused.value.reason == "BASE_GONE"


# Commit: what is replaced, and what is kept.


def test_commit_compares_and_sets(replica, other):
    replica.create()
    replica.snapshot()
    other.receive(replica)
    tip = replica.snapshot()
    stage, _ = other.stage_from(replica, "", tip)
    with pytest.raises(Refused) as refused:
        other.backend.commit(stage, other.order(replica.lineage, expected_tip="another"))
    assert refused.value.reason == "TARGET_CHANGED"
    other.backend.commit(stage, other.order(replica.lineage))
    stage, _ = other.stage_from(replica, "", tip)
    assert other.backend.commit(stage, other.order(replica.lineage, expected_tip="the one before")) == ()
    assert other.lineage.tip_id == tip.id


def test_a_written_live_copy_is_preserved(replica, other, place):
    replica.create()
    first = replica.snapshot()
    other.receive(replica)
    replica.write(100, noise(5, 9000))
    tip = replica.snapshot()
    stage, _ = other.stage_from(replica, first.id, tip)
    other.write(SIZE // 3, b"only here")
    mine = other.content
    (kept,) = other.backend.commit(stage, other.order(replica.lineage))
    assert other.content == replica.content
    assert (kept.live, kept.based_on, kept.cp, kept.size_bytes, kept.resync_id) == (
        True,
        first.id,
        first.cp,
        SIZE,
        "r1",
    )
    assert other.backend.examine().preserved == (kept,)
    assert other.backend.export(kept.id, place / "out.img", writable=True) == SIZE
    assert (place / "out.img").read_bytes() == mine
    assert (place / "out.img").stat().st_mode & 0o777 == 0o600
    with pytest.raises(Invalid, match="already"):
        other.backend.export(kept.id, place / "out.img", writable=True)
    # Asked again, it is done, and tells what it preserved.
    stage, _ = other.stage_from(replica, "", tip)
    assert other.backend.commit(stage, other.order(replica.lineage, expected_tip=first.id)) == (kept,)
    assert other.backend.drop(kept.id) > 0
    assert other.backend.examine().preserved == ()


def test_export_of_a_snapshot(replica, place):
    replica.create()
    taken = replica.snapshot()
    before = replica.content
    replica.write(0, b"later")
    assert replica.backend.export(taken.id, place / "out.img", writable=False) == SIZE
    assert (place / "out.img").read_bytes() == before
    assert (place / "out.img").stat().st_blocks * 512 <= 2 << 20
    with pytest.raises(NotFound):
        replica.backend.export("nothing", place / "out2.img", writable=False)
    with pytest.raises(Invalid, match="no directory"):
        replica.backend.export(taken.id, place / "no" / "out.img", writable=False)


def diverge(replica: Replica, other: Replica) -> tuple[str, dict[str, bytes]]:
    """Both have 1-1; the other goes on alone, with two CPs and live writes; the first takes 2-2."""
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    contents = {}
    for turn in range(2):
        other.write(turn * 100_000, noise(turn, 5000))
        contents[other.snapshot().id] = other.content
    other.write(300_000, b"live")
    contents["live"] = other.content
    replica.write(500_000, noise(50, 5000))
    replica.snapshot(epoch=2)
    return base.id, contents


def test_a_diverged_replica_is_preserved_whole(replica, other, place):
    base, contents = diverge(replica, other)
    stage, _ = other.stage_from(replica, base, replica.lineage.tip)
    with pytest.raises(Refused) as refused:
        other.backend.commit(stage, other.order(replica.lineage))
    assert refused.value.reason == "TARGET_CHANGED"
    assert other.content == contents["live"]
    kept = other.backend.commit(stage, other.order(replica.lineage, replace_own_data=True))
    assert other.content == replica.content
    assert other.lineage.ids() == replica.lineage.ids()
    assert state(other) is LiveState.UNMODIFIED
    assert {("live" if copy.live else copy.based_on) for copy in kept} == set(contents)
    assert set(other.backend.examine().preserved) == set(kept)
    for copy in kept:
        out = place / copy.id
        other.backend.export(copy.id, out, writable=False)
        assert out.read_bytes() == contents["live" if copy.live else copy.based_on]
    # It goes on as a replica like any other.
    replica.write(0, b"more")
    tip = replica.lineage.tip_id
    replica.snapshot(epoch=2)
    other.receive(replica, tip)
    assert other.content == replica.content
    assert Replica(other.directory).lineage.ids() == replica.lineage.ids()


def test_what_a_preserved_copy_holds_alone_is_counted_from_what_is_there(replica, other):
    base, _ = diverge(replica, other)
    first, *_ = reversed(other.lineage.after(base))
    other.backend.drop(first.id)
    stage, _ = other.stage_from(replica, base, replica.lineage.tip)
    kept = other.backend.commit(stage, other.order(replica.lineage, replace_own_data=True))
    assert kept
    for copy in kept:
        assert 0 < copy.exclusive_bytes < (64 << 10 if other.backend.examine().reflink else SIZE)


def test_going_back_to_an_older_snapshot(replica, other):
    """The new lineage ends at a snapshot that is here: its own data is the stage, the newer ones are preserved."""
    base, contents = diverge(replica, other)
    older = replica.lineage.since(base)
    stage = other.open_stage(base, base, SIZE)
    kept = other.backend.commit(stage, other.order(older, replace_own_data=True))
    assert len(kept) == 3
    assert other.lineage.tip_id == base
    assert other.content == other.data(base).read_bytes() == replica.data(base).read_bytes()
    assert contents["live"] != other.content


def test_cleaning_a_live_copy(replica):
    """A stage of the tip on the tip restores a written, or a removed, live copy."""
    replica.create()
    taken = replica.snapshot()
    before = replica.content
    replica.write(77, b"oops")
    stage = replica.open_stage(taken.id, taken.id, SIZE)
    (kept,) = replica.backend.commit(stage, replica.order(replica.lineage))
    assert kept.live
    assert replica.content == before
    replica.path.unlink()
    found = replica.backend.examine()
    assert (found.presence, found.live.state) == (Presence.PRESENT, LiveState.ABSENT)
    stage = replica.open_stage(taken.id, taken.id, SIZE)
    assert replica.backend.commit(stage, replica.order(replica.lineage)) == ()
    assert replica.content == before
    assert state(replica) is LiveState.UNMODIFIED


def test_data_with_nothing_in_common(replica, other, place):
    replica.create()
    tip = replica.snapshot()
    other.path.write_bytes(noise(99, 70_000))
    mine = other.content
    stage, _ = other.stage_from(replica, "", tip)
    with pytest.raises(Refused) as refused:
        other.backend.commit(stage, other.order(replica.lineage))
    assert refused.value.reason == "REPLICA_UNRELATED"
    (kept,) = other.backend.commit(stage, other.order(replica.lineage, replace_unrelated=True))
    assert (kept.live, kept.based_on, kept.size_bytes) == (True, "", 70_000)
    other.backend.export(kept.id, place / "out", writable=False)
    assert (place / "out").read_bytes() == mine
    assert other.content == replica.content


def test_another_volume(replica, place):
    replica.create()
    tip = replica.snapshot()
    foreign = Replica(place / "f", volume_id="another")
    foreign.create(data=8192)
    foreign.snapshot()
    own = foreign.content
    foreign.volume_id = VOLUME_ID
    stage, _ = foreign.stage_from(replica, "", tip)
    with pytest.raises(Refused) as refused:
        foreign.backend.commit(stage, foreign.order(replica.lineage, replace_own_data=True))
    assert refused.value.reason == "REPLICA_FOREIGN"
    kept = foreign.backend.commit(stage, foreign.order(replica.lineage, replace_unrelated=True))
    assert [copy.live for copy in kept] == [False], "the live copy was that snapshot"
    assert Path(kept[0].path).read_bytes() == own
    assert foreign.backend.examine().volume_id == VOLUME_ID


def test_preserved_copies_are_bounded(replica, place):
    replica.create()
    first = replica.snapshot()
    small = Replica(place / "small", preserved_max_count=1)
    small.receive(replica)
    for turn in range(2):
        small.write(turn, b"mine")
        replica.write(10_000 + turn, b"theirs")
        base = replica.lineage.tip_id
        tip = replica.snapshot()
        stage, _ = small.stage_from(replica, base, tip)
        if turn == 0:
            small.backend.commit(stage, small.order(replica.lineage))
            continue
        mine = small.content
        with pytest.raises(Refused) as refused:
            small.backend.commit(stage, small.order(replica.lineage))
        assert refused.value.reason == "PRESERVED_FULL"
        assert small.content == mine
        small.backend.drop(small.backend.examine().preserved[0].id)
        small.backend.commit(stage, small.order(replica.lineage))
        assert small.content == replica.content
    assert small.lineage.find(first.id)


# Letting go.


def test_prune(replica):
    replica.create()
    taken = []
    for turn in range(5):
        replica.write(20_000, noise(turn, 15_000))
        taken.append(replica.snapshot())
    dropped = replica.backend.prune(2, frozenset({taken[0].id}))
    assert {gone for gone, _ in dropped} == {taken[1].id, taken[2].id}
    assert all(freed > 0 for _, freed in dropped)
    lineage = replica.lineage
    assert [record.present for record in lineage] == [True, True, False, False, True]
    assert lineage.ids() == {record.id for record in taken}
    assert replica.backend.prune(0, frozenset()) != ()
    assert [record.present for record in replica.lineage] == [True, False, False, False, False]
    assert state(replica) is LiveState.UNMODIFIED
    with pytest.raises(Refused) as refused:
        replica.backend.drop(taken[-1].id)
    assert refused.value.reason == "PINNED"
    assert replica.backend.drop(taken[0].id) == 0
    with pytest.raises(NotFound):
        replica.backend.drop("unknown")
    with pytest.raises(Refused):
        replica.backend.delta_map(taken[0].id, taken[-1].id)


def test_prune_and_receive_go_together(replica, other):
    """Spares, pruned bases and exchanged inodes: the lineage and the bytes stay right over many rounds."""
    replica.create()
    base = ""
    for turn in range(6):
        replica.write(turn * 30_000, noise(turn, 10_000))
        tip = replica.snapshot()
        other.receive(replica, base)
        base = tip.id
        for each in (replica, other):
            each.backend.prune(2, frozenset())
        assert other.content == replica.content
        assert len(list(other.root.glob(".spare-*"))) <= 1
    assert other.backend.examine().preserved == ()
    assert len(other.lineage) == 6


def test_a_late_writer_of_the_spare_is_not_lost(replica, other, kind):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    replica.write(0, b"one")
    middle = replica.snapshot()
    other.receive(replica, base.id)
    if kind == "ext4":
        assert not list(other.root.glob(".spare-*")), "a spare saves nothing where files share no extents"
        return
    (spare,) = other.root.glob(".spare-*")
    with spare.open("r+b") as file:
        file.write(b"late")
    replica.write(0, b"two")
    replica.snapshot()
    other.receive(replica, middle.id)
    (kept,) = other.backend.examine().preserved
    assert Path(kept.path).read_bytes()[:4] == b"late"


# Space.


def test_reserve(place):
    replica = Replica(place / "a")
    replica.create()
    taken = replica.snapshot()
    delta = replica.backend.delta_map("", taken.id)
    assert replica.backend.check_space(delta) >= 2 * delta.data_bytes
    full = Replica(place / "a", reserve_min_bytes=1 << 50)
    found = full.backend.examine()
    assert found.reserve_bytes == 1 << 50
    for attempt in (
        full.snapshot,
        lambda: full.backend.check_space(delta),
        lambda: full.backend.open_stage("", "s", 4096),
    ):
        with pytest.raises(Refused) as refused:
            attempt()
        assert refused.value.reason == "NO_SPACE"
    assert len(full.lineage) == 1
    most = replica.backend.examine().free_bytes - (70 << 20)
    tight = Replica(place / "a", reserve_min_bytes=most)
    assert tight.backend.check_space(replica.backend.delta_map(taken.id, taken.id)) > 0
    with pytest.raises(Refused):
        Replica(place / "a", reserve_min_bytes=most).backend.check_space(
            type(delta).of(1 << 30, [DeltaRange(0, 1 << 28)])
        )


def test_wrong_stage_is_refused(replica, other):
    replica.create()
    replica.snapshot()
    stage = other.open_stage("", str(uuid.uuid4()), SIZE)
    with pytest.raises(Invalid):
        other.backend.commit(stage, other.order(replica.lineage))
    with pytest.raises(Invalid):
        other.backend.commit(stage, other.order(Lineage()))
    stage.close()
