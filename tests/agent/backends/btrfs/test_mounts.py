"""One Btrfs that is mounted several times: what each mount shows, and whose it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.disk import btrfs
from resilver.volume import LiveState
from tests.agent.backends.btrfs.mirrors import Pair, snapshots_of
from tests.agent.backends.btrfs.nodes import Node, pour
from tests.loopfs import run


def test_through_another_mount(places, tmp_path):
    """The backups are found under another mount of the same file system; sending wants both ends under one."""
    pair = Pair(places)
    mount = btrfs.place_of(places[0])[0]
    run("mount", mount.source, tmp_path)
    try:
        inner = tmp_path / str(pair.snaps).removeprefix(mount.point).lstrip("/")
        node = Node(places[0], adopt=(f"{inner}/vm1.*",))
        opened = node.snapshot()
        assert pour(node, pair.native(3), opened.id, "btrfs-1", lambda _data: None) > 0
    finally:
        run("umount", tmp_path)


@contextlib.contextmanager
def later_mount(place: Path, point: Path) -> Iterator[Path]:
    """A directory as a later mount of the whole file system shows it."""
    mount, top = btrfs.place_of(place)
    run("mount", "-o", "subvolid=5", mount.source, point)
    try:
        yield Path(f"{point}{top}")
    finally:
        run("umount", point)


def test_our_own_under_a_later_mount_are_ours(places, tmp_path):
    with later_mount(places[0], tmp_path) as place:
        node = Node(place, adopt=(f"{places[0]}/.resilver/*/*/data", f"{places[0]}/vm*"))
        node.create()
        assert node.backend.examine().problems == ()
        left = node.root / ".new-x"
        left.mkdir(parents=True)
        btrfs.snapshot(node.path, left / "data", read_only=True)
        (node.root / "x").mkdir()
        btrfs.snapshot(node.path, node.root / "x" / "data", read_only=True)
        assert node.lineage.records == (), "what was begun and left is nobody's snapshot"
        node.backend.recover()
        opened = node.snapshot()
        node.write("a", b"newer")
        node.snapshot()
        found = node.backend.examine()
        assert found.others == ()
        node.backend.drop(opened.id)
        assert not node.data(opened.id).exists()


def goes_on(node: Node) -> None:
    """What asks for deltas between all that is in the lineage."""
    opened = node.snapshot()
    assert node.backend.examine().live.state is LiveState.UNMODIFIED
    for turn in range(2):
        node.write("a", b"%d" % turn)
        node.snapshot()
    assert node.backend.prune(2, frozenset()) != ()
    assert opened.id not in {record.id for record in node.lineage if record.present}


def test_under_a_mount_that_came_later(places, tmp_path):
    """As with snapper: what an earlier mount shows too is reached through the one of the live copy."""
    with later_mount(places[0], tmp_path) as place:
        node = Node(place)
        node.create()
        snapshots_of(node.path, place / "snaps")
        found = node.backend.examine()
        assert [record.note for record in found.lineage] == ["vm1.2", "vm1.1", "vm1.0"]
        assert (found.live.state, found.problems) == (LiveState.UNMODIFIED, ())
        node.write("a", b"newer")
        assert node.backend.examine().live.state is LiveState.MODIFIED
        goes_on(node)


@pytest.mark.parametrize("how", ["beside", "upon", "upon itself"])
@pytest.mark.parametrize("adopt", [(), ("{snaps}/vm1.*",)])
def test_what_the_live_copys_mount_does_not_show_is_left_out_and_told(places, tmp_path, how, adopt):
    """Also what another mount upon it shows. `btrfs send` makes no delta of these and of ours."""
    above, snaps = places[0] / "above", places[0] / "snaps"
    run("btrfs", "subvolume", "create", above)
    mount, top = btrfs.place_of(above)
    run("mount", "-o", f"subvol={top}", mount.source, tmp_path)
    try:
        node = Node(tmp_path)
        node.create()
        snapshots_of(node.path, tmp_path / "snaps" if how == "upon itself" else snaps)
        if how == "upon":
            (tmp_path / "snaps").mkdir()
        if how == "upon itself":
            snaps = tmp_path / "snaps"
        if how != "beside":
            run("mount", "--bind", snaps, tmp_path / "snaps")
            snaps = tmp_path / "snaps"
        node = Node(tmp_path, adopt=tuple(pattern.format(snaps=snaps) for pattern in adopt))
        found = node.backend.examine()
        assert (found.lineage.records, found.others) == ((), ())
        [problem] = found.problems
        assert "vm1.0 and 2 more snapshots are not shown by the mount at " in problem
        goes_on(node)
        assert node.backend.examine().problems == (problem,)
    finally:
        run("umount", "--recursive", tmp_path)


def test_a_snapshot_on_another_file_system_is_left_out_and_told(places):
    """A tree number and a place may be the same there."""
    pair = Pair(places)
    node = Node(places[0], adopt=(f"{pair.backups}/vm1.*",))
    found = node.backend.examine()
    assert [record.note for record in found.lineage] == ["vm1.5", "vm1.4", "vm1.3", "vm1.2", "vm1.1"]
    assert str(pair.backups) in " ".join(found.problems)
