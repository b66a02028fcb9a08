"""A subvolume that somebody uses is named and left alone, whenever he comes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.backends import btrfs_keep
from agent.disk import btrfs, exports, leases
from agent.disk.btrfs_use import users_of
from resilver.lineage import Consistency
from resilver.volume import LiveState
from tests.agent.backends.btrfs.nodes import Node, pair, refused, same
from tests.deadfuse import dead_mount
from tests.loopfs import attached, run


class Holder:
    """A process that holds something of a directory until it is told to go."""

    def __init__(self, how: str, directory: Path) -> None:
        code = {
            "read": "f = open(sys.argv[1] + '/a')",
            "write": "f = open(sys.argv[1] + '/new', 'w')",
            "directory": "f = os.open(sys.argv[1] + '/d', os.O_RDONLY)",
            "path only": "f = os.open(sys.argv[1], os.O_PATH)",
            "cwd": "os.chdir(sys.argv[1] + '/d')",
            "root": "os.chroot(sys.argv[1])",
            "mapped": "f = open(sys.argv[1] + '/a', 'r+b'); m = mmap.mmap(f.fileno(), 0); f.close()",
        }[how]
        script = f"import os, sys, mmap; {code}; print('ready', flush=True); sys.stdin.read()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout.readline() == b"ready\n"

    def go(self) -> None:
        self.process.communicate(timeout=30)


@pytest.mark.parametrize("how", ["read", "write", "directory", "path only", "cwd", "root", "mapped"])
def test_in_use_by_a_process(node, other, how):
    base = pair(node, other)
    stage = other.stage_from(node, base)
    holder = Holder(how, other.path)
    try:
        found = other.backend.examine().live
        assert found.in_use
        assert found.state in {LiveState.MODIFIED, LiveState.UNKNOWN}
        error = refused(lambda: other.backend.commit(stage, other.order(node.lineage)))
    finally:
        holder.go()
    assert error.reason == "IN_USE"
    assert f"pid {holder.process.pid}" in error.metadata["in_use_by"]
    assert other.lineage.tip_id == base
    other.backend.commit(stage, other.order(node.lineage))
    same(node.path, other.path)


def test_in_use_by_its_own_program(node, other):
    base = pair(node, other)
    (other.path / "sleep").write_bytes(Path("/bin/sleep").read_bytes())
    (other.path / "sleep").chmod(0o755)
    process = subprocess.Popen([other.path / "sleep", "60"])
    try:
        assert [user.name for user in users_of(other.path)] == [f"sleep pid {process.pid}"]
        assert refused(lambda: other.receive(node, base)).reason == "IN_USE"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", ["subvolume", "bind", "inner bind", "another namespace", "itself"])
def test_in_use_by_a_mount(node, other, how, tmp_path):
    base = pair(node, other)
    mount, top = btrfs.place_of(other.path)
    point = tmp_path / "point"
    point.mkdir()
    holder = None
    if how == "subvolume":
        run("mount", "-o", f"subvol={top}", mount.source, point)
    elif how == "bind":
        run("mount", "--bind", other.path, point)
    elif how == "inner bind":
        run("mount", "--bind", other.path / "d", point)
    elif how == "itself":
        point = other.path
        run("mount", "--bind", other.path, point)
    else:
        script = 'mount --bind "$1" "$2" && echo ready && read line'
        holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", script, "sh", other.path, point],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert holder.stdout.readline() == b"ready\n"
    try:
        error = refused(lambda: other.receive(node, base))
    finally:
        if holder is not None:
            holder.communicate(b"\n", timeout=30)
        else:
            run("umount", point)
    assert error.reason == "IN_USE"
    assert f"mount at {point}" in error.metadata["in_use_by"]
    other.receive(node, base)


def test_in_use_by_a_loop_device(node, other):
    base = pair(node, other)
    with (other.path / "disk").open("wb") as file:
        file.truncate(1 << 20)
    with attached(other.path / "disk") as device:
        error = refused(lambda: other.receive(node, base))
    assert error.metadata["in_use_by"] == str(device)


def test_in_use_by_swap(node, other):
    base = pair(node, other)
    swap = other.path / "swap"
    swap.touch(mode=0o600)
    run("chattr", "+C", swap)
    run("fallocate", "-l", "16M", swap)
    run("mkswap", "-q", swap)
    if subprocess.run(["swapon", swap], check=False, capture_output=True).returncode:
        pytest.skip("no swap files here")
    try:
        error = refused(lambda: other.receive(node, base))
        assert error.reason == "IN_USE"
        assert "swap" in error.metadata["in_use_by"]
        error = refused(other.snapshot)
        assert error.reason == "SNAPSHOT_NOT_ATOMIC"
        assert not [entry for entry in other.root.iterdir() if entry.name.startswith(".new")]
    finally:
        run("swapoff", swap)


def test_a_mount_alone_is_synced_and_a_reader_too(node, tmp_path):
    node.create()
    mount, top = btrfs.place_of(node.path)
    run("mount", "-o", f"subvol={top}", mount.source, tmp_path)
    try:
        assert node.snapshot().consistency is Consistency.SYNCED
    finally:
        run("umount", tmp_path)


def test_somebody_who_comes_between_the_check_and_the_exchange(node, other):
    """Found by the second look: everything goes back, and what he writes stays."""
    base = pair(node, other)
    opened = []

    def step(name: str) -> None:
        if name == "commit.snapshot":
            opened.append((other.path / "a").open("r+b"))

    late = Node(other.directory, step=step)
    error = refused(lambda: late.receive(node, base))
    assert error.reason == "IN_USE"
    opened[0].write(b"his")
    opened[0].close()
    assert (other.path / "a").read_bytes()[:3] == b"his"
    assert other.lineage.tip_id == base
    assert other.backend.examine().preserved == ()
    assert not [entry for entry in other.root.iterdir() if entry.name.startswith(".")]
    kept = other.receive(node, base)
    assert (Path(kept[0].path) / "a").read_bytes()[:3] == b"his"


def test_somebody_who_came_and_has_gone_when_the_names_changed(node, other):
    """Written between the check and the exchange, closed before the second look: preserved, not removed."""
    base = pair(node, other)

    def step(name: str) -> None:
        if name == "commit.snapshot":
            (other.path / "a").write_bytes(b"his")

    late = Node(other.directory, step=step)
    late.receive(node, base)
    same(node.path, other.path)
    kept = other.backend.examine().preserved
    assert [(Path(copy.path) / "a").read_bytes() for copy in kept] == [b"his"]


@contextlib.contextmanager
def hidden(path: Path, flags: int = os.O_RDWR) -> Iterator[socket.socket]:
    """A descriptor in no process' table, as those of nfsd and of io_uring: what receives it is yielded."""
    fd = os.open(path, flags)
    sender, receiver = socket.socketpair()
    with sender, receiver:
        socket.send_fds(sender, [b"x"], [fd])
        os.close(fd)
        yield receiver


