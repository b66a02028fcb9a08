"""Commits: what replaces what, what is preserved, who is in the way; keeping, dropping, exporting; a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.backends import btrfs_commit
from agent.disk import btrfs, exports
from resilver.errors import ResilverError
from resilver.volume import LiveState
from tests.agent.backends.btrfs.nodes import Node, never, pair, refused, same
from tests.loopfs import mounted, run

ROOT = Path(__file__).parents[4]


def test_a_live_copy_that_was_written_to_is_preserved(node, other):
    base = pair(node, other)
    other.write("own", os.urandom(1 << 20))
    kept = other.receive(node, base)
    same(node.path, other.path)
    assert len(kept) == 1
    assert kept[0].live
    assert kept[0].based_on == base
    assert kept[0].exclusive_bytes == 1 << 20
    assert (Path(kept[0].path) / "own").stat().st_size == 1 << 20
    assert other.backend.examine().preserved == kept
    (Path(kept[0].path) / "own").write_bytes(b"a late writer's")


def test_a_tip_that_was_written_to_is_not_what_the_live_copy_is(node, other):
    """The live copy is the last to have what the tip had."""
    node.create()
    base = node.snapshot()
    other.receive(node)
    node.write("x", b"1")
    node.snapshot()
    other.write("precious", b"mine")
    data = other.data(other.snapshot(epoch=2).id)
    btrfs.set_read_only(data, read_only=False)
    (data / "precious").write_bytes(b"evil")
    btrfs.set_read_only(data, read_only=True)
    assert other.backend.examine().live.state is LiveState.MODIFIED
    copies = other.receive(node, base.id, replace_own_data=True)
    kept = {(Path(copy.path) / "precious").read_bytes() for copy in copies}
    assert kept == {b"mine", b"evil"}


def test_nothing_that_was_not_received_is_committed(node, other):
    base = pair(node, other)
    target = node.lineage.tip_id
    stage = other.backend.open_stream_stage(base, target, node.origin(base, target))
    assert refused(lambda: other.backend.commit(stage, other.order(node.lineage))).reason == "IO_ERROR"
    assert other.lineage.tip_id == base


# In use.


@pytest.mark.parametrize("what", ["replaced", "removed", "nested"])
def test_the_live_copy_became_something_else_meanwhile(node, other, what):
    base = pair(node, other)

    def step(name: str) -> None:
        if name != "commit.snapshot":
            return
        if what == "nested":
            btrfs.create(other.path / "inner")
            return
        other.path.rename(other.directory / "moved")
        if what == "replaced":
            btrfs.create(other.path)

    late = Node(other.directory, step=step)
    assert refused(lambda: late.receive(node, base)).reason == "TARGET_CHANGED"
    assert other.lineage.tip_id == base
    assert not (other.root / "commit.json").exists()
    assert other.path.exists() is (what != "removed")


def test_a_path_that_is_created_meanwhile(node, other):
    node.create()
    node.snapshot()

    def step(name: str) -> None:
        if name == "commit.snapshot":
            btrfs.create(other.path)

    late = Node(other.directory, step=step)
    assert refused(lambda: late.receive(node)).reason == "TARGET_CHANGED"
    assert other.lineage.tip_id == ""


# What cannot be served, or not replaced.


def test_nested_subvolumes_are_told_and_never_lost(node, other):
    base = pair(node, other)
    btrfs.create(other.path / "inner")
    (other.path / "inner" / "x").write_bytes(b"1")
    for number in ("1", "2"):
        (other.path / "inner" / number).mkdir()
        btrfs.create(other.path / "inner" / number / "snapshot")
    (other.path / "sub").mkdir()
    btrfs.create(other.path / "sub" / "more")
    (problem,) = other.backend.examine().problems
    assert problem.endswith("in no consistency point of it: inner, sub/more (2 more inside)")
    error = refused(lambda: other.receive(node, base))
    assert error.reason == "NOT_SUPPORTED"
    assert "inner" in error.message
    assert (other.path / "inner" / "x").read_bytes() == b"1"


def test_a_preserved_copy_that_got_a_subvolume_is_not_dropped(node, other):
    base = pair(node, other)
    other.write("own", b"1")
    kept = other.receive(node, base)
    btrfs.create(Path(kept[0].path) / "inner")
    assert refused(lambda: other.backend.drop(kept[0].id)).reason == "NOT_SUPPORTED"
    assert other.backend.examine().preserved == kept


def test_a_read_only_live_copy(node, other):
    base = pair(node, other)
    btrfs.set_read_only(other.path, read_only=True)
    assert any("read-only" in problem for problem in other.backend.examine().problems)
    assert refused(lambda: other.receive(node, base)).reason == "NOT_SUPPORTED"
    btrfs.set_read_only(other.path, read_only=False)


@pytest.mark.parametrize("what", ["directory", "file", "link"])
def test_a_path_that_is_no_subvolume(node, what):
    if what == "directory":
        node.path.mkdir()
    elif what == "file":
        node.path.touch()
    else:
        btrfs.create(node.directory / "real")
        node.path.symlink_to("real")
    error = refused(node.backend.examine)
    assert error.metadata["field"] == "path"
    assert refused(node.snapshot).reason == "INVALID_FIELD"


def test_not_on_btrfs(tmp_path):
    found = Node(tmp_path / "x").backend.examine()
    assert "not on Btrfs" in found.problems[0]
    assert refused(Node(tmp_path / "x").snapshot).metadata["field"] == "path"


def test_a_snapshot_directory_on_another_mount(places):
    from agent.backends.btrfs import BtrfsBackend

    btrfs.create(places[0] / "vm1")
    backend = BtrfsBackend("vm1", places[0] / "vm1", places[1] / "snapshots", reserve_min_bytes=0, reserve_ratio=0)
    one = Node(places[0])
    one.backend = backend
    assert refused(one.snapshot).metadata["field"] == "snapshot_dir"


# Keeping, dropping, exporting.


def test_prune_and_drop(node):
    node.create()
    made = []
    for turn in range(5):
        node.write(f"n{turn}", os.urandom(100_000))
        made.append(node.snapshot().id)
    pruned = node.backend.prune(2, frozenset({made[1]}))
    assert [gone for gone, _freed in pruned] == [made[0], made[2]]
    assert refused(lambda: node.backend.drop(made[4])).reason == "PINNED"
    assert refused(lambda: node.backend.drop("nothing")).reason == "SNAPSHOT_NOT_FOUND"
    lineage = node.lineage
    assert [record.present for record in lineage] == [True, True, False, True, False]
    assert lineage.ids() == set(made)
    assert node.backend.drop(made[0]) == 0
    again = Node(node.directory)
    assert again.lineage == lineage


def test_what_somebody_has_open_is_not_dropped(node, other):
    base = pair(node, other)
    other.write("own", b"mine")
    [kept] = other.receive(node, base)
    first, data, tip = base, other.data(base), other.lineage.tip_id
    with (Path(kept.path) / "own").open("r+b"):
        error = refused(lambda: other.backend.drop(kept.id))
    assert error.reason == "PINNED"
    assert f"pid {os.getpid()}" in error.metadata["in_use_by"]
    with (data / "a").open("rb"):
        assert refused(lambda: other.backend.drop(first)).reason == "PINNED"
        node.write("a", b"more")
        node.snapshot()
        other.receive(node, tip)
        assert [gone for gone, _freed in other.backend.prune(1, frozenset())] == [tip], "it is passed over"
        assert data.exists()
    assert [gone for gone, _freed in other.backend.prune(1, frozenset())] == [first]
    other.backend.drop(kept.id)
    assert other.backend.examine().preserved == ()


def test_what_is_mounted_is_not_dropped(node, tmp_path):
    node.create()
    first = node.snapshot().id
    node.write("a", b"2")
    node.snapshot()
    run("mount", "--bind", node.data(first), tmp_path)
    try:
        error = refused(lambda: node.backend.drop(first))
    finally:
        run("umount", tmp_path)
    assert (error.reason, error.metadata["in_use_by"]) == ("PINNED", f"mount at {tmp_path}")


def test_an_export_hinders_only_what_it_is_of(node, tmp_path, monkeypatch):
    node.create()
    first = node.snapshot().id
    node.write("a", b"2")
    node.snapshot()
    table = tmp_path / "etab"
    monkeypatch.setattr(exports, "TABLES", (table,))
    table.write_text("{}\t*(ro)\n".format(str(node.data(first)).replace(" ", "\\040")))
    assert refused(lambda: node.backend.drop(first)).reason == "PINNED"
    table.write_text("{}\t*(rw,crossmnt)\n".format(str(node.directory.parent).replace(" ", "\\040")))
    node.backend.drop(first)


def test_what_is_being_sent_is_let_go_when_that_ends(node):
    node.create()
    node.write("big", os.urandom(8 << 20))
    first = node.snapshot()
    node.write("a", b"2")
    second = node.snapshot()
    send = node.backend.open_send("", first.id, "btrfs-1")
    send.read_into(memoryview(bytearray(1000)))
    node.backend.drop(first.id)
    assert not node.lineage.find(first.id).present
    assert list(node.root.glob(".trash-*"))
    read = 0
    buffer = memoryview(bytearray(1 << 20))
    while count := send.read_into(buffer):
        read += count
    assert read > 8 << 20
    send.close()
    node.write("a", b"3")
    node.snapshot()
    node.backend.drop(second.id)
    assert not list(node.root.glob(".trash-*"))


@pytest.mark.parametrize("writable", [True, False])
def test_export_on_the_same_file_system(node, writable):
    node.create()
    made = node.snapshot()
    path = node.directory / "exported copy"
    assert node.backend.export(made.id, path, writable=writable) >= 300_000
    same(node.data(made.id), path)
    assert btrfs.info(path).read_only is not writable
    assert refused(lambda: node.backend.export(made.id, path, writable=True)).metadata["field"] == "path"


def test_an_export_whose_size_cannot_be_counted_is_made_all_the_same(node, tmp_path, monkeypatch):
    """There is no `btrfs` command where the agent looks for one, which an export beside its source does not need."""
    node.create()
    made = node.snapshot()
    monkeypatch.setenv("PATH", str(tmp_path))
    path = node.directory / "exported"
    assert node.backend.export(made.id, path, writable=True) == 0
    monkeypatch.undo()
    same(node.data(made.id), path)


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_export_elsewhere(node, kind):
    from tests.agent.backends.btrfs.test_transfer import fill

    fill(node)
    made = node.snapshot()
    with mounted(kind, 256 << 20) as point:
        path = point / "exported"
        node.backend.export(made.id, path, writable=False)
        same(node.data(made.id), path)
        assert (path / "holes").stat().st_blocks * 512 < 1 << 20
        assert [entry.name for entry in point.iterdir() if entry.name != "lost+found"] == ["exported"]
        if kind == "btrfs":
            assert btrfs.info(path).read_only


# A full disk.


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_what_an_export_that_was_killed_has_left_is_replaced_by_the_next(node, tmp_path, kind):
    node.create()
    made = node.snapshot()
    stuck = tmp_path / "cp"  # it has copied half of it; its last argument is where to
    stuck.write_text(
        f'#!/bin/sh\nfor to; do :; done\necho half > "$to/half"\necho $$ > {tmp_path}/pid\nexec sleep 60\n'
    )
    stuck.chmod(0o755)
    with mounted(kind, 256 << 20) as point:
        path = point / "exported"
        call = f"btrfs_export.export(Path({str(node.data(made.id))!r}), Path({str(path)!r}), writable=True)"
        code = f"from pathlib import Path; from agent.backends import btrfs_export; {call}"
        search = f"{tmp_path}:{os.environ['PATH']}"
        child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PATH": search})
        copier = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
        child.kill()
        child.wait()
        try:
            [left] = point.glob(".exported*")
            assert refused(lambda: node.backend.export(made.id, path, writable=True)).reason == "IN_USE"
            assert (left / "half").exists(), "what still copies into it is left alone"
        finally:
            os.kill(copier, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{copier}/fd/0").exists())
        node.backend.export(made.id, path, writable=True)
        same(node.data(made.id), path)
        assert [entry.name for entry in point.iterdir() if entry.name != "lost+found"] == ["exported"]


def until(found):
    """What becomes true within 10 seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.01)  # another process is waited for
    raise AssertionError("it did not come")


