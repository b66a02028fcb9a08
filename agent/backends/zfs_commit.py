"""A whole stage becomes the newest snapshot, and the live copy its contents.

There are three ways, by what is there:

* **first**: there is no live copy. The stage is renamed to be it.
* **follow**: the live copy equals the base, by an exact comparison. The stage is sent on into it: a receive shows
  nothing until all has come, and the dataset stays what it is, with its properties, bookmarks, children, delegations
  and everybody's snapshots. Snapshots that others made after the base, of the very same contents, do not hinder: the
  stream is told to stand on the newest of them. What came is read back before it gets the record that makes it the
  tip.
* **replace**: the live copy has gone another way. The stage is promoted, so that the snapshots up to the base are its
  own; the live copy is renamed to be preserved, and the stage to be the live copy. Between those two the name is
  nobody's. Nothing is copied. A live copy with nothing of its own, and no snapshot of another tool, is not kept.

The order: the lineage is logged; the live copy is unmounted, which the kernel refuses if anybody uses it, and looked
for in every namespace; then it is compared; what will be preserved is described; the intention is written
(`commit.json`); the live copy is shut, so that no boot mounts it writable. `settle` finishes or undoes from the
intention and the guids of what has which name: a **follow** counts from the record on, a **replace** from the renaming
of the live copy on. So the live copy is the old one or the new one, or, between two commands, not there; it is never in
between. What was written to it after it was compared is kept, in place or as a preserved copy (`zfs_finish.py`).

The replaced dataset's local properties go over to the new one. A replica is `readonly=on`; what it was before is noted
in a property, and restored when the node becomes the primary.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from agent.backends import rules
from agent.backends import zfs_keep as keeping
from agent.backends.base import CommitOrder
from agent.backends.zfs_finish import Journal, finish, load_journal, readonly, save_journal, settle
from agent.backends.zfs_layout import (
    INCOMING,
    RECORD,
    Layout,
    State,
    load_state,
    record_property,
)
from agent.backends.zfs_live import put_back, set_aside, shut, unmodified
from agent.backends.zfs_log import append_records
from agent.backends.zfs_records import ready
from agent.backends.zfs_send import open_stream
from agent.backends.zfs_stage import Receiver, ZfsStage, agrees, discard, read_back
from agent.backends.zfs_stream import Change, Contents
from agent.disk import zfs
from agent.disk.advance import advanced
from resilver.errors import Damaged, Invalid, Refused, ResilverError
from resilver.lineage import Origin, Snapshot
from resilver.volume import PreservedCopy

STEPS: Final = (
    "commit.begun",
    "commit.logged",
    "commit.aside",
    "commit.compared",
    "commit.described",
    "commit.intended",
    "commit.shut",
    "commit.received",
    "commit.verified",
    "commit.recorded",
    "commit.promoted",
    "commit.moved",
    "commit.placed",
    "commit.set",
    "commit.pointed",
    "commit.kept",
    "commit.closed",
    "commit.swept",
)

_PIECE_BYTES: Final = 1 << 20
_BUSY_PAUSE_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Tools:
    """What commits need of their backend."""

    layout: Layout
    step: Callable[[str], None]
    preserved_max_count: int
    preserved_max_bytes: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a commit is to do, decided before anything is changed. `base` is the stage's, as it is here."""

    order: CommitOrder
    state: State
    target: Snapshot
    leaving: tuple[Snapshot, ...]
    base: zfs.Dataset | None


def commit(tools: Tools, stage: ZfsStage, order: CommitOrder) -> tuple[PreservedCopy, ...]:
    """See `ReplicaBackend.commit`. Refused: nothing has changed, and the stage is as it was."""
    layout = tools.layout
    settle(layout, tools.step)
    state = load_state(layout, there=ready(layout))
    plan = _plan(layout, state, stage, order)
    if plan is None:
        return tuple(copy for copy in keeping.list_preserved(layout) if copy.resync_id == order.resync_id)
    tools.step("commit.begun")
    natives = {} if plan.target.id in state.where else {plan.target.id: stage.plan.native_target}
    append_records(layout, (*order.lineage, *plan.leaving), natives, state, [gone.id for gone in plan.leaving])
    tools.step("commit.logged")
    mounted = False
    try:
        mounted = state.head is not None and set_aside(layout, state.head)
        tools.step("commit.aside")
        return _commit(tools, stage, plan, mounted=mounted)
    except (ResilverError, zfs.ZfsError, OSError):
        if load_journal(layout) is None:
            put_back(layout)
        raise


