"""Two agents and real orders: first copies, deltas, refusals, and what an operator would see of each."""

from __future__ import annotations

import os
import uuid

import pytest

from resilver.errors import ResilverError
from resilver.v1 import agent_pb2, agent_pb2_grpc, volume_pb2
from tests.agent.agents import MIB, Leader, agents, scatter, write_image

VOLUMES = tuple(f"vm{number}" for number in range(1, 24))
SUCCEEDED = volume_pb2.RESYNC_STATE_SUCCEEDED
FAILED = volume_pb2.RESYNC_STATE_FAILED
BLOCKED = volume_pb2.RESYNC_STATE_BLOCKED
UNMODIFIED = volume_pb2.LIVE_STATE_UNMODIFIED


@pytest.fixture(scope="module")
def pair(xfs, tmp_path_factory):
    place = xfs / "pair"
    place.mkdir()
    with agents(tmp_path_factory.mktemp("pair"), place, "a", "b", volumes=VOLUMES) as made:
        yield made


@pytest.fixture(scope="module")
def names():
    return iter(VOLUMES)


@pytest.fixture
def leader(names):
    """A leader with a volume of its own, so that tests may share the agents."""
    return Leader(volume=next(names))


@pytest.fixture
def mirrored(pair, leader):
    """Both agents, their leader, and the snapshot that they have in common."""
    a, b = pair
    write_image(a.image(leader.volume), 8 * MIB)
    a.open_epoch(leader)
    first = a.snapshot(leader, opening=True)
    b.open_epoch(leader, primary="a")
    assert b.resync(leader, a, "", first.id, expected_tip="").state == SUCCEEDED
    return a, b, leader, first.id


def reason_of(call, *args, **kwargs):
    with pytest.raises(ResilverError) as caught:
        call(*args, **kwargs)
    return caught.value.reason


def same(a, b, volume):
    return a.image(volume).read_bytes() == b.image(volume).read_bytes()


def test_a_first_copy_moves_what_is_allocated(pair, leader):
    a, b = pair
    image = a.image(leader.volume)
    write_image(image, 16 * MIB)
    allocated = image.stat().st_blocks * 512
    a.open_epoch(leader)
    first = a.snapshot(leader, opening=True)
    assert first.cp.text == "1-1"
    run = b.resync(leader, a, "", first.id, expected_tip="")
    assert run.state == SUCCEEDED, run
    assert same(a, b, leader.volume)
    assert run.done_bytes == run.total_bytes <= allocated
    found = b.examine(leader.volume)
    assert found.live.state == UNMODIFIED
    assert found.volume_id == leader.volume_id
    assert not found.HasField("grant")


def test_a_delta_moves_the_changed_blocks_and_what_was_said(mirrored):
    a, b, leader, base = mirrored
    changed = scatter(a.image(leader.volume), 50)
    second = a.snapshot(leader)
    assert second.cp.text == "1-2"
    said = a.prepare(leader, "", base, second.id, "b", size_only=True)
    run = b.resync(leader, a, base, second.id, expected_tip=base)
    assert run.state == SUCCEEDED, run
    assert run.done_bytes == said.delta_bytes == changed
    assert run.range_count == said.range_count
    assert run.wire_bytes < 1.03 * changed
    assert same(a, b, leader.volume)
    assert [record.id for record in b.records(leader.volume)] == [second.id, base]


@pytest.mark.parametrize("size_bytes", [9 * MIB + 4096, 5 * MIB])
def test_an_image_that_grew_or_shrank(mirrored, size_bytes):
    a, b, leader, base = mirrored
    with a.image(leader.volume).open("r+b") as image:
        image.truncate(size_bytes)
        image.seek(size_bytes - 4096)
        image.write(b"end" * 100)
    second = a.snapshot(leader)
    assert b.resync(leader, a, base, second.id).state == SUCCEEDED
    assert same(a, b, leader.volume)


