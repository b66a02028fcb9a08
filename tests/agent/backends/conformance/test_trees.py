"""What every backend of file systems must give: each sort of change is found, travels, and can be told afterwards."""

from __future__ import annotations

import pytest

from resilver.volume import LiveState
from tests.agent.backends import tree
from tests.loopfs import mounted, needs_root

SHAPE = "stream"


@needs_root
def test_the_manifest_sees_each_sort_of_change():
    """What is compared with must see what it is to find."""
    with mounted("ext4", 64 << 20) as point:
        top = point / "tree"
        top.mkdir()
        tree.create(top, 1)
        for number, sort in enumerate(tree.CHANGES):
            before = tree.manifest(top)
            assert tree.manifest(top) == before
            tree.one_change(top, sort, number)
            assert tree.manifest(top) != before, sort


@pytest.mark.parametrize("sort", tree.CHANGES, ids=lambda sort: sort.__name__.strip("_"))
def test_each_sort_of_change(replica, other, sort):
    if tree.CHANGES[sort] not in {"", *replica.features}:
        pytest.skip(f"there are no {tree.CHANGES[sort]} on this file system")
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    before = replica.contents()
    assert replica.state is LiveState.UNMODIFIED
    replica.on_live(lambda path: tree.one_change(path, sort))
    replica.sync()
    assert replica.contents() != before
    assert replica.state is LiveState.MODIFIED
    replica.snapshot()
    other.receive(replica, base.id)
    assert other.contents() == replica.contents()
    assert other.contents(base.id) == before


def test_reading_is_no_change(replica):
    replica.create()
    replica.snapshot()
    with replica.walked() as path:
        tree.manifest(path)
    replica.sync()
    assert replica.state is LiveState.UNMODIFIED
