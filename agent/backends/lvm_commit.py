"""A finished stage becomes the newest snapshot, and the live copy its clone.

1. The stage is sealed: synced, closed, read-only, tagged. The next live copy is made as its thin snapshot, under a name
   that was written down. The lineage that the source told is logged. Nothing is changed yet.
2. The live copy is taken away (`lvm_live.taken_away`): nobody has it open, and nobody can. It is compared with its tip.
3. What will be preserved is described; then the intention is written (`commit.json`).
4. The stage's tree is renamed to the target's directory of records.
5. The live copy is renamed out of the way, and the next one gets its name: two commands, each one change of the group's
   metadata. **The second decides.** Between them there is no volume of that name; whoever looks finds nothing, never
   something else.
6. Snapshots off the lineage and a live copy with data of its own move among the preserved copies; an unmodified one is
   removed. The intention is removed, the new live copy activated, then the stage's directory goes.

`settle` finishes 6, or undoes 3 to 5, from the intention alone: at start, and before anything else is changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from agent.backends import lvm_keep as keeping
from agent.backends import rules
from agent.backends.base import CommitOrder
from agent.backends.image_copy import remove_tree
from agent.backends.image_keep import keep_directory
from agent.backends.image_layout import Stored, append_records, check_id, save_preserved, save_stored
from agent.backends.lvm_live import check_free, own_bytes, taken_away, users
from agent.backends.lvm_place import Ref, View, identity_tags, load_ref, save_ref
from agent.backends.lvm_stage import LvmStage, discard
from agent.backends.lvm_state import Found, Journal, Tools, load, load_journal, preserved, save_journal
from agent.disk import lvm
from agent.disk.durable import disk_errors, fsync_dir, remove_file
from agent.disk.inuse import InUseError
from agent.disk.lvm import Lv
from resilver.errors import Damaged, Refused, ResilverError
from resilver.lineage import Snapshot
from resilver.volume import PreservedCopy

STEPS: Final = (
    "commit.begun",
    "commit.sealed",
    "commit.cloned",
    "commit.logged",
    "commit.leased",
    "commit.described",
    "commit.intended",
    "commit.snapshot",
    "commit.moved",
    "commit.exchanged",
    "commit.kept",
    "commit.live_kept",
    "commit.closed",
    "commit.swept",
)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a commit is to do, decided before anything is changed."""

    order: CommitOrder
    target: Snapshot
    leaving: tuple[Snapshot, ...]
    made_target: bool


def commit(tools: Tools, stage: LvmStage, order: CommitOrder) -> tuple[PreservedCopy, ...]:
    """See `ReplicaBackend.commit`. Refused: nothing has changed, and the stage is kept."""
    layout, place = tools.layout, tools.place
    with disk_errors(layout.root):
        settle(tools)
        found = load(place, place.ready())
        plan = _plan(tools, found, stage, order)
        if plan is None:
            return tuple(copy for copy in preserved(place, found.view) if copy.resync_id == order.resync_id)
        try:
            return _commit(tools, found, stage, plan)
        except InUseError as error:
            raise error.refused(layout.live) from error
        finally:
            if load_journal(layout) is None:
                keeping.forget_next(tools)


def _plan(tools: Tools, found: Found, stage: LvmStage, order: CommitOrder) -> _Plan | None:
    """None if the target is the tip already; raises what forbids the commit."""
    state = found.state
    target = rules.check_target(order, stage.target, stage.size_bytes)
    check_id(target.id)
    leaving = rules.leaving(state, order, tools.place.full_name, live=found.view.live is not None, adopted=True)
    if leaving is None:
        return None
    kept = tuple(record for record in leaving if record.id in state.stored)
    return _Plan(order, target, kept, made_target=target.id not in state.stored)


def _commit(tools: Tools, found: Found, stage: LvmStage, plan: _Plan) -> tuple[PreservedCopy, ...]:
    layout, live = tools.layout, found.view.live
    check_free(live)  # in use: found before anything is made
    tools.step("commit.begun")
    target = _sealed(tools, found, stage, plan)
    tools.step("commit.sealed")
    following = _make_next(tools, found.view, target)
    tools.step("commit.cloned")
    logged = [gone.id for gone in plan.leaving]
    append_records(layout, (*plan.order.lineage, *plan.leaving), found.state, logged=logged)
    tools.step("commit.logged")
    with taken_away(tools, live):
        tools.step("commit.leased")
        own = live is not None and not _unmodified(tools, found, live)
        journal, copies = _intend(tools, found, plan, following, own=own)
        tools.step("commit.intended")
        if plan.made_target:
            layout.tree.rename(layout.snapshot(plan.target.id))
            fsync_dir(layout.root)
        tools.step("commit.snapshot")
        _exchange(tools, journal, live, following)
        _forward(tools, journal)
    stage.close()
    discard(tools)
    tools.step("commit.swept")
    return copies


