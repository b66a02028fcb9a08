"""A reserve is never used up, and a full disk refuses before anything is lost."""

from __future__ import annotations

import pytest

from resilver.errors import Refused
from resilver.volume import LiveState
from tests.agent.backends.transfer import open_stage


def test_reserve(replica, other):
    replica.create()
    replica.snapshot()
    other.receive(replica)
    replica.change(1)
    base, tip = other.tip.id, replica.snapshot()
    full = other.again(reserve_min_bytes=1 << 50)
    found = full.backend.examine()
    assert found.reserve_bytes == 1 << 50
    assert found.free_bytes < 1 << 50
    for attempt in (full.snapshot, lambda: open_stage(full, replica, base, tip)):
        with pytest.raises(Refused) as refused:
            attempt()
        assert refused.value.reason == "NO_SPACE"
    assert full.lineage.tip_id == base
    assert full.debris() == []
    full.backend.set_reserve(0.0, 0)
    full.receive(replica, base)
    assert full.contents() == replica.contents()
    full.backend.set_reserve(0.5, 0)
    half = full.backend.examine()
    assert half.reserve_bytes > 0


def test_a_full_disk_refuses_the_next_step(small):
    """Some other program took all there was: looking works, what needs space is refused, and room makes it work."""
    with small.place() as place:
        source, target = place.replica("a"), place.replica("b")
        source.create()
        base = source.snapshot()
        target.receive(source)
        source.change(1)
        tip = source.snapshot()
        was = target.contents()
        small.fill("b")
        again = target.again(reserve_min_bytes=64 << 20)
        again.backend.recover()
        found = again.backend.examine()
        assert found.lineage.tip_id == base.id
        assert found.free_bytes < 64 << 20
        for attempt in (again.snapshot, lambda: open_stage(again, source, base.id, tip)):
            with pytest.raises(Refused) as refused:
                attempt()
            assert refused.value.reason == "NO_SPACE"
        small.make_room("b")
        assert again.contents() == was
        again.receive(source, base.id)
        assert again.contents() == source.contents()
        assert again.state is LiveState.UNMODIFIED
