"""A received subvolume becomes the newest snapshot, and the live copy a writable snapshot of it.

The order, in which a crash after any line leaves the path showing one whole subvolume, the old or the new:

1. The new live copy is made at `.live`; the lineage that the source told is logged. Nothing is changed yet.
2. Nobody uses the live copy, and it is compared with its tip.
3. What will be preserved is described beside its data; then the intention is written (`commit.json`).
4. The stage's tree is renamed to the target's snapshot directory.
5. `.live` and the live copy change places in one step (or `.live` is renamed, if there was none). This decides.
6. The old live copy is looked at again: if somebody came to use it, or it is another one, all of it back. Also if it
   is to be removed, and one of its files is open for writing, by whatever: then it is read-only from here on.
7. Snapshots off the lineage and a live copy with data of its own move among the preserved copies; an unmodified one is
   compared once more and removed, or set aside (`btrfs_keep.py`). The intention is removed, then the stage.

`settle` finishes 7, or undoes 3 to 4, from the intention alone: at start, and before anything else is changed.

**The window that remains.** There is no lease on a subvolume. Somebody who opens a file between 2 and 5 is found by 6,
and everything goes back, so that he never notices; who changed the old one and has gone again is found by the
comparison in 7, and it is preserved. What is left is a system call that opens a file for writing through the old path,
was let in by the kernel before the subvolume was made read-only, and has not got its descriptor when the file is asked
in 6: it would write into what 7 removes.

Owner, mode, ACL and attributes of the root directory are the target's: they are data of the volume like any other.
Properties of the subvolume itself (quota groups, limits) are the old one's, and do not pass over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from agent.backends import btrfs_keep as keeping
from agent.backends import rules
from agent.backends.base import CommitOrder
from agent.backends.btrfs_adopt import Finder, Known
from agent.backends.btrfs_debris import Debris
from agent.backends.btrfs_layout import SubvolumeLayout, load_native, remove, save_native
from agent.backends.btrfs_live import Tip, check_live, is_tip, refuse_irreplaceable, refuse_use
from agent.backends.btrfs_stage import BtrfsStage, discard, is_received
from agent.backends.image_keep import keep_directory, keep_file
from agent.backends.image_layout import (
    Journal,
    Stored,
    append_records,
    check_id,
    list_preserved,
    load_journal,
    save_journal,
    save_preserved,
    save_stored,
)
from agent.disk import btrfs, ioctl
from agent.disk.btrfs_use import users_of
from agent.disk.durable import disk_errors, fsync_dir, remove_file
from agent.disk.inuse import InUseError, User
from resilver.errors import Damaged, Refused
from resilver.lineage import Origin, Snapshot
from resilver.volume import PreservedCopy

STEPS: Final = (
    "commit.begun",
    "commit.filled",
    "commit.logged",
    "commit.checked",
    "commit.described",
    "commit.intended",
    "commit.snapshot",
    "commit.swapped",
    "commit.exchanged",
    "commit.synced",
    "commit.kept",
    "commit.live_kept",
    "commit.closed",
    "commit.swept",
)


Asked = Callable[[Path], str | None]  # see `btrfs_keep.let_go`


@dataclass(frozen=True, slots=True)
class Tools:
    """What commits need of their backend."""

    layout: SubvolumeLayout
    finder: Finder
    step: Callable[[str], None]
    preserved_max_count: int
    preserved_max_bytes: int
    debris: Debris


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a commit is to do, decided before anything is changed. `leaving` are ours, and here."""

    order: CommitOrder
    known: Known
    target: Snapshot
    leaving: tuple[Snapshot, ...]
    made_target: bool


def commit(tools: Tools, stage: BtrfsStage, order: CommitOrder) -> tuple[PreservedCopy, ...]:
    """See `ReplicaBackend.commit`. Refused: nothing has changed, and the stage is as it was."""
    layout = tools.layout
    with disk_errors(layout.root):
        settle(tools)
        plan = _plan(tools, stage, order)
        if plan is None:
            return tuple(copy for copy in list_preserved(layout) if copy.resync_id == order.resync_id)
        try:
            return _commit(tools, stage, plan)
        except InUseError as error:
            raise error.refused(layout.live) from error
        finally:
            if load_journal(layout) is None:
                remove(layout.incoming)


