"""A finished stage becomes the newest snapshot, and the live copy its clone.

The order, in which a crash after any line leaves the path showing one whole image, the old or the new:

1. The new live copy is made at `.live` and synced; the lineage that the source told is logged. Nothing is changed yet.
2. A lease on the live copy: nobody has it open, and openers wait. It is compared with its tip. A second lease on the
   new live copy, so that nobody can write to it before the commit is certain.
3. What will be preserved is described beside its data; then the intention is written (`commit.json`).
4. The stage's tree is renamed to the target's snapshot directory.
5. `.live` and the live copy change places in one step (or `.live` is renamed, if there was none). This decides.
6. If somebody came to wait for the old live copy or made it another name, or a path was not the file that was leased
   or filled: all of it back. Files are told by their descriptors; what a path leads to may have changed meanwhile.
7. Snapshots off the lineage and a live copy with data of its own move among the preserved copies; an unmodified one
   becomes the spare. The intention is removed, then the stage.

What is left then, and what is undone, is in `image_finish.py`.
The old inode is what is preserved, so that whoever opened it late writes into the preserved copy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass, replace

from agent.backends import image_keep as keeping
from agent.backends import rules
from agent.backends.base import CommitOrder
from agent.backends.image_copy import copy_attributes, create, opened, remove_tree
from agent.backends.image_finish import Tools, forward, is_at, settle, undo
from agent.backends.image_layout import (
    Journal,
    Layout,
    State,
    Stored,
    append_records,
    check_id,
    list_preserved,
    load_journal,
    load_state,
    save_journal,
    save_preserved,
    save_stored,
)
from agent.backends.image_live import check_live, refuse_other_names
from agent.backends.image_stage import ImageStage, discard
from agent.disk import ioctl
from agent.disk.durable import disk_errors, fsync_dir
from agent.disk.inuse import InUseError, Lease
from resilver.errors import Refused
from resilver.lineage import Snapshot
from resilver.volume import PreservedCopy

STEPS = (
    "commit.begun",
    "commit.filled",
    "commit.logged",
    "commit.leased",
    "commit.described",
    "commit.intended",
    "commit.snapshot",
    "commit.exchanged",
    "commit.synced",
    "commit.kept",
    "commit.live_kept",
    "commit.closed",
    "commit.swept",
)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a commit is to do, decided before anything is changed."""

    order: CommitOrder
    state: State
    target: Snapshot
    leaving: tuple[Snapshot, ...]
    made_target: bool


def commit(tools: Tools, stage: ImageStage, order: CommitOrder) -> tuple[PreservedCopy, ...]:
    """See `Backend.commit`. Refused: nothing has changed, and the stage is as it was."""
    layout = tools.layout
    with disk_errors(layout.root):
        settle(tools)
        state = load_state(layout)
        plan = _plan(layout, state, stage, order)
        if plan is None:
            return tuple(copy for copy in list_preserved(layout) if copy.resync_id == order.resync_id)
        try:
            with contextlib.ExitStack() as stack:
                return _commit(tools, stage, plan, stack)
        except InUseError as error:
            raise error.refused(layout.live) from error
        finally:
            if load_journal(layout) is None:
                remove_tree(layout.incoming)


def _plan(layout: Layout, state: State, stage: ImageStage, order: CommitOrder) -> _Plan | None:
    """None if the target is the tip already; raises what forbids the commit."""
    target = rules.check_target(order, stage.target, stage.size_bytes)
    check_id(target.id)
    live = layout.live.exists()
    leaving = rules.leaving(state, order, layout.live, live=live, adopted=True)
    if leaving is None:
        return None
    kept = tuple(record for record in leaving if record.id in state.stored)
    return _Plan(order, state, target, kept, made_target=target.id not in state.stored)


