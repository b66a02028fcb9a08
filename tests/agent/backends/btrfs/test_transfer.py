"""What is taken, sent, received, verified and committed, between two Btrfs."""

from __future__ import annotations

import os

import pytest

from agent.backends import btrfs_send
from agent.backends.base import StreamOrigin
from agent.backends.btrfs_stream import Parser
from agent.backends.btrfs_verify import verify
from agent.disk import btrfs, loops
from resilver.errors import ResilverError
from resilver.lineage import Consistency
from resilver.volume import LiveState, Presence
from tests.agent.backends.btrfs.nodes import Node, never, pour, reason, same
from tests.loopfs import mounted, run


def test_nothing_there_is_empty(node):
    found = node.backend.examine()
    assert found.presence is Presence.EMPTY
    assert found.live.state is LiveState.ABSENT
    assert found.file_system_id
    assert not node.root.exists()


def test_a_snapshot_is_a_read_only_subvolume_with_its_record(node):
    node.create()
    made = node.snapshot()
    assert made.consistency is Consistency.CLOSED
    assert made.size_bytes == 0
    found = node.backend.examine()
    assert found.lineage.tip == made
    assert found.live.state is LiveState.UNMODIFIED
    assert btrfs.info(node.data(made.id)).read_only
    assert node.backend.native_id(made.id) == btrfs.info(node.data(made.id)).uuid
    same(node.path, node.data(made.id))


def test_a_writer_makes_it_a_crash_consistent_one(node):
    node.create()
    with (node.path / "log").open("wb") as file:
        file.write(b"half")
        file.flush()
        made = node.snapshot()
    assert made.consistency is Consistency.CRASH
    assert (node.data(made.id) / "log").read_bytes() == b"half"


@pytest.mark.parametrize("stream_format", ["btrfs-1", "btrfs-2c"])
def test_first_copy_and_delta_between_two_file_systems(node, other, stream_format):
    if stream_format not in btrfs_send.formats():
        pytest.skip("this kernel or these btrfs-progs do not have it")
    fill(node)
    base = node.snapshot()
    other.receive(node, "", stream_format)
    same(node.path, other.path)
    change(node)
    node.snapshot()
    assert other.receive(node, base.id, stream_format) == ()
    same(node.path, other.path)
    same(node.data(node.lineage.tip_id), other.data(node.lineage.tip_id))
    found = other.backend.examine()
    assert found.live.state is LiveState.UNMODIFIED
    assert found.lineage.ids() == node.lineage.ids()
    assert all(record.present for record in found.lineage)
    assert not [entry for entry in other.root.iterdir() if entry.name.startswith(".") or entry.name == "stage"]


def test_a_compressed_source_sends_what_is_compressed(node, other):
    """The other way: the second file system compresses everything."""
    fill(other)
    other.write("text", b"the same line again\n" * 100_000)
    first = other.snapshot()
    sizes = {name: pour(other, "", first.id, name, lambda _data: None) for name in btrfs_send.formats()}
    if btrfs_send.COMPRESSED in sizes:
        assert sizes[btrfs_send.COMPRESSED] < sizes[btrfs_send.PLAIN] - 1_000_000
    node.receive(other)
    same(node.path, other.path)


def fill(node: Node) -> None:
    """Holes, hard links, ACLs, attributes, odd names, devices, empty and inline files."""
    node.create()
    path = node.path
    with (path / "holes").open("wb") as file:
        file.truncate(64 << 20)
        for offset in (1 << 20, (17 << 20) + 5, (64 << 20) - 3):
            file.seek(offset)
            file.write(os.urandom(3))
    os.link(path / "a", path / "d" / "hard link")
    (path / "link").symlink_to("d/b")
    (path / "dangling").symlink_to("/nowhere/at all")
    os.setxattr(path / "a", "user.note", b"x" * 200)
    os.setxattr(path / "d", "trusted.note", b"y")
    run("setfacl", "-m", "u:12345:rw", path / "a")
    run("setfacl", "-d", "-m", "g:54321:rx", path / "d")
    (path / "ünï cödé \n name").write_bytes(b"z" * 10_000)
    os.mkfifo(path / "fifo")
    os.mknod(path / "null", 0o20666, os.makedev(1, 3))
    os.chown(path / "d" / "b", 1234, 4321)
    (path / "empty").touch()
    (path / "set").write_bytes(b"1")
    (path / "set").chmod(0o6755)
    path.chmod(0o2750)
    for number in range(300):
        (path / "d" / f"small {number}").write_bytes(os.urandom(number * 7))


