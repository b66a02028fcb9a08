"""Compacting changes no byte, no time and no delta of any file, whoever writes and whatever interrupts it."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from agent.backends import image_compact
from agent.backends.image_compact import PART_BYTES
from agent.disk import ioctl
from agent.disk.places import places, seams_by_part
from resilver.volume import LiveState
from tests import faults
from tests.agent.backends.crash import killed, reason_of, whole
from tests.agent.backends.fragments import (
    SEAMS_MAX,
    SIZE,
    Picture,
    check_same,
    compact,
    delta,
    files,
    fresh,
    made,
    seams,
    torn,
    used,
)
from tests.agent.backends.replica import BLOCK, Replica, blocks_of, digest, noise
from tests.faults import Fault, faulty
from tests.loopfs import fill, run


@pytest.fixture(params=["xfs", "btrfs", "btrfs-compressed"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_nothing_changes_but_where_it_stands(place, kind):
    replica = torn(place / "a")
    before, torn_by, held = Picture(replica), seams(replica.path), used(place)
    assert torn_by > SEAMS_MAX
    compact(replica)
    check_same(replica, before)
    assert seams(replica.path) <= SEAMS_MAX // 2
    assert seams(replica.data(replica.lineage.tip_id)) <= SEAMS_MAX // 2
    # Btrfs keeps an old extent for as long as a part that is left alone needs any of it.
    assert used(place) < held + (2 << 20 if kind == "xfs" else SIZE)
    assert replica.backend.examine().live.state is LiveState.UNMODIFIED
    whole(replica)
    # What comes after is exact as well, from every snapshot.
    replica.write(123 * BLOCK, noise(99, BLOCK))
    latest = replica.snapshot()
    tip = before_tip = replica.lineage.records[1].id
    assert blocks_of(list(replica.backend.delta_map(tip, latest.id))) == {123}
    for record in replica.lineage.records[2:]:
        known = blocks_of(before.deltas[replica.data(record.id), replica.data(before_tip)])
        assert blocks_of(list(replica.backend.delta_map(record.id, latest.id))) == known | {123}
    assert not replica.backend.compact(lambda: True), "once is enough"


def test_a_member_gets_what_changed_and_no_more(place):
    """A base from before, and a target from after."""
    replica, other = torn(place / "a"), Replica(place / "b")
    base = replica.lineage.tip_id
    other.receive(replica)
    compact(replica)
    assert seams(replica.data(replica.lineage.tip_id)) <= SEAMS_MAX // 2
    replica.write(50 * BLOCK, noise(5, 2 * BLOCK))
    target = replica.snapshot()
    stage, moved = other.stage_from(replica, base, target)
    assert moved.data_bytes == 2 * BLOCK
    other.backend.commit(stage, other.order(replica.lineage))
    assert other.content == replica.content


def test_preserved_copies_and_the_spare_share_as_before(place):
    """On a secondary that had data of its own, and has a spare."""
    source, replica = torn(place / "a"), made(place / "b")
    replica.receive(source)
    base = source.lineage.tip_id
    replica.write(0, noise(77, 30_000))
    source.write(200 * BLOCK, noise(3, BLOCK))
    source.snapshot()
    assert len(replica.receive(source, base)) == 1
    base = source.lineage.tip_id
    chance = random.Random(3)
    for _ in range(400):
        source.write(chance.randrange(SIZE // BLOCK) * BLOCK, noise(8, BLOCK))
    source.snapshot()
    replica.receive(source, base)
    replica.backend.discard_stage()
    before = Picture(replica)
    assert len(before.digests) == 6, "live, three snapshots, one preserved, one spare"
    compact(replica)
    assert seams(replica.data(replica.lineage.tip_id)) <= SEAMS_MAX // 2
    check_same(replica, before)
    replica.backend.recover()
    check_same(replica, before)


def test_not_beside_a_transfer_that_writes(place):
    source, replica = torn(place / "a"), made(place / "b")
    replica.receive(source)
    source.write(0, noise(1, BLOCK))
    source.snapshot()
    replica.stage_from(source, replica.lineage.tip_id, source.lineage.tip)
    assert not replica.backend.compact(lambda: True)


def test_not_beside_a_comparison(place):
    """Blocks that it frees could come back as another file's while two maps are taken."""
    replica = torn(place / "a")
    torn_by = seams(replica.path)
    with replica.backend._compactor.comparing:
        assert not replica.backend.compact(lambda: True)
    assert seams(replica.path) == torn_by
    replica.backend.compact(lambda: True)
    assert seams(replica.path) < torn_by


def test_not_below_the_reserve(place):
    replica = torn(place / "a")
    torn_by = seams(replica.path)
    replica.backend.set_reserve(0.0, replica.backend.examine().free_bytes - 2 * PART_BYTES)
    assert not replica.backend.compact(lambda: True)
    assert seams(replica.path) == torn_by
    replica.backend.set_reserve(0.0, 0)
    replica.backend.compact(lambda: True)
    assert seams(replica.path) < torn_by


