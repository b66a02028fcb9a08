"""Mirrors that were made without us: what scripts, btrbk and snapper have left is taken as it is, and left as it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from agent.disk import btrfs
from resilver.lineage import NO_CP, Origin, newest_in_common
from resilver.volume import LiveState, Presence
from tests.agent.backends.btrfs.mirrors import Pair, send, snapshots_of
from tests.agent.backends.btrfs.nodes import Node, listed, pour, refused, same
from tests.loopfs import run


def test_a_pair_made_by_scripts(places):
    pair = Pair(places)
    node, other, before = pair.node, pair.other, pair.theirs()
    assert len(before) == 8
    mine, theirs = node.backend.examine(), other.backend.examine()
    assert [record.id for record in mine.lineage] == [pair.native(turn) for turn in (5, 4, 3, 2, 1)]
    assert [record.id for record in theirs.lineage] == [pair.native(turn) for turn in (3, 2, 1)]
    assert {record.origin for record in (*mine.lineage, *theirs.lineage)} == {Origin.ADOPTED}
    assert {record.cp for record in mine.lineage} == {NO_CP}
    assert [record.note for record in theirs.lineage] == ["vm1.3", "vm1.2", "vm1.1"]
    assert mine.live.state is LiveState.UNMODIFIED
    assert theirs.live.state is LiveState.ABSENT
    assert theirs.presence is Presence.PRESENT
    assert not node.root.exists()
    # The first election opens 1-1 on top of the newest one.
    opened = node.snapshot()
    assert opened.parent == pair.native(5)
    assert len(node.lineage) == 6
    base = newest_in_common(node.lineage, other.lineage)
    assert base.id == pair.native(3)
    sizes: list[int] = []
    whole = pour(node, "", opened.id, "btrfs-1", lambda data: sizes.append(len(data)))
    delta = pour(node, base.id, opened.id, "btrfs-1", lambda data: sizes.append(len(data)))
    assert delta < whole / 10
    assert other.receive(node, base.id) == ()
    same(node.path, other.path)
    assert pair.theirs() == before
    found = other.backend.examine()
    assert found.live.state is LiveState.UNMODIFIED
    assert [record.present for record in found.lineage] == [True, False, False, True, True, True]
    assert found.others == ()
    # And on, from what is ours now.
    node.write("n6", b"6")
    node.snapshot()
    other.receive(node, opened.id)
    same(node.path, other.path)
    assert pair.theirs() == before


def test_a_pattern_that_finds_another_subvolumes_too_is_told(places):
    pair = Pair(places)
    btrfs.create(places[0] / "vm1.logs")
    assert pair.other.backend.examine().problems == ()
    for name, source in (("vm1.logs.1", places[0] / "vm1.logs"), ("vm1.daily.1", pair.node.path)):
        run("btrfs", "subvolume", "snapshot", "-r", source, pair.snaps / name)
    send(pair.snaps / "vm1.daily.1", pair.backups, pair.snaps / "vm1.3")
    wide = Node(places[1], adopt=("backup/*",))
    assert wide.backend.examine().problems == (), "of another name, and made from one of the others"
    send(pair.snaps / "vm1.logs.1", pair.backups)
    [problem] = wide.backend.examine().problems
    assert "none of vm1.logs… was made from one of the others" in problem


def test_later_ones_are_shown_and_nothing_more(places):
    pair = Pair(places)
    node, other = pair.node, pair.other
    node.snapshot()
    other.receive(node, pair.native(3))
    send(pair.snaps / "vm1.4", pair.backups, pair.snaps / "vm1.3")
    run("btrfs", "subvolume", "snapshot", "-r", node.path, pair.snaps / "vm1.6")
    found = node.backend.examine()
    assert [record.note for record in found.others] == ["vm1.6"]
    assert found.others[0].origin is Origin.ADOPTED
    assert found.lineage.cp != NO_CP
    # The fourth is in the lineage that came from the primary: its data is here now.
    assert other.backend.examine().lineage.find(pair.native(4)).present
    for gone in (pair.native(1), found.others[0].id):
        error = refused(lambda gone=gone: node.backend.drop(gone))
        assert error.reason == "PINNED"
        assert "another tool" in error.message
    before = pair.theirs()
    for turn in range(3):
        node.write("m", b"%d" % turn)
        node.snapshot()
    assert len(node.backend.prune(1, frozenset())) == 3
    assert pair.theirs() == before
    node.backend.export(found.others[0].id, places[0] / "exported", writable=True)
    same(pair.snaps / "vm1.6", places[0] / "exported")


def test_theirs_that_are_pruned_are_gone_and_the_lineage_stays(places):
    pair = Pair(places)
    pair.node.snapshot()
    ids = pair.node.lineage.ids()
    run("btrfs", "subvolume", "delete", pair.snaps / "vm1.2")
    found = pair.node.lineage
    assert found.ids() == ids
    assert [record.note for record in found if not record.present] == ["vm1.2"]
    assert refused(
        lambda: pair.node.backend.delta_bytes("", next(r.id for r in found if r.note == "vm1.2"))
    ).reason == ("TARGET_GONE")


def test_a_former_primary_keeps_theirs_where_they_are(places):
    """The secondary has become the primary; what was snapshotted here since is off the lineage, and is not moved."""
    pair = Pair(places)
    node, other, before = pair.node, pair.other, pair.theirs()
    run("btrfs", "subvolume", "snapshot", pair.backups / "vm1.3", other.path)
    other.write("promoted", b"1")
    opened = other.snapshot(epoch=1)
    assert opened.parent == pair.native(3)
    node.write("lost", b"1")
    kept = node.receive(other, pair.native(3))
    assert [(copy.live, copy.based_on) for copy in kept] == [(True, pair.native(5))]
    assert (Path(kept[0].path) / "lost").read_bytes() == b"1"
    same(other.path, node.path)
    assert pair.theirs() == before
    found = node.backend.examine()
    assert found.lineage.ids() == other.lineage.ids()
    # The live copy is another one now, which they were not taken of; nothing says any more whose they are.
    assert found.lineage.find(pair.native(3)).present


def test_what_only_another_tool_still_has_is_kept(places):
    """The live copy is what the script has snapshotted last; but the script may let go of that whenever it likes."""
    pair = Pair(places)
    node, other = pair.node, pair.other
    run("btrfs", "subvolume", "snapshot", pair.backups / "vm1.3", other.path)
    other.write("promoted", b"1")
    other.snapshot(epoch=1)
    assert node.backend.examine().live.state is LiveState.UNMODIFIED
    kept = node.receive(other, pair.native(3))
    assert [(copy.live, copy.based_on) for copy in kept] == [(True, pair.native(5))]
    same(pair.snaps / "vm1.5", Path(kept[0].path))
    same(other.path, node.path)


def test_an_older_one_that_was_received_later_is_older(places):
    pair = Pair(places)
    run("btrfs", "subvolume", "delete", pair.backups / "vm1.1")
    send(pair.snaps / "vm1.1", pair.backups)
    assert [record.note for record in pair.other.backend.examine().lineage] == ["vm1.3", "vm1.2", "vm1.1"]


@pytest.mark.skipif(shutil.which("btrbk") is None, reason="btrbk is not installed")
def test_btrbk(places, tmp_path):
    """The tool itself takes, sends and prunes; then it goes on without its target, and lets go of what it sent last."""
    node, other = Node(places[0]), Node(places[1], adopt=("host/größe 1/vm1.*",))
    snaps, backups, config = places[0] / "_btrbk_snap", places[1] / "host/größe 1", tmp_path / "btrbk.conf"
    snaps.mkdir()
    backups.mkdir(parents=True)
    node.create()
    node.write("big", os.urandom(4 << 20))

    def btrbk(turn: int, target: str = "") -> None:
        config.write_text(
            f"snapshot_preserve_min latest\nsnapshot_dir {snaps}\nsubvolume {node.path}\n{target}\n", encoding="utf-8"
        )
        node.write(f"n{turn}", os.urandom(50_000))
        run("btrbk", "--config", config, "--quiet", "run")

    for turn in range(3):
        btrbk(turn, f"target {backups}")
    (sent,) = snaps.iterdir()
    base, received = btrfs.info(sent).native_id, listed(backups)
    assert [record.id for record in node.lineage] == [base]
    assert len(other.lineage) == 3, "here it has pruned nothing"
    opened = node.snapshot()
    assert newest_in_common(node.lineage, other.lineage).id == base
    assert other.receive(node, base) == ()
    same(node.path, other.path)
    btrbk(3)
    assert not sent.exists()
    node.snapshot()
    assert other.receive(node, opened.id) == ()
    same(node.path, other.path)
    theirs = [[line for line in lines if "/vm1." in line] for lines in (received, listed(backups))]
    assert theirs[0] == theirs[1]
    assert len(theirs[0]) == 3


def test_snapper(node):
    """A subvolume `.snapshots` within the live one, that holds `<number>/snapshot`."""
    node.create()
    run("btrfs", "subvolume", "create", node.path / ".snapshots")
    for number in (1, 2, 3):
        (node.path / ".snapshots" / str(number)).mkdir()
        run("btrfs", "subvolume", "snapshot", "-r", node.path, node.path / ".snapshots" / str(number) / "snapshot")
    found = node.backend.examine()
    assert [record.note for record in found.lineage] == ["3/snapshot", "2/snapshot", "1/snapshot"]
    assert any(".snapshots" in problem for problem in found.problems)
    opened = node.snapshot()
    assert opened.parent == found.lineage.tip_id


def test_looking_makes_no_directories_and_what_it_made_is_swept(places):
    pair = Pair(places)
    pair.node.write("n1", b"changed")
    assert pair.node.backend.examine().live.state is LiveState.MODIFIED
    assert not (places[0] / ".resilver").exists()
    left = places[0] / ".vm1.resilver-compared-0"
    btrfs.snapshot(pair.node.path, left, read_only=True)
    pair.node.backend.recover()
    assert not left.exists()
    assert sorted(entry.name for entry in places[0].iterdir()) == ["snaps", "vm1"]


def test_without_a_word_the_live_copys_ancestors_are_found(places):
    """A node whose live copy was made from what it had received."""
    pair = Pair(places)
    other = Node(places[1])
    assert other.lineage.records == ()
    run("btrfs", "subvolume", "snapshot", pair.backups / "vm1.3", other.path)
    assert [record.note for record in other.lineage] == ["vm1.3", "vm1.2", "vm1.1"]
    assert other.backend.examine().live.state is LiveState.UNMODIFIED


@pytest.mark.parametrize("how", ["kernel", "kernel and back", "btrfs-progs"])
def test_a_received_one_that_was_made_writable_is_left_out(places, how):
    pair = Pair(places)
    data = pair.backups / "vm1.3"
    if how == "btrfs-progs":
        run("btrfs", "property", "set", "-f", "-ts", data, "ro", "false")
    else:
        btrfs.set_read_only(data, read_only=False)
    (data / "n1").write_bytes(b"evil")
    if how != "kernel":
        btrfs.set_read_only(data, read_only=True)
    found = pair.other.backend.examine()
    if how == "btrfs-progs":
        # Its identity is gone: nothing corresponds to it, and it is told apart by that.
        assert pair.native(3) not in found.lineage.ids()
    else:
        assert found.lineage.tip_id == pair.native(2)
        assert any("vm1.3" in problem for problem in found.problems)
    pair.node.snapshot()
    assert newest_in_common(pair.node.lineage, found.lineage).id == pair.native(2)


def test_one_that_is_still_being_received_is_left_out(places):
    pair = Pair(places)
    run("btrfs", "subvolume", "create", pair.backups / "vm1.4")
    found = pair.other.backend.examine()
    assert found.lineage.tip_id == pair.native(3)
    assert any("vm1.4" in problem for problem in found.problems)


def test_what_is_no_subvolume_is_passed_over(places):
    pair = Pair(places)
    (pair.backups / "vm1.log").write_text("x")
    (pair.backups / "vm1.d").mkdir()
    assert pair.other.backend.examine().problems == ()
    shutil.rmtree(pair.backups / "vm1.d")


def test_an_absolute_pattern_and_a_copy_of_one(places):
    """A read-only snapshot of a received one has its identity: it counts once."""
    pair = Pair(places)
    btrfs.snapshot(pair.backups / "vm1.2", pair.backups / "vm1.copy", read_only=True)
    other = Node(places[1], adopt=(f"{pair.backups}/vm1.*",))
    assert [record.note for record in other.lineage] == ["vm1.3", "vm1.2", "vm1.1"]


def test_a_pattern_below_a_directory_with_a_name_like_one(places):
    """Only what the pattern itself says is one."""
    for name in ("[a]*?", "ab"):
        node = Node(places[0] / name, adopt=("snaps/vm1.[0-1]",))
        node.create()
        snapshots_of(node.path, node.directory / "snaps")
        node.path.rename(node.directory / "moved")
        assert [record.note for record in node.lineage] == ["vm1.1", "vm1.0"]