def test_memory_and_time_do_not_grow_with_the_size_of_the_volume(pair, leader):
    a, b = pair
    with a.image(leader.volume).open("wb") as image:
        image.truncate(1 << 40)
        for at in range(0, 1 << 40, 1 << 36):
            image.seek(at)
            image.write(os.urandom(MIB))
    a.open_epoch(leader)
    first = a.snapshot(leader, opening=True)
    run = b.resync(leader, a, "", first.id, expected_tip="")
    assert (run.state, run.done_bytes) == (SUCCEEDED, 16 * MIB), run
    scatter(a.image(leader.volume), 50)
    second = a.snapshot(leader)
    assert b.resync(leader, a, first.id, second.id).done_bytes == 50 * 4096
    stat = b.image(leader.volume).stat()
    assert stat.st_size == 1 << 40
    assert stat.st_blocks * 512 < 32 * MIB, "holes stay holes"
    assert b.examine(leader.volume).live.state == UNMODIFIED
    for agent in pair:
        assert agent.process.memory_peak_bytes() < 200 * MIB


def test_orders_are_idempotent(mirrored):
    a, b, leader, base = mirrored
    request = str(uuid.uuid4())
    scatter(a.image(leader.volume), 3)
    taken = a.snapshot(leader, request_id=request)
    assert a.snapshot(leader, request_id=request) == taken
    assert reason_of(a.snapshot, leader, request_id=request, note="other") == "REQUEST_ID_REUSED"
    assert a.snapshot(leader, opening=True) == taken, "the epoch has its opening CP"
    assert a.snapshot(leader, only_if_modified=True) == taken
    a.open_epoch(leader)
    run = b.resync(leader, a, base, taken.id, expected_tip=base)
    again = b.receive(leader, run.resync_id, base, taken.id, a, expected_tip=base)
    assert again == run
    another = b.resync(leader, a, base, taken.id, expected_tip=base)
    assert (another.state, another.wire_bytes) == (SUCCEEDED, 0), "the goal was in the lineage"


def test_a_tip_that_moved_is_refused(mirrored):
    a, b, leader, base = mirrored
    scatter(a.image(leader.volume), 3)
    second = a.snapshot(leader)
    assert reason_of(b.receive, leader, "r", base, second.id, a, expected_tip="another") == "TARGET_CHANGED"
    assert b.tip(leader.volume) == base


def test_a_base_that_is_not_the_same_is_found_before_a_byte_moves(mirrored):
    a, b, leader, base = mirrored
    size = a.image(leader.volume).stat().st_size
    with b.snapshot_data(leader.volume, base).open("r+b") as rotten:
        rotten.write(os.urandom(size))
    before = b.image(leader.volume).read_bytes()
    scatter(a.image(leader.volume), 3)
    second = a.snapshot(leader)
    run = b.resync(leader, a, base, second.id)
    assert (run.state, run.reason, run.wire_bytes) == (FAILED, "BASE_MISMATCH", 0)
    assert b.image(leader.volume).read_bytes() == before
    assert b.tip(leader.volume) == base


@pytest.mark.parametrize("which", ["base", "target"])
def test_a_source_whose_snapshot_was_written_to_is_damaged_and_not_this_node(mirrored, which):
    a, b, leader, base = mirrored
    scatter(a.image(leader.volume), 3)
    second = a.snapshot(leader)
    resync_id = str(uuid.uuid4())
    a.prepare(leader, resync_id, base, second.id, b.node)
    with a.snapshot_data(leader.volume, base if which == "base" else second.id).open("r+b") as written:
        written.write(b"later")
    assert reason_of(a.prepare, leader, "another", base, second.id, b.node) == "BASE_MISMATCH"
    b.receive(leader, resync_id, base, second.id, a)
    run = b.ended(resync_id)
    assert (run.state, run.reason, run.wire_bytes) == (FAILED, "SOURCE_DAMAGED", 0)
    assert "a: " in run.message
    assert "was written to after it was taken" in run.message
    assert b.tip(leader.volume) == base


