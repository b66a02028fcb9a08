"""What a delta stands on: it is the base, untouched, whatever else is called so."""

from __future__ import annotations

import time

from agent.backends.btrfs_layout import native_of, save_native
from agent.disk import btrfs
from resilver.errors import ResilverError
from tests.agent.backends.btrfs.nodes import Node, reason, same
from tests.loopfs import run


def test_a_base_that_was_written_to_is_found_before_it_is_used(node, other):
    node.create()
    base = node.snapshot()
    other.receive(node)
    data = other.data(base.id)
    btrfs.set_read_only(data, read_only=False)
    (data / "a").write_bytes(b"evil")
    btrfs.set_read_only(data, read_only=True)
    node.write("x", b"1")
    target = node.snapshot()
    native = node.backend.native_id(base.id)
    assert reason(lambda: other.backend.check_base(base.id, native)) == "BASE_MISMATCH"
    assert reason(lambda: other.backend.open_send("", base.id, "btrfs-1")) == "BASE_MISMATCH"
    assert target.id == node.lineage.tip_id


def test_a_base_that_was_put_in_place_of_it(node, other):
    node.create()
    base = node.snapshot()
    other.receive(node)
    btrfs.destroy(other.data(base.id))
    btrfs.snapshot(other.path, other.data(base.id), read_only=True)
    assert reason(lambda: other.backend.check_base(base.id, node.backend.native_id(base.id))) == "BASE_MISMATCH"


def test_a_balance_leaves_a_base_as_good_as_it_was(node, other):
    node.create()
    base = node.snapshot()
    other.receive(node)
    run("btrfs", "balance", "start", "--full-balance", other.directory)
    other.backend.check_base(base.id, node.backend.native_id(base.id))


def test_another_subvolume_of_the_bases_name_is_not_taken_for_it(node, other):
    """`btrfs receive` looks for its parent by identity, and a snapshot of a received one has the same."""
    node.create()
    base = node.snapshot()
    other.receive(node)
    twin = other.directory / "twin"
    btrfs.snapshot(other.data(base.id), twin, read_only=True)
    btrfs.set_read_only(twin, read_only=False)
    (twin / "a").write_bytes(b"evil")
    btrfs.set_read_only(twin, read_only=True)
    node.write("x", b"1")
    node.snapshot()
    try:
        other.receive(node, base.id)
    except ResilverError as error:
        assert error.reason == "BASE_MISMATCH"  # noqa: PT017  # the kernel is free to find the right one
    else:
        same(node.path, other.path)


def test_snapshots_of_a_copy_that_was_received_and_made_writable_are_told_apart(node, other, places):
    """Read-only ones say of themselves what their source says that it was received from: all would be the same."""
    node.create()
    base = node.snapshot()
    other.receive(node)
    promoted = Node(places[1] / "promoted")
    btrfs.snapshot(other.data(base.id), promoted.path, read_only=True)
    btrfs.set_read_only(promoted.path, read_only=False)
    assert btrfs.info(promoted.path).received_uuid
    target = Node(places[0] / "target")
    previous = ""
    for turn in range(4):
        promoted.write("x" if turn == 1 else f"x{turn}", b"%d" % turn)
        made = promoted.snapshot()
        target.receive(promoted, previous)
        same(promoted.path, target.path)
        previous = made.id


def alike(node: Node, snapshot_id: str) -> None:
    """A snapshot of a live copy, as an earlier version took it: called what the live copy was received from."""
    data = node.data(snapshot_id)
    btrfs.destroy(data)
    btrfs.snapshot(node.path, data, read_only=True)
    save_native(data.parent / "native.json", native_of(data, time.time_ns()))


def test_nor_is_another_one_of_its_name_taken_for_a_base_of_ours(node, other, places):
    """As an earlier version has taken and sent them: a delta would stand on what was the first."""
    node.create()
    base = node.snapshot()
    other.receive(node)
    promoted, target = Node(places[1] / "promoted"), Node(places[0] / "target")
    btrfs.snapshot(other.data(base.id), promoted.path, read_only=True)
    btrfs.set_read_only(promoted.path, read_only=False)
    for turn in range(2):
        promoted.write("x", b"%d" % turn)
        alike(promoted, promoted.snapshot().id)
        target.receive(promoted)
    second, first = (record.id for record in target.lineage.records[:2])
    assert target.backend.native_id(first) == target.backend.native_id(second)
    promoted.write("y", b"new")
    promoted.snapshot()
    assert reason(lambda: target.receive(promoted, second)) == "BASE_MISMATCH"
    alike(promoted, promoted.snapshot().id)
    assert reason(lambda: target.receive(promoted, second)) == "BASE_MISMATCH"
    target.receive(promoted)
    same(promoted.path, target.path)


def test_base_and_target_gone(node, other):
    node.create()
    first = node.snapshot()
    node.write("x", b"1")
    second = node.snapshot()
    node.backend.drop(first.id)
    assert reason(lambda: node.backend.open_send(first.id, second.id, "btrfs-1")) == "BASE_GONE"
    assert reason(lambda: node.backend.delta_bytes("", first.id)) == "TARGET_GONE"
    assert reason(lambda: other.backend.check_base(first.id, "x")) == "BASE_GONE"
    assert reason(lambda: node.backend.open_send("", second.id, "btrfs-1", "token")) == "TICKET_INVALID"
    assert reason(lambda: node.backend.open_send("", second.id, "btrfs-9")) == "INVALID_FIELD"