def _plan(tools: Tools, stage: BtrfsStage, order: CommitOrder) -> _Plan | None:
    """None if the target is the tip already; raises what forbids the commit."""
    known, live = tools.finder.load(), tools.layout.live
    state = known.state
    target = rules.check_target(order, stage.target)
    check_id(target.id)
    ours = rules.leaving(state, order, live, live=live.exists(), adopted=False)
    if ours is None:
        return None
    made_target = target.id not in state.stored
    if made_target and (target.origin is Origin.ADOPTED or not is_received(tools.layout)):
        raise Damaged(
            "IO_ERROR", f"{target.id} was not received: there is nothing to commit", path=str(stage.directory)
        )
    kept = tuple(record for record in ours if record.id in state.stored)
    return _Plan(order, known, target, kept, made_target)


def _commit(tools: Tools, stage: BtrfsStage, plan: _Plan) -> tuple[PreservedCopy, ...]:
    layout, known = tools.layout, plan.known
    old = check_live(layout.live)
    if old is not None:
        refuse_use(layout.live)  # in use: found before anything is made
        refuse_irreplaceable(layout.live, old)
    tools.step("commit.begun")
    _make_live(tools, plan)
    tools.step("commit.filled")
    append_records(layout, (*plan.order.lineage, *plan.leaving), known.state, logged=[gone.id for gone in plan.leaving])
    tools.step("commit.logged")
    own = old is not None and (_is_theirs_alone(plan) or not _unmodified(known))
    if old is not None:
        refuse_use(layout.live)
    tools.step("commit.checked")
    journal, copies = _intend(tools, plan, own=own)
    tools.step("commit.intended")
    if plan.made_target:
        layout.tree.rename(layout.snapshot(plan.target.id))
    btrfs.sync(layout.root)
    tools.step("commit.snapshot")
    asked = _exchange(tools, journal, old)
    _forward(tools, journal, asked)
    stage.close()
    discard(layout)
    tools.step("commit.swept")
    return copies


def _unmodified(known: Known) -> bool:
    tip = known.tip
    try:
        return tip is not None and is_tip(known.layout.live, tip, known.layout)
    except TimeoutError:
        return False  # preserved rather than waited for


def _is_theirs_alone(plan: _Plan) -> bool:
    """Whether what the live copy stands on leaves the lineage, and is another tool's, which may let it go any time."""
    tip = plan.known.state.lineage.tip
    return tip is not None and tip.origin is Origin.ADOPTED and plan.order.lineage.find(tip.id) is None


def _make_live(tools: Tools, plan: _Plan) -> None:
    """Makes `.live` of the target, and the stage's tree what a snapshot is."""
    layout = tools.layout
    remove(layout.incoming)
    source = layout.tree if plan.made_target else layout.snapshot(plan.target.id)
    if plan.made_target:
        native = load_native(layout.received)
        assert native is not None
        save_native(layout.tree / "native.json", native)
        save_stored(layout.tree, Stored(replace(plan.target, present=True), plan.order.volume_id))
    btrfs.snapshot(source / "data", layout.incoming, read_only=False)


def _intend(tools: Tools, plan: _Plan, *, own: bool) -> tuple[Journal, tuple[PreservedCopy, ...]]:
    """Describes what will be preserved, checks the bounds, and writes the intention; `own`: the live copy has data."""
    layout, known, order = tools.layout, plan.known, plan.order
    state = known.state
    # A directory without data (somebody removed it) has nothing to keep: its record is in the log.
    filled = [record for record in plan.leaving if layout.data(record.id).exists()]
    copies = [_describe_leaving(plan, record) for record in filled]
    live = None
    if own:
        live = keeping.describe_live(layout, layout.live, state.lineage.tip, known.tip, order.resync_id)
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
    journal = Journal(
        resync_id=order.resync_id,
        old_tip=state.tip,
        new_tip=plan.target.id,
        new_inode=layout.identity(layout.incoming),
        made_target=plan.made_target,
        keeps=tuple((record.id, pids.get(record.id, "")) for record in plan.leaving),
        live_pid=live.id if live is not None else "",
        spare_of="",
    )
    save_journal(layout, journal)
    return journal, tuple(replace(copy, path=str(layout.preserved / copy.id / "data")) for copy in every)


def _describe_leaving(plan: _Plan, record: Snapshot) -> PreservedCopy:
    known = plan.known
    older = (known.path(one.id) for one in known.state.lineage.since(record.id).records[1:])
    against = next((path for path in older if path is not None), None)
    return keeping.describe_snapshot(known.layout.data(record.id), record, against, plan.order.resync_id)