def test_a_modified_live_copy_is_put_back_and_kept(mirrored):
    _a, b, leader, base = mirrored
    image = b.image(leader.volume)
    clean = image.read_bytes()
    scatter(image, 5, seed=9)
    written = image.read_bytes()
    resync_id = str(uuid.uuid4())
    b.receive(leader, resync_id, base, base, expected_tip=base, replace_own_data=True)
    run = b.ended(resync_id)
    assert run.state == SUCCEEDED, run
    assert image.read_bytes() == clean
    (kept,) = b.examine(leader.volume).preserved
    assert [kept.id] == list(run.preserved)
    with open(kept.path, "rb") as file:  # noqa: PTH123 - the path is text from the wire
        assert file.read() == written
    scatter(image, 5, seed=10)
    assert reason_of(b.receive, leader, "r2", base, base, replace_own_data=True) == "KEEPS_BEING_WRITTEN"
    problems = b.examine(leader.volume).problems
    assert any("KEEPS_BEING_WRITTEN" in problem for problem in problems)


def test_a_diverged_replica_is_replaced_only_if_told(mirrored):
    a, b, leader, base = mirrored
    own = Leader(volume=leader.volume, volume_id=leader.volume_id, epoch=2, epoch_id="epoch-2")
    b.open_epoch(own)
    scatter(b.image(leader.volume), 5, seed=7)
    theirs = b.snapshot(own, opening=True)
    assert theirs.cp.text == "2-2"
    third = Leader(volume=leader.volume, volume_id=leader.volume_id, epoch=3, epoch_id="epoch-3")
    a.open_epoch(third)
    b.open_epoch(third, primary="a")
    assert not b.examine(leader.volume).HasField("grant"), "the higher epoch ends the grant"
    ours = a.snapshot(third, opening=True)
    refused = b.resync(third, a, base, ours.id, expected_tip=theirs.id)
    assert (refused.state, refused.reason) == (FAILED, "TARGET_CHANGED")
    run = b.resync(third, a, base, ours.id, expected_tip=theirs.id, replace_own_data=True)
    assert run.state == SUCCEEDED, run
    assert same(a, b, leader.volume)
    assert [(kept.cp.text, kept.live) for kept in b.examine(leader.volume).preserved] == [("2-2", False)]


def test_a_copy_in_use_blocks_and_goes_on_when_it_is_closed(mirrored):
    a, b, leader, base = mirrored
    scatter(a.image(leader.volume), 20)
    second = a.snapshot(leader)
    with b.image(leader.volume).open("rb"):
        run = b.resync(leader, a, base, second.id)
        assert (run.state, run.reason) == (BLOCKED, "IN_USE")
        assert f"pid {os.getpid()}" in run.message
        found = b.examine(leader.volume)
        assert found.live.in_use
        assert f"pid {os.getpid()}" in found.live.in_use_by[0]
    assert b.resync(leader, a, base, second.id).state == SUCCEEDED
    assert same(a, b, leader.volume)


def test_a_primary_whose_grant_is_on_its_way_does_not_receive(mirrored):
    """The record of its epoch came, and then somebody died: what was elected stays what it is."""
    a, b, leader, base = mirrored
    scatter(a.image(leader.volume), 3)
    second = a.snapshot(leader)
    leader.epoch, leader.epoch_id = 2, "epoch-2"
    b.open_epoch(leader, primary="b", grant=False)
    assert reason_of(b.receive, leader, "r", base, second.id, a, expected_tip=base) == "PRIMARY_UNCLEAR"
    assert b.tip(leader.volume) == base


