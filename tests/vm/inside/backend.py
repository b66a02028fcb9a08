"""The lvm-thin backend on a real thin pool: each operation, and what it promises."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from agent.hooks import Hooked
from agent.together import Member, Together
from resilver.config import Hooks
from resilver.errors import Damaged, Invalid, NotFound, Refused, ResilverError
from resilver.lineage import Consistency, ConsistencyPoint
from resilver.volume import Grant, LiveState, Presence, VolumeRecord
from tests.vm.inside.node import CHUNK, GROUP, SIZE, VOLUME_ID, Node, noise, run


def test_before_anything_is_there(node):
    found = node.backend.examine()
    assert found.presence is Presence.EMPTY
    assert found.live.state is LiveState.ABSENT
    assert found.file_system_id
    assert found.free_bytes > 0
    assert not node.lvs(), "looking makes nothing"
    gone = Node("a", pool="pool")
    gone.backend._place.group_name = "nowhere"
    found = gone.backend.examine()
    assert (found.presence, found.file_system_id) == (Presence.EMPTY, "")
    assert "nowhere" in found.problems[0]
    with pytest.raises(Invalid, match="no volume group"):
        gone.backend.save_record(VolumeRecord("vm1"))


def test_records_stand_in_a_volume_of_their_own(node):
    record = VolumeRecord("vm1", VOLUME_ID, 3, "e3", "a", ("a", "b"), ConsistencyPoint(3, 42), "s42")
    node.backend.save_record(record)
    node.backend.save_grant(Grant(VOLUME_ID, 3, "e3"))
    run("umount", node.root)
    found = Node(node.name).backend.examine()
    assert (found.presence, found.record, found.grant) == (Presence.EMPTY, record, Grant(VOLUME_ID, 3, "e3"))
    node.backend.save_grant(None)
    assert node.backend.examine().grant is None
    assert node.lvs() == [f"{node.name}.resilver"]


def test_snapshot_delta_and_first_copy(node, other):
    node.create()
    assert node.backend.examine().live.state is LiveState.MODIFIED
    first = node.snapshot(note="first")
    assert (first.size_bytes, first.consistency) == (SIZE, Consistency.CLOSED)
    before = node.content
    found = node.backend.examine()
    assert (found.live.state, found.live.modified_bytes) == (LiveState.UNMODIFIED, 0)
    tags = run("lvs", "--noheadings", "-o", "lv_tags", f"{GROUP}")
    assert f"resilver.id={first.id}" in tags
    assert "resilver.cp=1-1" in tags

    node.write(3 * CHUNK + 5, b"something else")
    node.discard(SIZE // 2, 2 * CHUNK)
    node.write(SIZE - 10, b"the end")
    found = node.backend.examine()
    assert found.live.state is LiveState.MODIFIED
    assert found.live.modified_bytes == 2 * CHUNK
    assert node.read(first.id) == before
    second = node.snapshot()
    delta = [tuple(row) for row in node.backend.delta_map(first.id, second.id)]
    assert delta == [(3 * CHUNK, CHUNK, False), (SIZE // 2, 2 * CHUNK, True), (SIZE - CHUNK, CHUNK, False)]
    full = node.backend.delta_map("", second.id)
    assert full.data_bytes == sum(row.length for row in full)
    assert full.data_bytes < 20 * CHUNK

    assert other.receive(node) == ()
    assert other.content == node.content
    assert other.backend.examine().live.state is LiveState.UNMODIFIED
    assert other.lineage.ids() == node.lineage.ids()
    assert [record.present for record in other.lineage] == [True, False]
    with pytest.raises(Refused) as refused:
        other.backend.delta_map(first.id, second.id)
    assert refused.value.reason == "BASE_GONE"


def test_stale_then_diverged(node, other, tmp_path):
    node.create()
    base = node.snapshot()
    other.receive(node)
    node.write(100_000, noise(5, 200_000))
    node.discard(SIZE // 2, SIZE // 4)
    node.snapshot()
    assert other.receive(node, base.id) == ()
    assert other.content == node.content

    base = node.lineage.tip
    other.write(0, b"own data")
    mine = other.snapshot()
    snapshotted = other.content
    other.write(CHUNK, b"own live data")
    lived = other.content
    node.write(5 * CHUNK, noise(6, 1000))
    node.snapshot(epoch=2)
    with pytest.raises(Refused, match="only here"):
        other.receive(node, base.id)
    kept = other.receive(node, base.id, replace_own_data=True)
    assert other.content == node.content
    assert other.backend.examine().live.state is LiveState.UNMODIFIED
    assert {copy.live: copy.based_on for copy in kept} == {False: mine.id, True: mine.id}
    assert other.backend.examine().preserved == tuple(sorted(kept, key=lambda copy: (copy.create_time_ms, copy.id)))
    wanted = {False: snapshotted, True: lived}
    for number, copy in enumerate(kept):
        assert other.read(copy.id) == wanted[copy.live]
        assert copy.exclusive_bytes == CHUNK
        path = tmp_path / str(number)
        assert other.backend.export(copy.id, path, writable=True) == SIZE
        assert path.read_bytes() == wanted[copy.live]
        assert path.stat().st_blocks * 512 < SIZE // 2
        assert Path(copy.path).exists()
    for copy in kept:
        other.backend.drop(copy.id)
    assert other.backend.examine().preserved == ()
    with pytest.raises(NotFound):
        other.backend.drop(kept[0].id)
    assert len(other.lvs()) == 2 + sum(record.present for record in other.lineage)


def test_sizes(node, other):
    """Larger, then smaller, then larger again: what the pool still has beyond an end never shows."""
    node.create()
    base = node.snapshot()
    other.receive(node)
    for size in (SIZE + (4 << 20), SIZE - (4 << 20), SIZE):
        run("lvresize", "-y", "-f", "-L", f"{size}b", f"{GROUP}/{node.name}")
        if size > SIZE:
            node.write(size - 3 * CHUNK, noise(size, 3 * CHUNK))
        target = node.snapshot()
        assert target.size_bytes == size
        other.receive(node, base.id)
        assert other.content == node.content
        assert len(other.content) == size
        base = target
    with pytest.raises(Refused, match="truncate -s 12582912") as refused:
        other.backend.open_stage("", "t", SIZE + 1)
    assert refused.value.reason == "NOT_SUPPORTED"


def test_prune_and_drop(node):
    node.create()
    taken = []
    for turn in range(3):
        node.write(0, noise(turn, 5000))
        taken.append(node.snapshot())
    with pytest.raises(Refused, match="newest snapshot"):
        node.backend.drop(taken[2].id)
    assert node.backend.prune(1, frozenset({taken[0].id})) == ((taken[1].id, CHUNK),)
    assert [record.present for record in node.lineage] == [True, False, True]
    with pytest.raises(Refused, match="not on this node"):
        node.backend.open_reader(taken[1].id)
    run("lvremove", "-y", next(lv for lv in names_with(f"resilver.id={taken[0].id}")))
    assert [record.present for record in node.lineage] == [True, False, False], "removed by hand: seen"


def names_with(tag: str) -> list[str]:
    rows = (line.split() for line in run("lvs", "--noheadings", "-o", "lv_full_name,lv_tags", GROUP).splitlines())
    return [row[0] for row in rows if len(row) > 1 and tag in row[1].split(",")]


def test_a_snapshot_that_was_touched_is_none(node):
    node.create()
    taken = node.snapshot()
    name = names_with(f"resilver.id={taken.id}")[0]
    run("lvchange", "-prw", name)
    with pytest.raises(Damaged, match="writable") as damaged:
        node.backend.open_reader(taken.id)
    assert damaged.value.reason == "BASE_MISMATCH"
    run("lvchange", "-pr", "--deltag", f"resilver.id={taken.id}", name)
    with pytest.raises(Damaged, match="no tag"):
        node.backend.delta_map("", taken.id)


def test_frozen_while_mounted_and_never_replaced(node, other):
    """What a mount holds in memory is in its snapshot; a mounted or open volume is refused by name, and left alone."""
    node.create()
    first = node.snapshot()
    other.receive(node)
    run("mkfs.ext4", "-q", node.device)
    node.snapshot()
    stage, _delta = other.stage_from(node, first.id, node.lineage.tip)
    order = other.order(node.lineage)

    run("mkfs.ext4", "-q", other.device)
    point = Path("/mnt/point")
    point.mkdir(exist_ok=True)
    run("mount", other.device, point)
    (point / "unsynced").write_bytes(b"in memory only")
    before = other.lvs()
    with pytest.raises(Refused, match=f"mount {point}") as refused:
        other.backend.commit(stage, order)
    assert refused.value.reason == "IN_USE"
    assert other.backend.examine().live.in_use_by == (f"mount {point}",)
    taken = other.snapshot()
    assert taken.consistency is Consistency.FROZEN
    (point / "unsynced").unlink()
    run("umount", point)
    name = names_with(f"resilver.id={taken.id}")[0]
    run("lvchange", "-ay", "-K", name)
    run("mount", "-o", "ro,noload", f"/dev/{name}", point)
    assert (point / "unsynced").read_bytes() == b"in memory only"
    run("umount", point)
    assert set(before) < set(other.lvs())


def test_what_is_frozen_already(node):
    """As by a hook that freezes what LVM freezes: refused by name, with what undoes it."""
    node.create()
    node.snapshot()
    with mounted(node) as point:
        run("fsfreeze", "-f", point)
        try:
            with pytest.raises(Refused, match="is frozen already") as refused:
                node.snapshot()
        finally:
            run("fsfreeze", "-u", point)
        assert refused.value.reason == "IN_USE"
        assert refused.value.next_command == f"fsfreeze -u {point}"
        assert node.snapshot().consistency is Consistency.FROZEN
    assert len(node.lvs()) == 2 + 2, "nothing is left of the one that failed"


def test_a_group_of_mounted_volumes(node, other, tmp_path):
    """LVM cannot suspend what is frozen as part of a group: refused before anything is held, unless hooks stop those
    who write to it. One that nobody has open needs none.
    """
    for each in (node, other):
        each.create()
        each.snapshot()
    with mounted(node) as point:
        for how in (Hooks(), Hooks(before=(str(tmp_path / "no-such-program"),))):
            said = taken_together(tmp_path, {node: how, other: Hooks()})
            assert {error.reason for error in said} == {"NOT_SUPPORTED"}
            assert any(str(point) in error.message for error in said)
            assert {error.metadata["field"] for error in said} == {"volumes.hooks.freezes"}
        (point / "unsynced").write_bytes(b"in memory only")
        taken = taken_together(tmp_path, {node: Hooks(freezes=True), other: Hooks()})
        assert [one.consistency for one in taken] == [Consistency.FROZEN, Consistency.CLOSED]
        assert len({one.group_id for one in taken}) == 1
    assert b"in memory only" in node.read(node.lineage.tip_id)


@contextlib.contextmanager
def mounted(node: Node) -> Iterator[Path]:
    run("mkfs.ext4", "-q", node.device)
    point = Path(f"/mnt/point-{node.name}")
    point.mkdir()
    run("mount", node.device, point)
    try:
        yield point
    finally:
        run("umount", point)


def taken_together(directory: Path, nodes: dict[Node, Hooks]) -> list:
    """The snapshots of one order, or what each was refused with."""
    group = Together([node.name for node in nodes], "a", directory / "hooks", group="g", group_id="G1")
    ended = {}

    def take(node: Node, hooks: Hooks) -> None:
        try:
            group.arrive(Member(Hooked(node.name, hooks), str(node.device)))
            settle = partial(group.settle, node.name)
            ended[node] = node.snapshot(group_id=group.group_id, settle=settle)
            group.leave(node.name)
        except ResilverError as error:
            ended[node] = error
            group.leave(node.name, error)

    threads = [threading.Thread(target=take, args=each) for each in nodes.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return [ended[node] for node in nodes]


@pytest.mark.parametrize("how", ["open", "swap", "loop", "device"])
def test_in_use(node, other, how):
    node.create()
    first = node.snapshot()
    other.receive(node)
    node.write(0, b"new")
    node.snapshot()
    stage, _delta = other.stage_from(node, first.id, node.lineage.tip)
    size = SIZE // 512
    begin, end, name = {
        "open": ([], [], f"pid {os.getpid()}"),
        "swap": (["swapon", other.device], ["swapoff", other.device], "swap"),
        "loop": (["losetup", "-f", other.device], ["losetup", "-D"], "/dev/loop"),
        "device": (
            ["dmsetup", "create", "upon", "--table", f"0 {size} linear {other.device} 0"],
            ["dmsetup", "remove", "upon"],
            "device upon",
        ),
    }[how]
    if how == "swap":
        run("mkswap", other.device)
    held = other.device.open("rb") if how == "open" else None
    if begin:
        run(*begin)
    shown = other.content
    try:
        found = other.backend.examine().live
        assert any(name in user for user in found.in_use_by), found
        with pytest.raises(Refused) as refused:
            other.backend.commit(stage, other.order(node.lineage))
        assert refused.value.reason == "IN_USE"
        assert name in refused.value.message
    finally:
        if held is not None:
            held.close()
        if end:
            run(*end)
    assert other.content == shown
    kept = other.backend.commit(stage, other.order(node.lineage))
    assert len(kept) == (how == "swap")
    assert other.content == node.content


def test_a_leaked_metadata_snapshot(node):
    """Ours is released; another's is told, with the command that releases it, and left alone."""
    from agent.disk import thin

    node.create()
    node.snapshot()
    node.write(0, b"x")
    run("dmsetup", "message", "vg-pool-tpool", "0", "reserve_metadata_snap")
    waited, thin.FOREIGN_MAX_S = thin.FOREIGN_MAX_S, 0.5
    try:
        tip = node.lineage.tip_id
        with pytest.raises(Refused, match="release_metadata_snap") as refused:
            node.backend.delta_map("", tip)
        found = node.backend.examine()
        assert found.live.state is LiveState.UNKNOWN
        assert any("release_metadata_snap" in problem for problem in found.problems)
    finally:
        thin.FOREIGN_MAX_S = waited
    subprocess.run(refused.value.next_command.split(), check=True)
    assert node.backend.examine().live.state is LiveState.MODIFIED
    assert held_root() == "-"
    # Another tool is quicker, just before our own: it is waited for like any other, and keeps what it has.
    comes = iter(["metadata.marked"])

    def step(name):
        if name == next(comes, ""):
            run("dmsetup", "message", "vg-pool-tpool", "0", "reserve_metadata_snap")

    thin.FOREIGN_MAX_S = 0.5
    try:
        with pytest.raises(Refused, match="not made") as refused:
            Node(node.name, step=step).backend.delta_map("", tip)
        assert held_root() != "-"
        # Ours is released by hand meanwhile, and another's held: that one is left alone, too.
        run(*refused.value.next_command.split())
        theirs = {}

        def swapped(name):
            if name == "metadata.known":
                run(*refused.value.next_command.split())
                node.write(CHUNK, b"another place of the metadata")
                run("lvcreate", "-s", "-n", f"{node.name}-x", f"{GROUP}/{node.name}")
                run("dmsetup", "message", "vg-pool-tpool", "0", "reserve_metadata_snap")
                theirs["root"] = held_root()

        assert len(Node(node.name, step=swapped).backend.delta_map("", tip))
        assert held_root() == theirs["root"]
    finally:
        thin.FOREIGN_MAX_S = waited
    run(*refused.value.next_command.split())


def held_root() -> str:
    return run("dmsetup", "status", f"{GROUP}-pool-tpool").split()[6]