def written_late(receiver: socket.socket) -> None:
    [fd] = socket.recv_fds(receiver, 1, 1)[1]
    os.pwrite(fd, b"late", 0)
    os.fsync(fd)
    os.close(fd)


def aside(of: Node) -> list[Path]:
    return sorted(of.root.glob(".aside-*"))


def test_a_file_open_for_writing_by_no_process(node, other):
    base = pair(node, other)
    stage = other.stage_from(node, base)
    with hidden(other.path / "d" / "b"):
        error = refused(lambda: other.backend.commit(stage, other.order(node.lineage)))
    assert error.reason == "IN_USE"
    assert "d/b" in error.metadata["in_use_by"]
    assert other.lineage.tip_id == base
    assert other.backend.examine().preserved == ()
    other.write("new", b"it can be written to as before")
    (other.path / "new").unlink()
    other.backend.commit(stage, other.order(node.lineage))
    same(node.path, other.path)
    assert aside(other) == []
    assert not [path for path in other.root.iterdir() if path.name.startswith(".")]


def test_a_reader_that_is_no_process_hinders_nobody(node, other):
    base = pair(node, other)
    with hidden(other.path / "a", os.O_RDONLY):
        assert other.receive(node, base) == ()


def test_what_is_open_for_writing_is_found_in_any_directory(tmp_path):
    (tmp_path / "link").symlink_to("/")
    os.mkfifo(tmp_path / "pipe")
    deep = tmp_path / "one" / "two"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"")
    assert leases.open_for_writing(tmp_path, 60.0) == ""
    with hidden(deep / "file"):
        assert leases.open_for_writing(tmp_path, 60.0) == "one/two/file"
    assert leases.open_for_writing(tmp_path, 0.0) is None
    assert leases.open_for_writing(tmp_path / "gone", 60.0) is None


