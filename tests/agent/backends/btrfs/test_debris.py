"""What was let go or is left over, and cannot be removed: nothing is lost for that, and nobody is held up by it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.backends import btrfs_keep, btrfs_send
from agent.backends.base import Examined
from agent.backends.image_keep import now_ms
from agent.disk import btrfs
from resilver.volume import LiveState, Presence
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


@pytest.mark.parametrize("where", ["among ours", "beside the live copy"])
def test_what_somebody_compares_by_keeps_no_agent_from_starting(node, where):
    """`resilver inspect` takes no lock: what it compares by is being sent when the agent starts."""
    node.create()
    node.write("big", os.urandom(8 << 20))
    node.snapshot()
    name = "resilver-compared-0"
    compared = node.root / f".new-{name}" if where == "among ours" else node.directory / f".{node.path.name}.{name}"
    run("btrfs", "subvolume", "snapshot", "-r", node.path, compared)
    send = btrfs_send.open_send(None, compared, btrfs_send.PLAIN)
    send.read_into(memoryview(bytearray(1000)))
    found = restarted(node)
    assert (found.presence, found.live.state, found.problems) == (Presence.PRESENT, LiveState.UNMODIFIED, ())
    assert compared.exists()
    send.close()
    restarted(node)
    assert not compared.exists()


def set_aside(node: Node) -> None:
    """Longer ago than it is to stand there, and not changed since."""
    made = node.root / "made"
    btrfs.snapshot(node.data(node.lineage.tip_id), made, read_only=True)
    then = now_ms() - 2000 * int(btrfs_keep.ASIDE_S)
    made.rename(node.root / f".aside-{then}-{btrfs.info(made).ctransid}-{node.lineage.tip_id}")


DEBRIS = {
    "nothing": lambda node: None,
    "half made": lambda node: (node.root / ".new-half").mkdir(),
    "compared": lambda node: btrfs.create(node.directory / f".{node.path.name}.resilver-compared-0"),
    "let go": lambda node: (node.root / ".trash-gone").mkdir(),
    "to be preserved": lambda node: (node.root / ".keep-some" / "data").mkdir(parents=True),
    "stage of nothing": lambda node: (node.root / "stage").mkdir(),
    "set aside": set_aside,
}


@pytest.mark.parametrize("what", DEBRIS)
def test_on_a_disk_that_is_read_only_by_now_all_can_be_read(small, tmp_path, what):
    node = Node(small / "a", state_dir=tmp_path)
    node.create()
    tip = node.snapshot().id
    before = listed(small), sorted(node.root.iterdir())
    DEBRIS[what](node)
    run("mount", "-o", "remount,ro", small)
    again = Node(small / "a", state_dir=tmp_path)
    again.backend.recover()
    found = again.backend.examine()
    assert (found.presence, found.lineage.tip_id) == (Presence.PRESENT, tip)
    assert found.live.state is not LiveState.MODIFIED
    assert ["read-only" in problem for problem in found.problems] == ([] if what == "nothing" else [True])
    run("mount", "-o", "remount,rw", small)
    again.backend.recover()
    assert again.backend.examine().problems == ()
    if what != "to be preserved":
        assert (listed(small), sorted(node.root.iterdir())) == before