def test_a_live_copy_of_its_own(place):
    """Nothing that it has written since is touched, shrunk or grown as it may be, and no delta gains a block."""
    for number, size in enumerate((SIZE, SIZE - 2 * BLOCK - 500, SIZE + 5000)):
        replica = torn(fresh(place / f"{number}"))
        replica.resize(size)
        replica.write(40_000, noise(4, 50_000))
        before = Picture(replica)
        compact(replica)
        assert seams(replica.data(replica.lineage.tip_id)) <= SEAMS_MAX // 2
        check_same(replica, before)
        found = blocks_of(list(replica.backend.delta_map(replica.lineage.tip_id, replica.snapshot().id)))
        assert found == blocks_of(before.deltas[replica.data(replica.lineage.records[1].id), replica.path])


def test_no_live_copy(place):
    replica = torn(place / "a")
    replica.path.unlink()
    before = Picture(replica)
    compact(replica)
    assert seams(replica.data(replica.lineage.tip_id)) <= SEAMS_MAX // 2
    check_same(replica, before)


def test_a_live_copy_that_cannot_be_moved(place):
    """It comes first, so that nothing else has been moved; and it is not tried again before the next snapshot."""
    replica = torn(place / "a")
    before, torn_by = Picture(replica), seams(replica.path)
    run("chattr", "+i", replica.path)
    try:
        assert reason_of(lambda: compact(replica)) == "IO_ERROR"
        assert not replica.backend.compact(lambda: True)
    finally:
        run("chattr", "-i", replica.path)
    after = Picture(replica)
    assert (after.digests, after.deltas) == (before.digests, before.deltas)
    assert seams(replica.path) == torn_by
    replica.snapshot()
    compact(replica)
    assert seams(replica.path) <= SEAMS_MAX // 2


@pytest.mark.parametrize("kind", ["btrfs"])
def test_files_that_are_not_copied_on_write(place):
    """As virtual machine managers make them on Btrfs; only files alike in that can share."""
    fresh(place / "a")
    run("chattr", "+C", place / "a")
    replica = torn(place / "a")
    assert "C" in run("lsattr", replica.path).split()[0]
    before = Picture(replica)
    compact(replica)
    assert seams(replica.path) <= SEAMS_MAX // 2
    check_same(replica, before)


WRITER = """
import mmap, os, random, sys
path, blocks, seed, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
chance = random.Random(seed)
fd = os.open(path, os.O_RDWR)
held = mmap.mmap(fd, blocks * 4096)
written = {}
print("going", flush=True)
os.set_blocking(0, False)
while True:
    at = chance.randrange(blocks)
    data = chance.randbytes(4096)
    if how == "written":
        os.pwrite(fd, data, at * 4096)
    else:
        held[at * 4096 : at * 4096 + 4096] = data
    written[at] = data
    try:
        if not os.read(0, 1):
            break
    except BlockingIOError:
        pass
wrong = [at for at, data in written.items() if os.pread(fd, 4096, at * 4096) != data]
print(len(wrong), *sorted(written), flush=True)
"""


@pytest.mark.parametrize("how", ["written", "mapped"])
def test_beside_a_writer(place, how):
    """It loses nothing that it wrote, and the next delta has its blocks and no others.

    (A write through a mapping makes XFS write a whole large folio anew, whether or not anything is compacted.)
    """
    replica = torn(place / "a")
    digests = {path: digest(path) for path in files(replica)[1:]}
    tip = replica.lineage.tip_id
    blocks = SIZE // BLOCK
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(replica.path), str(blocks), "3", how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert writer.stdout.readline() == b"going\n"
        compact(replica)
        assert seams(replica.data(replica.lineage.tip_id)) <= SEAMS_MAX // 2
    finally:
        out, _ = writer.communicate()
    wrong, *written = map(int, out.split())
    assert wrong == 0
    assert {path: digest(path) for path in files(replica)[1:]} == digests
    found = blocks_of(list(replica.backend.delta_map(tip, replica.snapshot().id)))
    assert set(written) <= found
    assert how == "mapped" or found == set(written)


# Interrupted.


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
@pytest.mark.parametrize("step", image_compact.STEPS)
def test_killed_at_every_step(place, step):
    replica = torn(place / "a")
    before = Picture(replica)
    assert killed(lambda at: made(replica.directory, step=at).backend.compact(lambda: False), step)
    assert {path: digest(path) for path in files(replica)} == before.digests
    left = (replica.root / "compact.json").exists()
    assert left is (step != "compact.closed")
    again = made(replica.directory)
    again.backend.recover()
    check_same(again, before)
    whole(again)
    assert not (replica.root / "compact.json").exists()
    compact(again)
    check_same(again, before)
    assert seams(replica.path) <= SEAMS_MAX // 2