def _unmodified(tools: Tools, found: Found, live: Lv) -> bool:
    tip = found.tip_lv
    return tip is not None and own_bytes(tools, found.view, live, tip) == 0


def _sealed(tools: Tools, found: Found, stage: LvmStage, plan: _Plan) -> Lv:
    """The target as it will stay: read-only, with its tags, its record beside it."""
    layout, view = tools.layout, found.view
    if not plan.made_target:
        return tools.place.snapshot(view, plan.target.id, "TARGET_GONE")
    stage.sync()
    stage.close()
    lv = view.find(load_ref(layout.tree / "data"))
    if lv is None:
        raise Damaged("IO_ERROR", f"the stage of {stage.target} has no logical volume any more")
    if not lvm.deactivate(lv):
        raise InUseError(users(lv) or [])
    record = replace(plan.target, present=True)
    wanted = {*identity_tags(record), view.tag}
    words = [word for tag in sorted(wanted - lv.tags) for word in ("--addtag", tag)]
    words += [] if lv.read_only else ["-p", "r"]
    if words:
        lvm.lvm("lvchange", *words, lv.full_name)
    save_stored(layout.tree, Stored(record, plan.order.volume_id))
    return lv


def _make_next(tools: Tools, view: View, target: Lv) -> Lv:
    """The next live copy, with the tags that others gave the present one."""
    path = tools.layout.root / "next.json"
    if not keeping.forget_next(tools):
        left = load_ref(path)
        said = f"{view.group.name}/{left.name if left else ''}, of a commit that was given up, is open: close it"
        raise Refused("IN_USE", said)
    name = tools.place.new_name()
    save_ref(path, Ref(name))
    theirs = view.live.tags if view.live is not None else frozenset()
    tags = tuple(sorted(tag for tag in theirs if not tag.startswith("resilver.")))
    made = tools.place.make_snapshot(view, target, name, tags, read_only=False)
    save_ref(path, Ref(name, made.uuid))
    return made


def _intend(
    tools: Tools, found: Found, plan: _Plan, following: Lv, *, own: bool
) -> tuple[Journal, tuple[PreservedCopy, ...]]:
    """Describes what will be preserved, checks the bounds, and writes the intention; `own`: also the live copy."""
    layout, view, order, live = tools.layout, found.view, plan.order, found.view.live
    # A record without its logical volume (somebody removed that) has nothing to keep, and stays in the log.
    filled = [(record, lv) for record in plan.leaving if (lv := found.lv(record.id)) is not None]
    copies = [_describe_leaving(tools, found, plan, record, lv) for record, lv in filled]
    old_name = tools.place.new_name()
    kept_live = None
    if live is not None and own:
        tip = found.state.lineage.tip
        made = keeping.describe(tools, view, live, tip, found.tip_lv, live=True, resync_id=order.resync_id)
        kept_live = replace(made, path=f"/dev/{view.group.name}/{old_name}")
    every = (*copies, *([kept_live] if kept_live is not None else []))
    rules.check_bounds(
        layout.volume, preserved(tools.place, view), every, tools.preserved_max_count, tools.preserved_max_bytes
    )
    pids = {}
    for (record, _lv), copy in zip(filled, copies, strict=True):
        save_preserved(layout.snapshot(record.id), copy)
        pids[record.id] = copy.id
    if kept_live is not None and live is not None:
        keeping.prepare_keep(tools, kept_live, live, old_name)
    tools.step("commit.described")
    journal = Journal(
        resync_id=order.resync_id,
        old_tip=found.state.tip,
        new_tip=plan.target.id,
        made_target=plan.made_target,
        keeps=tuple((record.id, pids.get(record.id, "")) for record in plan.leaving),
        live_pid=kept_live.id if kept_live is not None else "",
        old=live.uuid if live is not None else "",
        old_name=old_name,
        next=following.uuid,
    )
    save_journal(layout, journal)
    return journal, every


def _describe_leaving(tools: Tools, found: Found, plan: _Plan, record: Snapshot, lv: Lv) -> PreservedCopy:
    """What it holds alone is counted from its newest ancestor that is here: its parent may be pruned, or never came."""
    older = found.state.lineage.since(record.id).records[1:]
    against = next((held for one in older if (held := found.lv(one.id)) is not None), None)
    return keeping.describe(tools, found.view, lv, record, against, live=False, resync_id=plan.order.resync_id)