def _commit(tools: Tools, stage: ImageStage, plan: _Plan, stack: contextlib.ExitStack) -> tuple[PreservedCopy, ...]:
    layout, state = tools.layout, plan.state
    found = check_live(layout.live)
    there = found is not None
    if found is not None:
        _leased(tools, state).close()  # in use: found before anything is made
        refuse_other_names(layout.live, found)
    tools.step("commit.begun")
    stage.sync()
    new = _make_live(tools, plan, stage, stack)
    tools.step("commit.filled")
    append_records(layout, (*plan.order.lineage, *plan.leaving), state, logged=[gone.id for gone in plan.leaving])
    tools.step("commit.logged")
    old = stack.enter_context(_leased(tools, state)) if there else None
    own = old is not None and not _unmodified(tools, state, old)
    tools.step("commit.leased")
    if old is not None:
        copy_attributes(old.fd, new.fd)
    os.fsync(new.fd)
    fsync_dir(layout.root)
    journal, copies = _intend(tools, plan, old if own else None, os.fstat(new.fd).st_ino)
    tools.step("commit.intended")
    if plan.made_target:
        _name_target(tools, journal, stage, new)
    tools.step("commit.snapshot")
    _exchange(tools, journal, old, new)
    forward(tools, journal, old)
    stage.close()
    discard(layout)
    tools.step("commit.swept")
    return copies


def _leased(tools: Tools, state: State) -> Lease:
    """A lease on the live copy, of which it is known that it was there and a plain file."""
    path = tools.layout.live
    try:
        lease = Lease(path)
    except FileNotFoundError:
        raise _changed(f"{path} was removed", state.tip) from None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise _changed(f"{path} became a link", state.tip) from error
    if not stat.S_ISREG(os.fstat(lease.fd).st_mode):
        lease.close()
        raise _changed(f"{path} became something else than a file", state.tip)
    return lease


def _changed(what: str, tip: str) -> Refused:
    return Refused("TARGET_CHANGED", f"{what} meanwhile", tip=tip)


def _unmodified(tools: Tools, state: State, lease: Lease) -> bool:
    tip = state.lineage.tip
    return tip is not None and tip.present and tools.copier.live_equals(lease, tools.layout.snapshot(tip.id))


def _make_live(tools: Tools, plan: _Plan, stage: ImageStage, stack: contextlib.ExitStack) -> Lease:
    """Fills `.live` with the target, and the stage's tree with what makes it a snapshot; `.live` is leased."""
    layout = tools.layout
    remove_tree(layout.incoming)
    _take_spare(tools, plan.state)
    if not layout.incoming.exists():
        os.close(create(layout.incoming))
    lease = stack.enter_context(Lease(layout.incoming, writable=True))
    source = layout.tree if plan.made_target else layout.snapshot(plan.target.id)
    if plan.made_target and not stage.is_at(source / "data"):
        raise _changed(f"{source / 'data'}, which was filled, was replaced", plan.state.tip)
    table = layout.tree / "table" if plan.made_target else None
    with opened(source / "data") as source_fd:
        digest = tools.copier.fill(source_fd, lease.fd, table)
        if plan.made_target:
            os.fsync(source_fd)  # its times too, which the syncs of the stage leave out and the record has
            record = Stored(
                replace(plan.target, present=True), plan.order.volume_id, digest, os.fstat(source_fd).st_mtime_ns
            )
            save_stored(layout.tree, record)
    return lease


def _take_spare(tools: Tools, state: State) -> None:
    """Takes a spare that is still what it was as the next live copy; preserves one that somebody has written to."""
    layout = tools.layout
    for spare in sorted(layout.root.glob(".spare-*")):
        record = state.lineage.find(spare.name.removeprefix(".spare-"))
        snapshot = layout.snapshot(record.id) if record is not None else None
        if snapshot is not None and not layout.incoming.exists() and _still_equals(tools, layout, record):
            spare.rename(layout.incoming)
        else:
            keeping.let_go(layout, tools.copier, spare, snapshot, record)


def _still_equals(tools: Tools, layout: Layout, record: Snapshot | None) -> bool:
    if record is None or not layout.data(record.id).exists():
        return False
    try:
        with Lease(layout.spare(record.id)) as lease:
            # By another name it is somebody's own image, which would be written over.
            alone = os.fstat(lease.fd).st_nlink == 1
            return alone and tools.copier.live_equals(lease, layout.snapshot(record.id))
    except InUseError:
        return False