def _exchange(tools: Tools, journal: Journal, old: btrfs.Info | None) -> Asked:
    """The step that decides; taken back if somebody uses the old live copy, or it was another one by then."""
    layout = tools.layout
    asked: Asked = keeping.shut
    if old is None:
        try:
            ioctl.rename_new(layout.incoming, layout.live)
        except FileExistsError:
            _undo(tools, journal)
            raise Refused("TARGET_CHANGED", f"{layout.live} was created meanwhile", tip=journal.old_tip) from None
    else:
        try:
            ioctl.exchange(layout.incoming, layout.live)
        except FileNotFoundError:
            _undo(tools, journal)
            raise Refused("TARGET_CHANGED", f"{layout.live} was removed meanwhile", tip=journal.old_tip) from None
        except OSError:
            _undo(tools, journal)
            raise
        tools.step("commit.swapped")
        asked = _look_again(tools, journal, old)
    tools.step("commit.exchanged")
    btrfs.sync(layout.live.parent)
    tools.step("commit.synced")
    return asked


def _look_again(tools: Tools, journal: Journal, old: btrfs.Info) -> Asked:
    """What is known then of the files of an old live copy that is to be removed: they are not all asked twice."""
    layout = tools.layout
    moved = not btrfs.is_subvolume(layout.incoming) or layout.identity(layout.incoming) != old.tree
    users = [] if moved else users_of(layout.incoming)
    inside = not moved and btrfs.nested(layout.incoming)
    if not (moved or users or inside):
        if journal.live_pid:
            return keeping.shut  # whatever is still written to it is preserved with it
        written = keeping.shut(layout.incoming)
        if not written:
            return lambda _path: written
        users = [User(f"something other than a process, which has {written} open for writing", writes=True)]
        btrfs.set_read_only(layout.incoming, read_only=False)
    ioctl.exchange(layout.incoming, layout.live)
    btrfs.sync(layout.live.parent)
    _undo(tools, journal)
    if users:
        raise InUseError(users)
    what = "was replaced" if moved else "got another subvolume in it"
    raise Refused("TARGET_CHANGED", f"{layout.live} {what} meanwhile", tip=journal.old_tip)


def _forward(tools: Tools, journal: Journal, asked: Asked = keeping.shut) -> None:
    """What is left once the exchange has happened; each line may be done already."""
    layout = tools.layout
    for gone, pid in journal.keeps:
        if pid:
            keep_directory(layout, layout.snapshot(gone), pid)
        else:
            remove(layout.snapshot(gone))
    tools.step("commit.kept")
    if journal.live_pid:
        keep_file(layout, layout.incoming, journal.live_pid)
    elif layout.incoming.exists():
        _let_old_go(tools, journal, asked)
    tools.step("commit.live_kept")
    remove_file(layout.commit)
    tools.step("commit.closed")


def _let_old_go(tools: Tools, journal: Journal, asked: Asked) -> None:
    """An unmodified old live copy goes, if it still is that: compared once more, now that no path leads to it."""
    layout, known = tools.layout, tools.finder.load()
    kept = next(
        (layout.preserved / pid / "data" for gone, pid in journal.keeps if pid and gone == journal.old_tip), None
    )
    # An old tip that other tools made may be off the lineage by now: it is beside it.
    path = kept or known.path(journal.old_tip) or known.beside.get(journal.old_tip)
    tip = Tip(journal.old_tip, path) if path is not None else None
    keeping.let_go(layout, layout.incoming, tip, known.state.known.get(journal.old_tip), asked)
    fsync_dir(layout.root)


def _undo(tools: Tools, journal: Journal) -> None:
    """Gives a commit up: the directories are as before, and so is the stage."""
    layout = tools.layout
    save_journal(layout, replace(journal, undoing=True))
    target = layout.snapshot(journal.new_tip)
    if journal.made_target and target.exists() and not layout.tree.exists():
        target.rename(layout.tree)
        fsync_dir(layout.root)
        fsync_dir(layout.stage)
    equal = layout.tree if journal.made_target else target
    keeping.let_go(layout, layout.incoming, Tip(journal.new_tip, equal / "data"), None)
    for gone, _pid in journal.keeps:
        remove(layout.snapshot(gone) / "preserved.json")
    if journal.live_pid:
        remove(layout.keep(journal.live_pid))
    remove_file(layout.commit)


def settle(tools: Tools) -> None:
    """Finishes or undoes a commit that was interrupted, and looks at what was set aside; nothing if there is none."""
    _finish(tools)
    keeping.look_aside(tools.layout, tools.finder.load, tools.debris)


def _finish(tools: Tools) -> None:
    layout = tools.layout
    journal = load_journal(layout)
    if journal is None:
        return
    if journal.exchanged(layout):
        if not layout.data(journal.new_tip).exists():  # only changed by hand
            raise Damaged("IO_ERROR", f"{layout.commit} speaks of snapshot {journal.new_tip}, which is not there")
        btrfs.sync(layout.root)
        _forward(tools, journal)
        discard(layout)
    else:
        _undo(tools, journal)