def change(node: Node) -> None:
    path = node.path
    with (path / "d" / "b").open("r+b") as file:
        file.seek(100_000)
        file.write(os.urandom(5000))
        file.truncate(200_000)
    with (path / "holes").open("r+b") as file:
        file.seek(30 << 20)
        file.write(os.urandom(2 << 20))
    (path / "d").rename(path / "moved")
    (path / "moved" / "deep").mkdir()
    (path / "moved" / "small 7").rename(path / "moved" / "deep" / "seven")
    (path / "moved" / "deep" / "new").write_bytes(os.urandom(100_000))
    (path / "a").unlink()
    (path / "a").mkdir()
    (path / "a" / "now a directory").write_bytes(b"q" * 9000)
    run("cp", "--reflink=always", path / "holes", path / "cloned")
    os.removexattr(path / "moved", "trusted.note")
    (path / "empty").unlink()


def test_access_times_are_no_change_and_anything_else_is(node):
    node.create()
    run("mount", "-o", "remount,strictatime", mount_of(node))
    try:
        node.snapshot()
        before = btrfs.info(node.path).ctransid
        (node.path / "d" / "b").read_bytes()
        btrfs.sync(node.path)
        assert btrfs.info(node.path).ctransid > before  # or this test would show nothing
        assert node.backend.examine().live.state is LiveState.UNMODIFIED
    finally:
        run("mount", "-o", "remount,relatime", mount_of(node))
    os.utime(node.path / "a", ns=(1, 1))
    assert node.backend.examine().live.state is LiveState.MODIFIED


def mount_of(node: Node):
    return btrfs.place_of(node.path)[0].point


def test_modified_bytes(node):
    node.create()
    node.snapshot()
    node.write("new", os.urandom(1 << 20))
    assert node.backend.examine().live.modified_bytes == 1 << 20


# Correspondence.


def test_a_replica_received_from_the_primary(node, other):
    node.create()
    first = node.snapshot()
    other.receive(node)
    assert btrfs.info(other.data(first.id)).received_uuid == btrfs.info(node.data(first.id)).uuid
    assert other.backend.native_id(first.id) == node.backend.native_id(first.id)
    node.write("x", b"1")
    node.snapshot()
    other.receive(node, first.id)
    same(node.path, other.path)


def test_a_primary_that_was_received_from_the_replica(node, other):
    node.create()
    first = node.snapshot()
    other.receive(node)
    other.write("x", b"1")
    second = other.snapshot(epoch=2)
    node.receive(other, first.id)
    same(node.path, other.path)
    # And on: the base is now one's own on the target, and received on the source.
    node.write("y", b"2")
    node.snapshot(epoch=2)
    other.receive(node, second.id)
    same(node.path, other.path)


def test_both_received_from_a_third(node, other, places):
    third = Node(places[0] / "c")
    third.create()
    first = third.snapshot()
    node.receive(third)
    other.receive(third)
    infos = [btrfs.info(one.data(first.id)) for one in (node, other)]
    assert infos[0].received_uuid == infos[1].received_uuid == btrfs.info(third.data(first.id)).uuid
    node.write("x", b"1")
    node.snapshot(epoch=2)
    other.receive(node, first.id)
    same(node.path, other.path)


def test_two_file_systems_that_look_the_same(tmp_path):
    """The same paths and the same tree numbers on both, as on two machines: each finds its own."""
    with mounted("btrfs", 256 << 20) as one, mounted("btrfs", 256 << 20) as two, mounted("btrfs", 256 << 20) as three:
        source, replicas = Node(one / "x"), [Node(two / "x"), Node(three / "x")]
        source.create()
        base = source.snapshot()
        for replica in replicas:
            replica.receive(source)
        trees = [btrfs.info(replica.data(base.id)).tree for replica in replicas]
        assert trees[0] == trees[1]
        for turn in (b"1", b"2"):
            source.write("a", turn)
            target = source.snapshot()
            for replica in replicas:
                replica.receive(source, base.id)
                same(source.path, replica.path)
                (found,) = [one for one in btrfs.subvolumes(replica.path) if f"/{base.id}/" in one.path]
                assert btrfs.reach(found, loops.own_mounts()) == replica.data(base.id)
            base = target


# What is not as it should be.