def _intend(tools: Tools, plan: _Plan, own: Lease | None, new_inode: int) -> tuple[Journal, tuple[PreservedCopy, ...]]:
    """Describes what will be preserved, checks the bounds, and writes the intention; `own` holds data of its own."""
    layout, state, order = tools.layout, plan.state, plan.order
    # A directory without data (somebody removed it) has nothing to keep: its record is in the log.
    filled = [record for record in plan.leaving if layout.data(record.id).exists()]
    copies = [_describe_leaving(tools, plan, record) for record in filled]
    live = None
    if own is not None:
        against = layout.snapshot(state.tip) if state.tip else None
        live = keeping.describe_open(
            tools.copier, own.fd, layout.live, state.lineage.tip, against, live=True, resync_id=order.resync_id
        )
    every = [*copies, *([live] if live is not None else [])]
    rules.check_bounds(
        layout.volume, list_preserved(layout), every, tools.preserved_max_count, tools.preserved_max_bytes
    )
    pids = {record.id: copy.id for record, copy in zip(filled, copies, strict=True)}
    for record, copy in zip(filled, copies, strict=True):
        save_preserved(layout.snapshot(record.id), copy)
    if live is not None:
        keeping.prepare_keep(layout, live)
    tools.step("commit.described")
    tip_stays = state.tip and state.tip not in {record.id for record in plan.leaving}
    journal = Journal(
        resync_id=order.resync_id,
        old_tip=state.tip,
        new_tip=plan.target.id,
        new_inode=new_inode,
        made_target=plan.made_target,
        keeps=tuple((record.id, pids.get(record.id, "")) for record in plan.leaving),
        live_pid=live.id if live is not None else "",
        spare_of=state.tip if tip_stays and tools.copier.reflink else "",
    )
    save_journal(layout, journal)
    return journal, tuple(replace(copy, path=str(layout.preserved / copy.id / "data")) for copy in every)


def _describe_leaving(tools: Tools, plan: _Plan, record: Snapshot) -> PreservedCopy:
    """What it holds alone is counted from its newest ancestor that is here: its parent may be pruned, or never came."""
    layout, older = tools.layout, plan.state.lineage.since(record.id).records[1:]
    against = next((layout.snapshot(one.id) for one in older if one.id in plan.state.stored), None)
    return keeping.describe(
        tools.copier, layout.data(record.id), record, against, live=False, resync_id=plan.order.resync_id
    )


def _name_target(tools: Tools, journal: Journal, stage: ImageStage, new: Lease) -> None:
    """Gives the stage's tree the target's name; only if it holds what was filled may it keep that."""
    layout = tools.layout
    target = layout.snapshot(journal.new_tip)
    changed = _changed(f"{layout.tree / 'data'}, which was filled, was replaced", journal.old_tip)
    try:
        layout.tree.rename(target)
    except FileNotFoundError:
        # What has the target's name by now is nothing of this commit's, which undoing it would take away.
        undo(tools, replace(journal, made_target=False), new)
        raise changed from None
    if not stage.is_at(target / "data"):
        undo(tools, journal, new)
        raise changed
    fsync_dir(layout.root)


def _exchange(tools: Tools, journal: Journal, old: Lease | None, new: Lease) -> None:
    """The step that decides; taken back if somebody waits for the old live copy, or a path led to another file."""
    layout = tools.layout
    try:
        if old is None:
            ioctl.rename_new(layout.incoming, layout.live)
        else:
            ioctl.exchange(layout.incoming, layout.live)
    except FileExistsError:
        undo(tools, journal, new)
        raise _changed(f"{layout.live} was created", journal.old_tip) from None
    except FileNotFoundError:
        undo(tools, journal, new)
        raise _changed(f"{layout.live} was removed", journal.old_tip) from None
    except OSError:
        undo(tools, journal, new)
        raise
    moved = not is_at(new, layout.live) or (old is not None and not is_at(old, layout.incoming))
    linked = old is not None and os.fstat(old.fd).st_nlink > 1  # no lease is in the way of link(2)
    if moved or linked or (old is not None and old.broken()):
        _take_back(tools, old)
        undo(tools, journal, new)
        if old is not None:
            old.check()
            refuse_other_names(layout.live, os.fstat(old.fd))
        raise _changed(f"{layout.live} was replaced", journal.old_tip)
    tools.step("commit.exchanged")
    fsync_dir(layout.live.parent)
    fsync_dir(layout.root)
    tools.step("commit.synced")


def _take_back(tools: Tools, old: Lease | None) -> None:
    layout = tools.layout
    if old is None:
        ioctl.rename_new(layout.live, layout.incoming)
    else:
        ioctl.exchange(layout.incoming, layout.live)
    fsync_dir(layout.live.parent)
