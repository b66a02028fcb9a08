"""What was let go or is left over, and cannot be removed: nothing is lost for that, and nobody is held up by it."""

from __future__ import annotations

from pathlib import Path

from agent.backends.base import Examined
from resilver.volume import Presence
from tests.agent.backends.btrfs.nodes import Node, listed, refused
from tests.loopfs import run


def nest(data: Path) -> None:
    """A subvolume within a snapshot, which somebody made writable for that."""
    run("btrfs", "property", "set", "-f", data, "ro", "false")
    run("btrfs", "subvolume", "create", data / "inner")
    run("btrfs", "property", "set", data, "ro", "true")


def snapshots(node: Node, count: int) -> list[str]:
    """The ids of so many, oldest first; the last one is the tip."""
    node.create()
    made = []
    for turn in range(count):
        node.write("a", b"%d" % turn)
        made.append(node.snapshot().id)
    return made


def restarted(node: Node) -> Examined:
    again = Node(node.directory)
    again.backend.recover()
    return again.backend.examine()


def test_a_snapshot_that_got_a_subvolume_stays_and_holds_up_no_other(node):
    first, second, third, tip = snapshots(node, 4)
    nest(node.data(first))
    before = listed(node.directory)
    for _ in range(2):
        error = refused(lambda: node.backend.drop(first))
        assert error.reason == "NOT_SUPPORTED"
        assert f"make {node.data(first)} writable" in error.message
    assert listed(node.directory) == before
    node.backend.drop(second)
    assert [gone for gone, _freed in node.backend.prune(1, frozenset())] == [third]
    found = restarted(node)
    assert [record.id for record in found.lineage if record.present] == [tip, first]
    assert found.problems == ()


def test_a_subvolume_that_comes_while_a_snapshot_is_let_go_is_told(node):
    first, second, tip = snapshots(node, 3)

    def step(name: str) -> None:
        if name == "prune.renamed":
            [trash] = node.root.glob(".trash-*")
            nest(trash / "data")

    late = Node(node.directory, step=step)
    late.backend.drop(first)
    [trash] = node.root.glob(".trash-*")
    for problems in (late.backend.examine().problems, restarted(node).problems):
        [problem] = problems
        assert str(trash) in problem
        assert "holds another subvolume" in problem
    node.backend.drop(second)
    assert [record.id for record in node.lineage if record.present] == [tip]
    assert (trash / "data" / "inner").is_dir()
    found = restarted(node)
    assert (found.presence, len(found.problems)) == (Presence.PRESENT, 1)
    run("btrfs", "property", "set", "-f", trash / "data", "ro", "false")
    run("btrfs", "subvolume", "delete", trash / "data" / "inner")
    assert restarted(node).problems == ()
    assert not trash.exists()
    assert late.backend.examine().problems == (), "it is gone, whoever removed it"