def _exchange(tools: Tools, journal: Journal, live: Lv | None, following: Lv) -> None:
    """The renames, of which the second decides; taken back if somebody has brought the old live copy back meanwhile.

    A command that failed may have done its work all the same: it timed out, or failed behind its change of the group's
    metadata. So what there is by then is asked, and the commit undone or finished by that.
    """
    try:
        if live is not None:
            lvm.rename(live, journal.old_name)
            tools.step("commit.moved")
            _check_away(live)
        lvm.rename(following, tools.place.name)
    except (InUseError, ResilverError):
        settle(tools)
        raise
    tools.step("commit.exchanged")


def _check_away(live: Lv) -> None:
    """Raises InUseError if somebody has activated what was taken away."""
    if live.device is not None:
        raise InUseError(users(live) or [])


def _forward(tools: Tools, journal: Journal) -> None:
    """What is left once the new live copy has its name; each line may be done already."""
    layout = tools.layout
    view = tools.place.surely()
    for gone, pid in journal.keeps:
        if pid:
            keep_directory(layout, layout.snapshot(gone), pid)
        else:
            remove_tree(layout.snapshot(gone))
    tools.step("commit.kept")
    old = view.group.of_uuid(journal.old) if journal.old else None
    if old is not None and journal.live_pid:
        keeping.keep_live(tools, view, old, journal.live_pid)
    elif old is not None and old.uuid not in _kept(tools):
        tip = load(tools.place, view).state.known.get(journal.old_tip)
        keeping.let_go(tools, view, old, _old_tip(tools, view, journal), tip)
    tools.step("commit.live_kept")
    live = view.live
    if live is not None and (live.skip or view.tag in live.tags):
        words = [*(["-k", "n"] if live.skip else []), *(["--deltag", view.tag] if view.tag in live.tags else [])]
        lvm.lvm("lvchange", *words, live.full_name)
    remove_file(layout.root / "next.json")
    remove_file(layout.commit)
    tools.step("commit.closed")


def _kept(tools: Tools) -> set[str]:
    """The logical volumes that are preserved copies already."""
    directory = tools.layout.preserved
    entries = directory.iterdir() if directory.is_dir() else ()
    return {ref.uuid for entry in entries if (ref := load_ref(entry / "data")) is not None}


def _old_tip(tools: Tools, view: View, journal: Journal) -> Lv | None:
    """The logical volume of the tip before, among the snapshots or, by now, the preserved copies."""
    pid = dict(journal.keeps).get(journal.old_tip, "")
    directory = tools.layout.preserved / pid if pid else tools.layout.snapshot(journal.old_tip)
    return view.find(load_ref(directory / "data")) if journal.old_tip else None


def _undo(tools: Tools, journal: Journal) -> None:
    """Gives a commit up: names and directories are as before, and so is the stage.

    TARGET_CHANGED: somebody has made another volume of that name since the live copy was renamed out of the way. All
    stays as it is, because no list would name the live copy.
    """
    layout = tools.layout
    view = tools.place.surely()
    old = view.group.of_uuid(journal.old) if journal.old else None
    if old is not None and view.live is None:
        lvm.rename(old, tools.place.name)
    elif old is not None and old.name == journal.old_name:
        name = tools.place.full_name
        said = f"{name} was created meanwhile, and the live copy is {old.full_name}: rename {name} to something else"
        raise Refused("TARGET_CHANGED", said, tip=journal.old_tip)
    target = layout.snapshot(journal.new_tip)
    if journal.made_target and target.exists() and not layout.tree.exists():
        target.rename(layout.tree)
        fsync_dir(layout.root)
        fsync_dir(layout.stage)
    for gone, _pid in journal.keeps:
        remove_tree(layout.snapshot(gone) / "preserved.json")
    if journal.live_pid:
        remove_tree(layout.keep(journal.live_pid))
    remove_file(layout.commit)
    keeping.forget_next(tools)


def settle(tools: Tools) -> None:
    """Finishes or undoes a commit that was interrupted; nothing if there is none."""
    layout = tools.layout
    journal = load_journal(layout)
    if journal is None:
        return
    if not journal.exchanged(tools.place.surely()):
        _undo(tools, journal)
        return
    if load_ref(layout.data(journal.new_tip)) is None:
        raise Damaged("IO_ERROR", f"{layout.commit} speaks of snapshot {journal.new_tip}, which is not there")
    _forward(tools, journal)
    discard(tools)