def test_a_full_disk_is_told_and_leaves_what_was_there(node, small):
    other = Node(small / "b")
    base = pair(node, other)
    node.write("big", os.urandom(64 << 20))
    node.snapshot()
    ballast = small / "ballast"
    with ballast.open("wb") as file:
        free = os.statvfs(small).f_bavail * 4096
        file.write(os.urandom(max(0, free - (20 << 20))))
    btrfs.sync(small)
    origin = node.origin(base, node.lineage.tip_id)
    assert refused(lambda: other.backend.check_stream_space(origin.stream_bytes)).reason == "NO_SPACE"
    stage = other.backend.open_stream_stage(base, node.lineage.tip_id, origin)
    stage.start("btrfs-1")

    def all_of_it() -> None:
        from tests.agent.backends.btrfs.nodes import pour

        pour(node, base, node.lineage.tip_id, "btrfs-1", stage.feed)
        stage.finish()

    error = refused(all_of_it)
    assert error.reason == "NO_SPACE"
    stage.close()
    assert other.lineage.tip_id == base
    assert other.backend.examine().live.state is not LiveState.MODIFIED
    other.backend.discard_stage()
    ballast.unlink()
    deadline = time.monotonic() + 60
    while True:
        btrfs.sync(small)
        try:
            other.backend.check_stream_space(origin.stream_bytes)
        except ResilverError:
            assert time.monotonic() < deadline  # what was deleted is given back later, and by whole chunks
            run("btrfs", "balance", "start", "-dusage=5", "-musage=5", small)
        else:
            break
    other.receive(node, base)
    same(node.path, other.path)


def test_the_reserve_is_kept(places):
    node = Node(places[0] / "a", reserve_min_bytes=1 << 40)
    node.create()
    assert refused(node.snapshot).reason == "NO_SPACE"
    node.backend.set_reserve(0.0, 0)
    node.snapshot()
    assert node.backend.check_stream_space(None) > 0


def test_the_steps_are_those_that_are_listed(node, other):
    base = pair(node, other)
    seen = []
    late = Node(other.directory, step=seen.append)
    late.receive(node, base)
    assert tuple(seen) == btrfs_commit.STEPS
    assert never().is_set() is False