def _plan(layout: Layout, state: State, stage: ZfsStage, order: CommitOrder) -> _Plan | None:
    """None if the target is the tip already; raises what forbids the commit."""
    target = rules.check_target(order, stage.target)
    leaving = rules.leaving(state, order, layout.live, live=state.head is not None, adopted=True)
    if leaving is None:
        return None
    if not stage.complete:
        raise Invalid("INVALID_FIELD", f"the stage of {stage.target} is not whole yet", field="stage")
    base = state.where.get(stage.base) if stage.base else None
    if stage.base and base is None:
        raise Refused("BASE_GONE", f"snapshot {stage.base} of {layout.volume} is not on this node any more")
    return _Plan(order, state, target, leaving, base)


def _commit(tools: Tools, stage: ZfsStage, plan: _Plan, *, mounted: bool) -> tuple[PreservedCopy, ...]:
    layout, state = tools.layout, plan.state
    head = state.head
    restores = stage.base == stage.target
    if restores and state.tip == stage.target and plan.base is not None and unmodified(layout, plan.base.name):
        put_back(layout)
        discard(layout)
        return ()
    copies: list[PreservedCopy] = []
    if head is None:
        journal = _intend(tools, stage, plan, mode="first", mounted=False)
    elif not restores and _follows(layout, plan):
        tools.step("commit.compared")
        journal = _intend(tools, stage, plan, mode="follow", mounted=mounted)
    else:
        own = _has_own(layout, state)
        tools.step("commit.compared")
        journal, copies = _preserve(tools, stage, plan, own=own, mounted=mounted)
    tools.step("commit.intended")
    if head is not None:
        shut(layout, zfs.local_properties(layout.live))
    tools.step("commit.shut")
    if journal.mode == "follow":
        _receive(tools, stage, plan, journal)
    finish(layout, journal, tools.step)
    stage.close()
    discard(layout)
    tools.step("commit.swept")
    told = {copy.id for copy in copies}
    after_all = [copy for copy in keeping.list_preserved(layout) if copy.path == journal.kept and copy.id not in told]
    return (*copies, *after_all)


def _follows(layout: Layout, plan: _Plan) -> bool:
    """Whether the live copy is still what the base was, whoever has taken snapshots of it since."""
    if plan.base is None:
        return False
    every = plan.state.every
    after = every[every.index(plan.base) + 1 :]
    if any(RECORD in one.own for one in after):
        return False  # CPs after the base: they would have to go first
    return unmodified(layout, plan.base.name)


def _has_own(layout: Layout, state: State) -> bool:
    """Whether the live copy holds anything that its tip does not; unknown is yes."""
    tip = state.where.get(state.tip)
    return tip is None or not unmodified(layout, tip.name)


def _intend(
    tools: Tools, stage: ZfsStage, plan: _Plan, *, mode: str, mounted: bool, kept: str = "", keeps: bool = False
) -> Journal:
    """Writes the intention."""
    layout, state, target = tools.layout, plan.state, plan.target
    if stage.base == stage.target and plan.base is not None:
        _clone(layout, plan.base.name)
    staged = zfs.look(layout.stage)
    if staged is None:
        raise Damaged("SOURCE_DAMAGED", f"{layout.stage} is not there any more")
    head = state.head
    on = state.every[-1] if mode == "follow" else None
    own = head is not None and mode == "replace"
    local = zfs.local_properties(layout.live) if head is not None else {}
    journal = Journal(
        mode=mode,
        resync_id=plan.order.resync_id,
        volume_id=plan.order.volume_id,
        old_tip=state.tip,
        new_tip=target.id,
        new_guid=plan.base.guid if stage.base == stage.target and plan.base is not None else stage.plan.native_target,
        record=record_property(target, plan.order.volume_id) if target.origin is not Origin.ADOPTED else "",
        name=_free_name(layout, state, target),
        head_guid=head.guid if head is not None else "",
        stage_guid=staged.guid,
        on=on.name if on is not None else "",
        promotes=own and staged.origin.startswith(f"{layout.live}@"),
        kept=kept,
        keeps=keeps,
        mounted=mounted,
        properties=local if own else {},
        readonly_was=readonly(layout, local) if head is not None else "inherit",
        readonly_set=local.get("readonly", "inherit") if head is not None else "",
        canmount_set=local.get("canmount", "on") if head is not None else "",
    )
    save_journal(layout, journal)
    return journal


def _clone(layout: Layout, base: str) -> None:
    """The tip again, to take the place of a live copy that was written to."""
    if zfs.look(layout.stage) is None:
        zfs.run("zfs", "clone", base, layout.stage)