def test_epochs_and_grants_are_held_to(mirrored):
    a, b, leader, base = mirrored
    late = Leader(volume=leader.volume, volume_id=leader.volume_id, epoch=2, epoch_id="epoch-2")
    assert reason_of(a.snapshot, late) == "PRIMARY_UNCLEAR", "no grant of that epoch"
    assert reason_of(b.snapshot, leader) == "PRIMARY_UNCLEAR"
    a.open_epoch(late)
    assert reason_of(a.snapshot, leader) == "STALE_EPOCH"
    assert reason_of(a.open_epoch, leader) == "STALE_EPOCH"
    other = Leader(volume=leader.volume, volume_id=leader.volume_id, epoch=2, epoch_id="another")
    assert reason_of(a.open_epoch, other) == "EPOCH_CONFLICT"
    assert reason_of(a.snapshot, other) == "EPOCH_CONFLICT"
    foreign = Leader(volume=leader.volume, epoch=9, epoch_id="epoch-9")
    for call in (a.open_epoch, a.snapshot):
        assert reason_of(call, foreign) == "REPLICA_FOREIGN"
    assert reason_of(b.receive, foreign, "r", base, "s9", a) == "REPLICA_FOREIGN"
    assert reason_of(a.receive, late, "r", base, "s9", b) == "PRIMARY_UNCLEAR", "a primary never receives"
    assert a.tip(leader.volume) == b.tip(leader.volume) == base


def test_what_is_unknown_or_wrong_is_named(pair, leader):
    a, _b = pair
    assert reason_of(a.open_epoch, Leader(volume="vm99")) == "VOLUME_NOT_FOUND"
    assert reason_of(a.open_epoch, Leader(volume=leader.volume, cluster="prod")) == "CLUSTER_MISMATCH"
    assert reason_of(a.open_epoch, Leader(volume=leader.volume, store_id="store-2")) == "WRONG_STORE"
    assert reason_of(a.open_epoch, Leader(volume=leader.volume, leader_id="leader-2")) == "STALE_TERM"
    assert reason_of(a.open_epoch, Leader(volume="../etc")) == "INVALID_FIELD"
    assert reason_of(a.open_epoch, leader, epoch=7) == "INVALID_FIELD", "the record is of another epoch"
    assert reason_of(a.open_epoch, leader, primary="b", grant=True) == "INVALID_FIELD"
    assert reason_of(a.prepare, leader, "r", "", "s1", "b") == "TARGET_GONE"
    clone = agent_pb2.CloneSnapshotRequest(header=leader.header(), id="s1", path="relative")
    assert reason_of(a.call, "CloneSnapshot", clone) == "INVALID_FIELD"


def test_a_source_serves_whoever_shows_a_ticket(mirrored):
    a, _b, leader, base = mirrored
    peer = agent_pb2_grpc.PeerStub
    delta = agent_pb2.StreamDeltaRequest(
        resync_id="t1", ticket="t1", volume=leader.volume, base="", target=base, target_node="b"
    )
    with pytest.raises(ResilverError) as caught:
        list(a.stream(delta))
    assert caught.value.reason == "TICKET_INVALID"
    size = a.prepare(leader, "t1", "", base, "b")
    pages = list(a.stream(delta))
    ranges = [each for page in pages for each in page.ranges]
    assert sum(each.length for each in ranges if not each.zero) == size.delta_bytes
    assert [record.id for page in pages for record in page.records] == [base]
    rest = list(a.stream(delta, starting_offset=ranges[-1].offset))
    assert [each for page in rest for each in page.ranges] == ranges[-1:]
    asked = agent_pb2.DigestRangesRequest(
        resync_id="t1", ticket="t1", volume=leader.volume, snapshot=base, target_node="b", ranges=ranges[:2]
    )
    assert [len(each) for each in a.call("DigestRanges", asked, peer).digests] == [32, 32]
    for change in ({"ticket": "t2"}, {"target_node": "c"}, {"snapshot": "s9"}, {"resync_id": "t9"}):
        wrong = agent_pb2.DigestRangesRequest()
        wrong.CopyFrom(asked)
        for name, value in change.items():
            setattr(wrong, name, value)
        assert reason_of(a.call, "DigestRanges", wrong, peer) == "TICKET_INVALID"
    drop = agent_pb2.DropSnapshotRequest(header=leader.header(), id=base)
    assert reason_of(a.call, "DropSnapshot", drop) == "PINNED"


