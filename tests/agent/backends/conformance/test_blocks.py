"""What every backend of blocks must give: exact maps, readers, and stages that are written in any order."""

from __future__ import annotations

import pytest

from agent.delta import DeltaRange
from resilver.errors import Invalid, NotFound, Refused
from tests.agent.backends.adapter import SIZE, blocks_of, noise
from tests.agent.backends.transfer import STAGES

SHAPE = "blocks"


def brute_force(old: bytes, new: bytes, block: int) -> set[int]:
    """The blocks of the new content that differ from the old, which reads as zero beyond its end."""
    old = old.ljust(len(new), b"\0")
    return {
        at // block for at in range(0, len(new), block) if old[at : min(at + block, len(new))] != new[at : at + block]
    }


def test_delta_is_exact(replica, kind):
    replica.create()
    old = replica.snapshot()
    for seed in range(3):
        replica.change(seed)
    replica.punch(replica.block * 3, replica.block * 5)
    replica.punch(SIZE // 2 + 100, 20000)
    new = replica.snapshot()
    before, after = replica.raw(old.id), replica.raw(new.id)
    delta = replica.backend.delta_map(old.id, new.id)
    named = blocks_of(list(delta), replica.block)
    changed = brute_force(before, after, replica.block)
    assert changed <= named
    # Extents tell what was written, which may have been the same bytes; tables tell what differs.
    assert not kind.maps_differences or named == changed
    assert len(named - changed) <= 3, "blocks are named that were never written"
    rebuilt = bytearray(before)
    for row in delta:
        assert row.offset % replica.block == 0
        new_bytes = after[row.offset : row.offset + row.length]
        assert not row.zero or not any(new_bytes)
        rebuilt[row.offset : row.offset + row.length] = new_bytes
    assert bytes(rebuilt) == after
    delta.check()


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
    assert blocks_of(list(delta), replica.block) == brute_force(b"", replica.raw(), replica.block)


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
    was = replica.raw()
    replica.change(1)
    reader = replica.backend.open_reader(taken.id)
    assert reader.size_bytes == SIZE
    reader.announce([DeltaRange(0, 8192), DeltaRange(8192, 4096, zero=True)])
    for offset, length in ((1000, 5000), (0, 1), (SIZE - 777, 777), (SIZE // 2 - 10, 4116)):
        data = bytearray(length)
        reader.read_into(offset, memoryview(data))
        assert bytes(data) == was[offset : offset + length]
    reader.close()


def test_reader_of_a_preserved_copy(replica, other):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    other.edit(1)
    mine = other.raw()
    replica.edit(2)
    replica.snapshot()
    (kept,) = other.receive(replica, base.id)
    reader = other.backend.open_reader(kept.id)
    data = bytearray(SIZE)
    reader.read_into(0, memoryview(data))
    reader.close()
    assert data == mine


def test_stage_survives_and_is_keyed(replica, other):
    replica.create()
    first = replica.snapshot()
    other.receive(replica)
    replica.write(0, noise(3, 20_000))
    second = replica.snapshot()
    stage = other.backend.open_stage(first.id, second.id, second.size_bytes)
    assert not stage.resumed
    assert (stage.base, stage.target, stage.size_bytes) == (first.id, second.id, SIZE)
    (stage.directory / "journal").write_text("where it was")
    hole = other.block
    stage.write(0, memoryview(noise(3, 4 * hole)))
    stage.zero(hole, hole)
    stage.sync()
    stage.drop_cache()
    data = bytearray(hole)
    stage.read_into(0, memoryview(data))
    assert bytes(data) == noise(3, 4 * hole)[:hole]
    stage.close()
    again = other.again().backend
    again.recover()
    stage = again.open_stage(first.id, second.id, second.size_bytes)
    assert stage.resumed
    assert (stage.directory / "journal").read_text() == "where it was"
    stage.read_into(hole, memoryview(data))
    assert not any(data)
    stage.close()
    stage = again.open_stage("", second.id, second.size_bytes)
    assert not stage.resumed
    assert not (stage.directory / "journal").exists()
    stage.close()
    again.discard_stage()
    assert other.debris() == []
    again.discard_stage()
    with pytest.raises(Refused) as refused:
        again.open_stage("gone", second.id, second.size_bytes)
    assert refused.value.reason == "BASE_GONE"


def test_what_a_stage_holds(replica, other):
    """`data_within` tells all that is not a hole, so that the rest need not be read."""
    replica.create()
    tip = replica.snapshot()
    stage = other.fill(replica, "", tip)
    seen = bytearray(SIZE)
    at = 0
    for offset, length in stage.data_within(0, SIZE):
        assert offset >= at
        assert 0 < length <= 1 << 20
        stage.read_into(offset, memoryview(seen)[offset : offset + length])
        at = offset + length
    assert seen == replica.raw()
    assert list(stage.data_within(SIZE // 4, other.block)) == []


def test_pieces_in_any_order_and_twice(replica, other):
    """As from several sources, one of which died in between."""
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    replica.change(1)
    tip = replica.snapshot()
    stage = other.backend.open_stage(base.id, tip.id, tip.size_bytes)
    STAGES.append(stage)
    after = replica.raw(tip.id)
    rows = list(replica.backend.delta_map(base.id, tip.id))
    for row in (*reversed(rows), *rows[::2]):
        if row.zero:
            stage.zero(row.offset, row.length)
        else:
            stage.write(row.offset, memoryview(after[row.offset : row.offset + row.length]))
    other.backend.commit(stage, other.order(replica.lineage))
    assert other.raw() == other.raw(tip.id) == after