def test_deltas_between_the_kill_and_the_next_start(place):
    """Too large by the part at most, and never too small."""
    replica = torn(place / "a")
    before = Picture(replica)
    assert killed(lambda at: made(replica.directory, step=at).backend.compact(lambda: False), "compact.tip")
    for (base, target), known in before.deltas.items():
        found = blocks_of(delta(base, target))
        assert blocks_of(known) <= found
        assert len(found - blocks_of(known)) <= PART_BYTES // BLOCK


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
@pytest.mark.parametrize("step", ["compact.tip", "compact.live"])
def test_written_to_and_snapshotted_before_the_next_start(place, step):
    """The joining is by contents, with whatever the tip is then."""
    replica = torn(place / "a")
    assert killed(lambda at: made(replica.directory, step=at).backend.compact(lambda: False), step)
    replica.write(10 * BLOCK, noise(5, BLOCK))
    replica.snapshot()
    replica.write(20 * BLOCK, noise(6, BLOCK))
    again = made(replica.directory)
    again.backend.recover()
    ids = [record.id for record in again.lineage]
    assert blocks_of(list(again.backend.delta_map(ids[1], ids[0]))) == {10}
    assert blocks_of(delta(again.data(ids[0]), again.path)) == {20}


@pytest.mark.skipif(bool(faults.available()), reason=faults.available() or "-")
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize(("error", "reason"), [("EIO", "IO_ERROR"), ("ENOSPC", "NO_SPACE")])
def test_a_fault_at_every_step(place, error, reason, lasting):
    """The next call fails, or all from there on: not a byte of any file changes, and a new start puts all together."""
    for number, step in enumerate(image_compact.STEPS):
        replica = torn(place / f"{number}")
        before = Picture(replica)
        fault = Fault(error, step, lasting=lasting)
        outcome = faulty(lambda at, of=replica: compact(made(of.directory, step=at)), replica.directory, fault)
        assert outcome.reason in {"", reason}, outcome
        assert {path: digest(path) for path in files(replica)} == before.digests
        again = made(replica.directory)
        again.backend.recover()
        check_same(again, before)
        whole(again)
        compact(again)
        check_same(again, before)
        assert seams(replica.path) <= SEAMS_MAX // 2
        assert not (replica.root / "compact.json").exists()


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_full_disk(small):
    """The disk fills up at a step: it ends there, nothing is torn, and with room it goes on."""
    for number, step in enumerate(image_compact.STEPS):
        replica = torn(fresh(small / f"{number}"))
        before = Picture(replica)

        def filling(name: str, at: str = step) -> None:
            if name == at and not (small / "filler").exists():
                fill(small)

        filled = made(replica.directory, step=filling)
        assert reason_of(lambda filled=filled: compact(filled)) in {"", "NO_SPACE", "IO_ERROR"}
        assert {path: digest(path) for path in files(replica)} == before.digests
        (small / "filler").unlink()
        again = made(replica.directory)
        again.backend.recover()
        compact(again)
        check_same(again, before)
        for path in files(replica):
            path.unlink()


@pytest.mark.parametrize("kind", ["ext4"])
def test_nothing_to_do_without_shared_extents(place, replica):
    replica.create()
    replica.snapshot()
    assert not replica.backend.compact(lambda: True)


# Places.


def test_places_and_seams(place):
    """By blocks and by windows: the same count, and what is shared is what is not different."""
    replica = torn(place / "a")
    older, tip = (replica.data(record.id) for record in (replica.lineage.records[2], replica.lineage.records[0]))
    with older.open("rb") as old, tip.open("rb") as new:
        parts = seams_by_part(new.fileno(), PART_BYTES)
        floor = 32 if ioctl.fs_magic(new.fileno()) == ioctl.BTRFS_MAGIC else 0
        changed = blocks_of(delta(older, tip))
        for part, count in enumerate(parts.tolist()):
            low = part * PART_BYTES
            mine = places(new.fileno(), low, low + PART_BYTES, BLOCK)
            theirs = places(old.fileno(), low, low + PART_BYTES, BLOCK)
            assert abs(max(0, mine.seams(mine.data) - floor) - count) <= 1
            shared = {low // BLOCK + int(at) for at in np.flatnonzero(mine.shared(theirs))}
            assert not shared & changed
            data = {low // BLOCK + int(at) for at in np.flatnonzero(mine.data)}
            assert data - shared <= changed
            half = places(new.fileno(), low + PART_BYTES // 2, low + PART_BYTES, BLOCK)
            assert (half.shift == mine.shift[len(mine.shift) // 2 :]).all(), "begun within an extent"