def test_a_broken_receive_is_swept_and_the_next_one_comes_through(node, other):
    fill(node)
    base = node.snapshot()
    other.receive(node)
    change(node)
    target = node.snapshot()
    stage = other.stage_from(node, base.id, limit=1_000_000)
    assert [found for found in btrfs.subvolumes(other.directory) if "/in-" in found.path]
    stage.close()
    again = Node(other.directory)
    again.backend.recover()
    assert not [found for found in btrfs.subvolumes(other.directory) if "/in-" in found.path]
    again.receive(node, base.id)
    assert again.lineage.tip_id == target.id
    same(node.path, other.path)


def test_a_stream_that_stops_between_two_commands_is_not_whole(node, other):
    node.create()
    first = node.snapshot()
    pieces: list[bytes] = []
    pour(node, "", first.id, "btrfs-1", lambda data: pieces.append(bytes(data)))
    whole = b"".join(pieces)
    cut = whole[:-10]  # without the command that ends it
    assert not list(Parser().feed(whole[:17]))
    stage = other.backend.open_stream_stage("", first.id, node.origin("", first.id))
    stage.start("btrfs-1")
    stage.feed(memoryview(cut))
    assert reason(stage.finish) == "SOURCE_DAMAGED"
    stage.start("btrfs-1")
    stage.feed(memoryview(whole))
    stage.finish()
    stage.finish()
    stage.verify(never())


@pytest.mark.parametrize("what", ["another target", "a full copy"])
def test_a_stream_of_something_else_is_refused(node, other, what):
    node.create()
    base = node.snapshot()
    other.receive(node)
    node.write("x", b"1")
    middle = node.snapshot()
    node.write("x", b"2")
    last = node.snapshot()
    stage = other.backend.open_stream_stage(base.id, last.id, node.origin(base.id, last.id))
    stage.start("btrfs-1")
    wrong = (base.id, middle.id) if what == "another target" else ("", last.id)
    assert reason(lambda: pour(node, *wrong, "btrfs-1", stage.feed)) == "SOURCE_DAMAGED"
    stage.close()


def test_verify_finds_a_block_that_is_not_what_came(node, other):
    fill(node)
    node.snapshot()
    stage = other.stage_from(node, "")
    stage.verify(never())
    data = other.root / "stage" / "tree" / "data"
    btrfs.set_read_only(data, read_only=False)
    with (data / "d" / "b").open("r+b") as file:
        file.seek(150_000)
        file.write(b"\0")
    btrfs.set_read_only(data, read_only=True)
    btrfs.sync(data)
    with pytest.raises(ResilverError) as caught:
        verify(data, other.root / "stage", never())
    assert caught.value.reason == "READBACK_MISMATCH"
    assert "d/b" in caught.value.message
    stage.close()


def test_a_stream_that_is_closed_in_the_middle(node):
    node.create()
    node.write("big", os.urandom(8 << 20))
    first = node.snapshot()
    send = node.backend.open_send("", first.id, "btrfs-1")
    send.read_into(memoryview(bytearray(1000)))
    process = send._process
    send.close()
    send.close()
    assert process.returncode is not None
    assert reason(lambda: send.read_into(memoryview(bytearray(10)))) == "IO_ERROR"


def test_a_stage_is_gone_on_with_and_another_discarded(node, other):
    node.create()
    first = node.snapshot()
    origin = node.origin("", first.id)
    stage = other.backend.open_stream_stage("", first.id, origin)
    assert not stage.resumed
    assert stage.resume_token() == ""
    (stage.directory / "spool").write_bytes(b"what came")
    stage.close()
    again = Node(other.directory)
    again.backend.recover()
    stage = again.backend.open_stream_stage("", first.id, origin)
    assert stage.resumed
    assert (stage.directory / "spool").read_bytes() == b"what came"
    changed = StreamOrigin("", "another", origin.formats)
    assert not again.backend.open_stream_stage("", first.id, changed).resumed
    assert not (stage.directory / "spool").exists()


def test_verify_after_a_restart(node, other):
    node.create()
    first = node.snapshot()
    other.stage_from(node, "").close()
    again = Node(other.directory)
    again.backend.recover()
    stage = again.backend.open_stream_stage("", first.id, node.origin("", first.id))
    assert stage.resumed
    stage.finish()
    stage.verify(never())
    again.backend.commit(stage, again.order(node.lineage))
    same(node.path, other.path)