def test_an_order_to_receive_that_comes_after_the_one_to_stop_begins_nothing(mirrored):
    a, b, leader, base = mirrored
    scatter(a.image(leader.volume), 6)
    second, resync_id = a.snapshot(leader), str(uuid.uuid4())
    stop = agent_pb2.StopTransferRequest(header=leader.header(), resync_id=resync_id)
    assert reason_of(b.call, "StopTransfer", stop) == "RESYNC_NOT_FOUND"
    a.prepare(leader, resync_id, base, second.id, "b")
    told = b.receive(leader, resync_id, base, second.id, a)
    assert (told.state, told.reason) == (volume_pb2.RESYNC_STATE_CANCELLED, "CANCELLED")
    assert b.run(resync_id) is None
    assert b.resync(leader, a, base, second.id).state == volume_pb2.RESYNC_STATE_SUCCEEDED


def test_snapshots_are_exported_and_dropped(mirrored):
    a, _b, leader, base = mirrored
    original = a.image(leader.volume).read_bytes()
    scatter(a.image(leader.volume), 5)
    a.snapshot(leader)
    path = a.place / f"out-{leader.volume}.img"
    clone = agent_pb2.CloneSnapshotRequest(header=leader.header(), id=base, path=str(path))
    assert a.call("CloneSnapshot", clone).size_bytes == len(original)
    assert path.read_bytes() == original
    drop = agent_pb2.DropSnapshotRequest(header=leader.header(), id=base)
    a.call("StopTransfer", agent_pb2.StopTransferRequest(header=leader.header(), resync_id=leader.resyncs[-1]))
    a.call("DropSnapshot", drop)
    assert [record.present for record in a.records(leader.volume)] == [True, False]
    assert reason_of(a.prepare, leader, "r", base, a.tip(leader.volume), "b") == "BASE_GONE"


def test_data_that_was_there_is_lost_and_never_empty(mirrored):
    a, b, leader, base = mirrored
    volume = leader.volume
    away = b.place / f"away-{volume}"
    away.mkdir()
    snapshots = b.place / ".resilver" / volume
    b.image(volume).rename(away / "image")
    snapshots.rename(away / "snapshots")
    found = b.examine(volume)
    assert found.presence == volume_pb2.PRESENCE_LOST
    assert found.volume_id == leader.volume_id
    scatter(a.image(volume), 3)
    second = a.snapshot(leader)
    assert reason_of(b.receive, leader, "r", "", second.id, a) == "REPLICA_LOST"
    assert reason_of(b.open_epoch, leader, primary="a") == "REPLICA_LOST"
    assert not snapshots.exists(), "nothing is made where a disk may be mounted again"
    (away / "image").rename(b.image(volume))
    (away / "snapshots").rename(snapshots)
    assert b.examine(volume).presence == volume_pb2.PRESENCE_PRESENT
    assert b.resync(leader, a, base, second.id).state == SUCCEEDED


def test_a_full_disk_costs_the_stage_and_nothing_else(mirrored):
    a, b, leader, base = mirrored
    scatter(a.image(leader.volume), 200)
    second = a.snapshot(leader)
    filler = b.place / "filler"
    stat = os.statvfs(b.place)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - 20 * MIB)
    try:
        run = b.resync(leader, a, base, second.id)
        assert (run.state, run.reason) == (FAILED, "NO_SPACE"), run
        assert b.tip(leader.volume) == base
        assert not (b.place / ".resilver" / leader.volume / "stage").exists()
    finally:
        filler.unlink()
    assert b.resync(leader, a, base, second.id).state == SUCCEEDED