def test_too_many_files_to_ask_are_set_aside(node, other, monkeypatch):
    """Not removed at the commit: what is written later through a descriptor that nobody sees is preserved."""
    monkeypatch.setattr(btrfs_keep, "ASKED_MAX_S", 0.0)
    base = pair(node, other)
    with hidden(other.path / "a") as receiver:
        assert other.receive(node, base) == ()
        again = Node(other.directory)
        again.backend.recover()
        assert len(aside(again)) == 1, "it is not long enough there"
        assert again.backend.examine().preserved == ()
        with pytest.raises(OSError, match="Read-only"):
            (aside(again)[0] / "a").write_bytes(b"through a path")
        written_late(receiver)
    monkeypatch.setattr(btrfs_keep, "ASIDE_S", 0.0)
    again.backend.recover()
    assert aside(again) == []
    [kept] = again.backend.examine().preserved
    assert (kept.live, kept.based_on) == (True, base)
    assert (Path(kept.path) / "a").read_bytes()[:5] == b"latea"
    same(node.path, again.path)


def test_what_was_set_aside_and_not_changed_goes_with_the_next_commit(node, other, monkeypatch):
    monkeypatch.setattr(btrfs_keep, "ASKED_MAX_S", 0.0)
    base = pair(node, other)
    other.receive(node, base)
    [first] = aside(other)
    (first / "a").read_bytes()
    list((first / "d").iterdir())
    for count in (2, 3):
        tip = other.lineage.tip_id
        node.write("a", b"%d" % count)
        node.snapshot()
        monkeypatch.setattr(btrfs_keep, "ASIDE_MAX", count - 1)
        other.receive(node, tip)
        assert len(aside(other)) == count
    assert first in aside(other)
    monkeypatch.setattr(btrfs_keep, "ASIDE_MAX", 2)
    other.backend.recover()
    assert len(aside(other)) == 2
    assert first not in aside(other), "the oldest one"
    assert other.backend.examine().preserved == ()


@pytest.mark.parametrize(
    "case",
    [
        ("{live}", "rw", True),
        ("{live}/d", "ro,root_squash", False),
        ("{above}", "rw,no_subtree_check", True),
        ("{disk}", "ro", False),
        ("/", "rw", None),
        ("/", "rw,crossmnt", True),
        ("{live}2", "rw", None),
        ("{bound}", "rw", True),
        ("{bound}/vm1/d", "rw", True),
        ("{bound}/other", "rw", None),
    ],
    ids=lambda case: f"{case[0]} {case[1]}",
)
def test_in_use_by_an_export(node, tmp_path, monkeypatch, case):
    """Of any directory above it on the same file system too, by whichever mount of that: no mount is in between."""
    where, options, writes = case
    node.create()
    bound = tmp_path / "bound here"
    bound.mkdir()
    name = where.format(live=node.path, above=node.directory, disk=node.directory.parents[1], bound=bound)
    table = tmp_path / "etab"
    table.write_text("# a comment\n{}\t10.0.0.0/8({},sec=sys)\n".format(name.replace(" ", "\\040"), options))
    monkeypatch.setattr(exports, "TABLES", (tmp_path / "none", table))
    run("mount", "--bind", node.directory, bound)
    try:
        found = [(user.name, user.writes) for user in users_of(node.path)]
    finally:
        run("umount", bound)
    assert found == ([] if writes is None else [(f"NFS export {name}", writes)])


