"""Long random histories of two replicas, with kills: equal ids are equal bytes, and nothing written is ever lost."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from agent.backends import image_commit
from agent.backends.image_layout import append_records, load_state
from agent.disk.durable import read_json, write_json
from resilver.errors import Damaged
from resilver.lineage import Lineage, Snapshot, newest_in_common
from resilver.volume import LiveState
from tests.agent.backends.replica import SIZE, Replica, noise
from tests.agent.backends.test_crash import killed


@pytest.fixture(params=["xfs", "btrfs-compressed", "ext4"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def sha(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


class World:
    """A source, a target, and what is known of every snapshot and of everything that was written on the target."""

    def __init__(self, place: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.source = Replica(place / "a", preserved_max_count=1000)
        self.target = Replica(place / "b", preserved_max_count=1000)
        self.source.create()
        self.bytes_of: dict[str, str] = {}
        self.written: set[str] = set()
        self.took(self.source, self.source.snapshot())

    def took(self, replica: Replica, taken: Snapshot) -> None:
        self.bytes_of[taken.id] = sha(replica.content)

    def write(self, replica: Replica) -> None:
        if not replica.path.exists():
            return
        size = replica.path.stat().st_size
        what = self.chance.randrange(4)
        at = self.chance.randrange(max(1, size - 20_000))
        if what == 0:
            replica.resize(self.chance.choice([SIZE, SIZE + 5000, SIZE - 70_000]))
        elif what == 1:
            replica.punch(at, self.chance.randrange(1, 20_000))
        else:
            replica.write(at, noise(self.chance.randrange(1 << 30), self.chance.randrange(1, 20_000)))

    def snapshot(self, replica: Replica) -> None:
        if replica.path.exists() and replica.lineage.records:
            self.took(replica, replica.snapshot(epoch=1 if replica is self.target else 2))

    def prune(self, replica: Replica) -> None:
        replica.backend.prune(self.chance.randrange(1, 4), frozenset())

    def receive(self, step: str) -> None:
        """Brings the target to the source's tip; killed at a step, if one is given, and then done."""
        lineage = self.source.lineage
        found = self.target.backend.examine()
        if found.lineage.tip_id == lineage.tip_id and found.live.state is LiveState.UNMODIFIED:
            return
        if found.live.state is LiveState.MODIFIED:
            self.written.add(sha(self.target.content))
        common = newest_in_common(found.lineage, lineage)
        base = common.id if isinstance(common, Snapshot) else ""
        stage, _ = self.target.stage_from(self.source, base, lineage.tip)
        stage.close()
        before = self.target.lineage.tip_id

        def work(at=lambda _name: None) -> None:
            replica = Replica(self.target.directory, step=at, preserved_max_count=1000)
            stage = replica.backend.open_stage(base, lineage.tip_id, lineage.tip.size_bytes)
            order = replica.order(lineage, expected_tip=before, replace_own_data=True, replace_unrelated=True)
            replica.backend.commit(stage, order)
            stage.close()

        if step:
            killed(work, step)
            self.target.backend.recover()
            self.check()
        work()
        self.target.backend.discard_stage()
        assert self.target.content == self.source.content or self.source.backend.examine().live.state is not (
            LiveState.UNMODIFIED
        )
        assert sha(self.target.content) == self.bytes_of[lineage.tip_id]
        assert self.target.backend.examine().live.state is LiveState.UNMODIFIED

    def check(self) -> None:
        for replica in (self.source, self.target):
            for record in replica.lineage:
                if record.present:
                    assert sha(replica.data(record.id).read_bytes()) == self.bytes_of[record.id]
        kept = {sha(Path(copy.path).read_bytes()) for copy in self.target.backend.examine().preserved}
        if self.target.path.exists():
            kept.add(sha(self.target.content))
        assert self.written <= kept | set(self.bytes_of.values())


@pytest.mark.parametrize("seed", [1, 2])
def test_random_history(place, seed):
    world = World(place, seed)
    for _ in range(30):
        act = world.chance.randrange(8)
        if act <= 1:
            world.write(world.source)
        elif act == 2:
            world.snapshot(world.source)
        elif act == 3:
            world.write(world.target)
        elif act == 4 and world.chance.random() < 0.5:
            world.snapshot(world.target)
        elif act == 5:
            world.prune(world.chance.choice([world.source, world.target]))
        else:
            world.receive(world.chance.choice(["", *image_commit.STEPS]))
        world.check()


# What stands on disk is never guessed at.


@pytest.mark.parametrize("kind", ["xfs"])
def test_a_damaged_record_is_named(replica):
    replica.create()
    taken = replica.snapshot()
    path = replica.root / taken.id / "record.json"
    path.write_bytes(path.read_bytes().replace(b"crash", b"crush").replace(b"closed", b"clOsed"))
    with pytest.raises(Damaged, match=taken.id):
        replica.backend.examine()


@pytest.mark.parametrize("kind", ["xfs"])
def test_two_tips_are_refused(replica, other):
    replica.create()
    mine = replica.snapshot()
    other.create()
    theirs = other.snapshot()
    (other.root / theirs.id).rename(replica.root / theirs.id)
    with pytest.raises(Damaged, match="no single lineage") as refused:
        replica.backend.examine()
    assert mine.id in refused.value.message
    assert theirs.id in refused.value.message


@pytest.mark.parametrize("kind", ["xfs"])
def test_branches_in_the_log_are_no_tips(replica):
    replica.create()
    first = replica.snapshot()
    state = load_state(replica.backend._layout)
    branch = [Snapshot("b1", parent=first.id), Snapshot("b2", parent="b1"), Snapshot("c1", parent="elsewhere")]
    append_records(replica.backend._layout, branch, state)
    append_records(replica.backend._layout, branch, state)
    assert len((replica.root / "ancestry.jsonl").read_text().splitlines()) == 1
    assert replica.lineage == Lineage((first,))
    second = replica.snapshot()
    assert [record.id for record in replica.lineage] == [second.id, first.id]


@pytest.mark.parametrize("kind", ["xfs"])
def test_parents_in_a_circle_are_refused(replica):
    replica.create()
    first = replica.snapshot()
    path = replica.root / first.id / "record.json"
    write_json(path, {**read_json(path), "parent": "x"})
    append_records(replica.backend._layout, [Snapshot("x", parent=first.id)], load_state(replica.backend._layout))
    with pytest.raises(Damaged, match=r"circle|contradict"):
        replica.backend.examine()


@pytest.mark.parametrize("kind", ["xfs"])
def test_a_snapshot_without_data_is_not_present(replica):
    replica.create()
    first = replica.snapshot()
    replica.data(first.id).unlink()
    found = replica.backend.examine()
    assert [record.present for record in found.lineage] == [False]
    assert found.live.state is LiveState.UNKNOWN
    replica.snapshot()
    assert [record.present for record in replica.lineage] == [True, False]
