"""Logical volumes of ours that somebody has renamed to be the live copy: from then on they are that, and no more."""

from __future__ import annotations

from resilver.volume import PreservedCopy
from tests.vm.inside.backend import names_with
from tests.vm.inside.node import CHUNK, GROUP, Node, run


def set_live(node: Node, name: str) -> None:
    """As somebody who goes back to a snapshot or a preserved copy without a tool of ours."""
    run("lvremove", "-y", f"{GROUP}/{node.name}")
    run("lvchange", "-an", name)
    run("lvchange", "-k", "n", name)
    if run("lvs", "--noheadings", "-o", "lv_attr", name).strip()[1] == "r":
        run("lvchange", "-p", "rw", name)
    run("lvrename", GROUP, name.partition("/")[2], node.name)
    run("lvchange", "-ay", f"{GROUP}/{node.name}")


def snapshot_of(node: Node, snapshot_id: str) -> str:
    return next(name for name in names_with(f"resilver.id={snapshot_id}") if f"/{node.name}." in name)


def test_a_snapshot_that_became_the_live_copy(node, other):
    """What is written to it is its own: never taken for the tip that it was, nor let go with that."""
    node.create()
    base = node.snapshot()
    other.receive(node)
    node.write(0, b"new")
    node.snapshot()
    set_live(other, snapshot_of(other, base.id))
    other.write(5 * CHUNK, b"mine")
    mine = other.content
    assert [record.present for record in other.lineage] == [False]
    (copy,) = other.receive(node, replace_own_data=True)
    assert other.content == node.content
    assert other.backend.examine().preserved == (copy,)
    assert other.read(copy.id) == mine

    set_live(other, copy.path.removeprefix("/dev/"))
    other.write(6 * CHUNK, b"and more")
    more = other.content
    run("lvchange", "-an", f"{GROUP}/{other.name}")
    (again,) = restored(other)
    assert other.read(again.id) == more
    other.backend.drop(copy.id)
    assert other.read(again.id) == more
    other.backend.drop(again.id)
    assert other.backend.examine().preserved == ()
    assert len(other.lvs()) == 2 + sum(record.present for record in other.lineage)


def restored(node: Node) -> tuple[PreservedCopy, ...]:
    """The live copy becomes its tip again."""
    tip = node.lineage.tip
    stage = node.backend.open_stage(tip.id, tip.id, tip.size_bytes)
    return node.backend.commit(stage, node.order(node.lineage))


def test_letting_go_of_what_became_the_live_copy(node):
    node.create()
    first = node.snapshot()
    for turn in range(2):
        node.write(turn * CHUNK, b"more")
        node.snapshot()
    set_live(node, snapshot_of(node, first.id))
    run("lvchange", "-an", f"{GROUP}/{node.name}")
    shown = node.read(node.lineage.tip_id)
    assert node.backend.prune(1, frozenset())
    assert node.content != shown
    assert node.content is not None