@contextlib.contextmanager
def overlaid(options: str, point: Path, *, private: bool = False) -> Iterator[None]:
    """An overlay, mounted here or in a mount namespace of its own."""
    script = 'mount -t overlay overlay -o "$1" "$2" && echo ready && read line && umount "$2"'
    prefix = ["unshare", "-m"] if private else []
    process = subprocess.Popen(
        [*prefix, "sh", "-c", script, "sh", options, point], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    try:
        yield
    finally:
        process.communicate(b"\n", timeout=30)


@pytest.mark.parametrize("how", ["upper", "lower", "second lower", "another namespace"])
def test_in_use_by_an_overlay(node, other, how, tmp_path):
    node.create()
    for name in ("upper, one", "work/work", "low:er"):
        (node.path / name).mkdir(parents=True)
    base = node.snapshot()
    other.receive(node)
    node.write("a", b"newer")
    node.snapshot()
    stage = other.stage_from(node, base.id)
    point, low = tmp_path / "merged here", tmp_path / "low"
    point.mkdir()
    low.mkdir()
    live = str(other.path)
    lower = f"{live}/low\\:er"
    options = {
        "lower": f"lowerdir={lower}:{low}",
        "second lower": f"lowerdir={low}:{lower}",
    }.get(how, f"lowerdir={low},upperdir={live}/upper\\, one,workdir={live}/work")
    with overlaid(options, point, private=how == "another namespace"):
        [user] = [user for user in users_of(other.path) if user.name.startswith("overlay")]
        assert (user.name, user.writes) == (f"overlay mount at {point}", "lower" not in how)
        error = refused(lambda: other.backend.commit(stage, other.order(node.lineage)))
    assert error.reason == "IN_USE"
    assert f"overlay mount at {point}" in error.metadata["in_use_by"]
    assert users_of(other.path) == []


def test_an_overlay_in_a_namespace_with_paths_of_its_own(node, tmp_path):
    """As of a container's own containers: nothing is at that path here."""
    node.create()
    for name in ("upper", "work"):
        (node.path / name).mkdir()
    point = tmp_path / "point"
    point.mkdir()
    script = """
        mount -t tmpfs tmpfs "$2" && cd "$2" && mkdir data low merged && mount --bind "$1" data &&
        mount -t overlay overlay -o "lowerdir=$2/low,upperdir=$2/data/upper,workdir=$2/data/work" merged &&
        echo ready && read line
    """
    process = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script, "sh", node.path, point], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        assert f"overlay mount at {point}/merged" in [user.name for user in users_of(node.path)]
    finally:
        process.communicate(b"\n", timeout=30)


@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="no FUSE here")
@pytest.mark.parametrize("how", ["", "namespace", "chroot"])
def test_a_mount_of_others_that_answers_no_more_hangs_nobody(node, tmp_path, how):
    """In a process of its own, which can be killed: in ours, what hangs would hang the tests."""
    node.create()
    point = tmp_path / "dead mount"
    point.mkdir()
    script = "import sys, pathlib, agent.disk.btrfs_use as it; print(len(it.users_of(pathlib.Path(sys.argv[1]))))"
    with dead_mount(point, node.path / "d", how):
        looked = subprocess.run(
            [sys.executable, "-c", script, node.path], capture_output=True, text=True, check=False, timeout=20
        )
    assert (looked.stdout, looked.stderr) == ("1\n", ""), "the one that stands beside it is seen"