def _free_name(layout: Layout, state: State, target: Snapshot) -> str:
    """What the snapshot will be called; a stranger may have taken the name."""
    name = layout.name_of(target)
    taken = {one.snapshot for one in state.every}
    return name if name not in taken else f"{name}-{uuid.uuid4().hex[:6]}"


def _preserve(
    tools: Tools, stage: ZfsStage, plan: _Plan, *, own: bool, mounted: bool
) -> tuple[Journal, list[PreservedCopy]]:
    """Describes what will be preserved, checks the bounds, and writes the intention to replace the live copy."""
    layout, state, order = tools.layout, plan.state, plan.order
    head = state.head
    assert head is not None
    if state.children:
        names = ", ".join(state.children)
        said = f"{names} would be left without {layout.live}, which has to be replaced: move them elsewhere first"
        raise Refused("NOT_SUPPORTED", said)
    kept = layout.kept(uuid.uuid4().hex[:12])
    after = state.every[state.every.index(plan.base) + 1 :] if plan.base is not None else state.every
    leaving = [(record, state.where[record.id]) for record in plan.leaving if record.id in state.where]
    ours = [(record, one) for record, one in leaving if record.origin is not Origin.ADOPTED]
    copies = [
        keeping.describe(
            f"{kept}@{one.snapshot}",
            record,
            one.referenced_bytes,
            one.used_bytes,
            live=False,
            resync_id=order.resync_id,
        )
        for record, one in ours
    ]
    # Another tool's snapshots after the base cannot stay where they are: they are kept with what they were made of.
    foreign = any(RECORD not in one.own for one in after)
    if own or (foreign and not copies):
        size, mine = head.referenced_bytes, sum(one.used_bytes for one in after)
        tip = state.lineage.tip
        copies.append(keeping.describe(kept, tip, size, mine, live=True, resync_id=order.resync_id))
    rules.check_bounds(
        layout.volume, keeping.list_preserved(layout), copies, tools.preserved_max_count, tools.preserved_max_bytes
    )
    for copy in copies:
        keeping.save_description(layout, copy)
    tools.step("commit.described")
    try:
        journal = _intend(tools, stage, plan, mode="replace", mounted=mounted, kept=kept, keeps=bool(copies))
    except BaseException:
        for copy in copies:
            keeping.remove_description(layout, copy.id)
        raise
    return journal, copies


def _receive(tools: Tools, stage: ZfsStage, plan: _Plan, journal: Journal) -> None:
    """Sends the stage on into the live copy, reads back what came, and makes it the tip. Else all is as before."""
    layout = tools.layout
    incoming = f"{layout.live}@{INCOMING}"
    try:
        went = _pipe(layout, stage, plan)
        tools.step("commit.received")
        stream_format = stage.plan.stream_format
        came = read_back(journal.on, incoming, stream_format, on_share=advanced)
        if not agrees(went, came, layout.live, stream_format):
            raise Damaged("READBACK_MISMATCH", f"what {incoming} gives back is not what was written into it")
        tools.step("commit.verified")
        if journal.record:
            zfs.run("zfs", "set", f"{RECORD}={journal.record}", incoming)
        save_journal(layout, replace(journal, recorded=True))
    except (ResilverError, zfs.ZfsError, OSError):
        settle(layout, tools.step)
        raise
    tools.step("commit.recorded")


def _pipe(layout: Layout, stage: ZfsStage, plan: _Plan) -> Contents:
    """From the stage into the live copy; what went over."""
    base = plan.base
    on = plan.state.every[-1]
    assert base is not None
    options = ["-u"] if zfs.features().unmounted else []
    deadline = time.monotonic() + zfs.BUSY_TIMEOUT_S
    while True:
        expected = (stage.plan.native_target, base.guid)
        receiver = Receiver([*options, f"{layout.live}@{INCOMING}"], Change(clone=False, from_guid=on.guid), expected)
        stream = open_stream(base.name, stage.received, stage.plan.stream_format)
        buffer = memoryview(bytearray(_PIECE_BYTES))
        try:
            while got := stream.read_into(buffer):
                receiver.feed(buffer[:got])
                advanced()
            receiver.finish()
            return receiver.reader.contents()
        except ResilverError as error:
            if "is busy" not in error.message or time.monotonic() > deadline:
                raise
        finally:
            stream.close()
            receiver.close()
        time.sleep(_BUSY_PAUSE_S)  # until a deadline: ZFS tells nobody when it is done
