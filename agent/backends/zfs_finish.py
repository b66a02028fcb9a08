"""The intention of a commit, and what is done from it: also after a kill, as often as needed.

What has happened is read from which dataset has the live copy's name, by guid, and for a **follow** from the record:
nothing of it has to be remembered in between.

Between a kill and this the dataset may have been mounted, and written to. So nothing is rolled back, and nothing
destroyed, that was not compared again once nobody had it mounted:

* A **follow** that has received nothing changed nothing: whatever the live copy is by now, its user has made it.
* One that has received is rolled back only while the live copy is exactly what came, under no later snapshot, and
  nobody can have written to it since that was asked. Else the snapshot of ours goes, and the live copy stays as it is:
  modified, and preserved before it is replaced. One with a legacy mount always stays: nothing keeps it from being
  mounted and written to.
* A live copy that is in use by then is not touched: the commit stays as it is until that ends.
* A replaced live copy that was to be let go, and was written to since, is a preserved copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from agent.backends import zfs_keep as keeping
from agent.backends.zfs_layout import (
    INCOMING,
    RECORD,
    TAG,
    TAKING,
    WAS_CANMOUNT,
    WAS_READONLY,
    Layout,
    load_state,
    save_tip,
)
from agent.backends.zfs_live import (
    LEGACY,
    is_shut,
    open_up,
    put_back,
    replayed,
    set_aside,
    shut,
    stays_shut,
    unchanged,
    unmodified,
)
from agent.backends.zfs_records import ready
from agent.backends.zfs_stage import discard
from agent.disk import mounted, zfs, zfs_mounts
from agent.disk.durable import read_json, remove_file, write_json
from agent.stored import typed
from resilver.errors import Damaged, Refused

# Not the new dataset's to take over: what it is itself, what says who made it, and what is set in any case.
_NOT_TAKEN_OVER: Final = frozenset({"readonly", "version", "volsize", "type"})
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Journal:
    """The intention of a commit.

    `new_guid` is the target's, `head_guid` and `stage_guid` those of the datasets; `name` is what the target will be
    called. `on` is the snapshot that a follow stands on. `kept` is where a replaced live copy goes, and `keeps` whether
    it stays there. `readonly_was` is what the operator had set. `recorded`: a follow has become the tip. `readonly_set`
    and `canmount_set` are what the live copy is given back when it is not shut any more, empty if that is not known.
    `rolling`: what a follow received is being taken back, and nobody had written to it when that began.
    """

    mode: str
    resync_id: str
    volume_id: str
    old_tip: str
    new_tip: str
    new_guid: str
    record: str
    name: str
    head_guid: str
    stage_guid: str
    on: str
    promotes: bool
    kept: str
    keeps: bool
    mounted: bool
    readonly_was: str
    properties: dict[str, str] = field(default_factory=dict)
    recorded: bool = False
    readonly_set: str = ""
    canmount_set: str = ""
    rolling: bool = False


def save_journal(layout: Layout, journal: Journal) -> None:
    write_json(layout.files.commit, {name: getattr(journal, name) for name in Journal.__slots__})


def load_journal(layout: Layout) -> Journal | None:
    value = read_json(layout.files.commit)
    return None if value is None else typed(layout.files.commit, value, Journal)


def readonly(layout: Layout, local: Mapping[str, str]) -> str:
    """What the operator has set for `readonly`, by the local properties of a dataset that is not mounted; what we noted
    before, if we have.
    """
    group = zfs.look(layout.group, WAS_READONLY)
    noted = group.own.get(WAS_READONLY) if group is not None else None
    return noted or local.get("readonly", "inherit")


def settle(layout: Layout, step: Callable[[str], None]) -> None:
    """Finishes or undoes a commit that was interrupted; nothing if there is none."""
    journal = load_journal(layout)
    if journal is None:
        put_back(layout)
        return
    if _decided(layout, journal):
        finish(layout, journal, step)
        discard(layout)
    else:
        _undo(layout, journal)


def settle_unless_used(layout: Layout, step: Callable[[str], None]) -> tuple[str, ...]:
    """As `settle`, for who only looks: a live copy that is in use by then is a problem to be told."""
    try:
        settle(layout, step)
    except Refused as error:
        if error.reason != "IN_USE":
            raise
        return (f"a commit that was cut off waits: {error.message}",)
    return ()


def waiting(layout: Layout) -> tuple[str, ...]:
    """That a commit was cut off, if one was. Changes nothing."""
    if load_journal(layout) is None:
        return ()
    return ("a commit was cut off: the agent finishes it or takes it back when it starts",)


def _decided(layout: Layout, journal: Journal) -> bool:
    head = zfs.look(layout.live)
    guid = head.guid if head is not None else ""
    if journal.mode == "follow":
        incoming = zfs.look(f"{layout.live}@{INCOMING}", RECORD)
        return journal.recorded or (incoming is not None and RECORD in incoming.own)
    if guid == journal.stage_guid:
        return True
    if journal.mode == "first":
        if guid:
            raise Refused("TARGET_CHANGED", f"{layout.live} was created meanwhile: move it away, or destroy it")
        return False
    if not guid:
        return True
    if guid != journal.head_guid:
        raise Damaged("IO_ERROR", f"{layout.live} is neither what it was nor what it was to become")
    return False


def _undo(layout: Layout, journal: Journal) -> None:
    """Gives a commit up: the live copy is as before, or as its user has left it since, and so is the stage.

    IN_USE: somebody has the live copy in use, and all is as it was.
    """
    head = zfs.look(layout.live)
    came = journal.mode == "follow" and (journal.rolling or zfs.look(f"{layout.live}@{INCOMING}") is not None)
    if head is not None and (came or not stays_shut(journal.readonly_set, journal.canmount_set)):
        set_aside(layout, head)
        if came:
            journal = _take_back(layout, journal)
    if journal.promotes:
        stage, head = zfs.look(layout.stage), zfs.look(layout.live)
        if stage is not None and not stage.origin and head is not None and head.origin.startswith(f"{layout.stage}@"):
            zfs.run("zfs", "promote", layout.live)
    for copy in keeping.list_preserved(layout):
        if journal.kept and copy.path.partition("@")[0] == journal.kept:
            keeping.remove_description(layout, copy.id)
    if head is not None:
        open_up(layout, journal.readonly_set, journal.canmount_set)
    remove_file(layout.files.commit)
    put_back(layout)


def _take_back(layout: Layout, journal: Journal) -> Journal:
    """Takes back what a follow has received, if nothing was written since; the journal by then.

    The live copy is not mounted.
    """
    incoming = f"{layout.live}@{INCOMING}"
    ours = _ours_alone(layout, journal)
    local = zfs.local_properties(layout.live)
    if zfs.look(incoming) is not None:
        if not is_shut(local):  # whoever opened it meant to: it is given back as he had it
            readonly_set, canmount_set = local.get("readonly", "inherit"), local.get("canmount", "on")
            journal = replace(journal, readonly_set=readonly_set, canmount_set=canmount_set)
            save_journal(layout, journal)
        shut(layout, local)
        ours = ours and unmodified(layout, incoming)
        journal = replace(journal, rolling=ours)
        save_journal(layout, journal)
        zfs.destroy(incoming)
    if not (ours and _rolled_back(layout, journal.on)):
        _log.warning("live copy is not what its commit had received: kept as it is", dataset=layout.live)
    journal = replace(journal, rolling=False)
    save_journal(layout, journal)
    return journal


def _rolled_back(layout: Layout, on: str) -> bool:
    """Whether it was; not once somebody may have written since what came was destroyed: what that is cannot be told.

    So each attempt asks anew: one fails while somebody has it mounted, and he may be writing.
    """
    touched = Refused("TARGET_CHANGED", f"{layout.live} may have been written to")

    def check() -> None:
        head = zfs.look(layout.live)
        if head is None or head.mountpoint == LEGACY or head.mounted or mounted.places(layout.live):
            raise touched
        if not is_shut(zfs.local_properties(layout.live)):
            raise touched

    try:
        zfs.patient("zfs", "rollback", on, check=check)
    except Refused as refused:
        if refused is not touched:
            raise
        return False
    return True


def _ours_alone(layout: Layout, journal: Journal) -> bool:
    """Whether no snapshot but what was received came after the one that a follow stands on; debris of ours goes."""
    every = zfs.snapshots_of(zfs.family(layout.live, RECORD, TAKING), layout.live)
    names = [one.name for one in every]
    if journal.on not in names:
        return False
    later = [one for one in every[names.index(journal.on) + 1 :] if one.snapshot != INCOMING]
    for one in later:
        if TAKING in one.own and RECORD not in one.own:
            zfs.destroy(one.name)
    return all(TAKING in one.own and RECORD not in one.own for one in later)


def finish(layout: Layout, journal: Journal, step: Callable[[str], None]) -> None:
    """What is left of a commit once its intention stands; each line may be done already."""
    if journal.mode != "follow":
        _exchange(layout, journal, step)
    _set_properties(layout, journal)
    step("commit.set")
    tip = _name_tip(layout, journal)
    if journal.record:
        zfs.hold(TAG, tip)
    save_tip(layout, journal.new_tip, journal.volume_id)
    step("commit.pointed")
    if journal.mode == "replace":
        _keep(layout, journal)
    step("commit.kept")
    put_back(layout)
    remove_file(layout.files.commit)
    step("commit.closed")


def _exchange(layout: Layout, journal: Journal, step: Callable[[str], None]) -> None:
    """The stage takes the live copy's name; the live copy, if there is one, goes where it is kept."""
    incoming = f"{layout.stage}@{INCOMING}"
    if journal.record and zfs.look(incoming) is not None:
        zfs.run("zfs", "set", f"{RECORD}={journal.record}", incoming)
    step("commit.recorded")
    stage = zfs.look(layout.stage)
    if journal.promotes and stage is not None and stage.origin.startswith(f"{layout.live}@"):
        zfs.run("zfs", "promote", layout.stage)
    step("commit.promoted")
    head = zfs.look(layout.live)
    if journal.mode == "replace" and head is not None and head.guid == journal.head_guid:
        zfs.patient("zfs", "rename", layout.live, journal.kept)
    step("commit.moved")
    if zfs.look(layout.live) is None:
        zfs.patient("zfs", "rename", layout.stage, layout.live)
    step("commit.placed")


def _set_properties(layout: Layout, journal: Journal) -> None:
    """What a replica is, what the dataset before it had, and what keeps a preserved one out of the way."""
    zfs.run("zfs", "set", f"{WAS_READONLY}={journal.readonly_was}", layout.group)
    zfs.run("zfs", "set", "readonly=on", layout.live)
    if journal.mode == "first":
        # At the next boot it would be mounted, and then in the way of the next commit.
        zfs.run("zfs", "set", "canmount=noauto", layout.live)
        zfs.run("zfs", "set", f"{WAS_CANMOUNT}=on", layout.group)
    if journal.mode == "follow":
        open_up(layout, "", journal.canmount_set)
    if journal.mode != "replace":
        return
    _put_away(journal.kept)
    for name, value in sorted(journal.properties.items()):
        if name in _NOT_TAKEN_OVER:
            continue
        try:
            zfs.run("zfs", "set", f"{name}={value}", layout.live)
        except zfs.ZfsError as error:
            _log.warning("property not taken over", dataset=layout.live, name=name, message=error.text)
    if not journal.mounted:
        zfs_mounts.unmount(layout.live)  # to set a mount point may have mounted it


def _put_away(kept: str) -> None:
    """Keeps a replaced live copy from being mounted and written to, as far as nobody has it in use."""
    if zfs.look(kept) is None:
        return
    for setting in ("readonly=on", "canmount=noauto", "mountpoint=none", "reservation=none", "refreservation=none"):
        try:
            zfs.run("zfs", "set", setting, kept)
        except zfs.ZfsError as error:
            if "busy" not in error.text:
                raise
            _log.warning("replaced live copy is in use", dataset=kept, setting=setting, message=error.text)


def _keep(layout: Layout, journal: Journal) -> None:
    """A replaced live copy with nothing of its own goes, if it was not to stay for its snapshots.

    Where a clone or a hold pins it, somebody uses it, or it was written to since it was compared, it is kept after all.
    """
    kept = zfs.look(journal.kept)
    if kept is None or any(copy.path == kept.name for copy in keeping.list_preserved(layout)):
        return
    if zfs_mounts.unmount(kept.name) and replayed(layout, kept.name) and _is_newest(kept):
        if journal.keeps:
            return
        try:
            keeping.destroy_kept(kept.name)
        except Refused:
            pass
        else:
            return
    size, used = kept.referenced_bytes, kept.used_bytes
    copy = keeping.describe(kept.name, None, size, used, live=True, resync_id=journal.resync_id)
    keeping.save_description(layout, copy)


def _is_newest(kept: zfs.Dataset) -> bool:
    """Whether a replaced live copy is what its newest snapshot is, or else what it was cloned from."""
    every = zfs.snapshots_of(zfs.family(kept.name, RECORD, TAKING), kept.name)
    named = [one.name for one in every if RECORD in one.own or TAKING not in one.own]
    since = named[-1] if named else kept.origin
    return bool(since) and unchanged(kept.name, since)


def _name_tip(layout: Layout, journal: Journal) -> str:
    """Gives the tip the name that it is to have; its name from now on."""
    final = f"{layout.live}@{journal.name}"
    incoming = f"{layout.live}@{INCOMING}"
    if zfs.look(incoming) is not None:
        zfs.run("zfs", "rename", incoming, final)
        return final
    state = load_state(layout, there=ready(layout))
    found = state.where.get(journal.new_tip)
    if found is None or found.guid != journal.new_guid:
        said = f"{layout.live} should have snapshot {journal.new_tip} by now, and has not"
        raise Damaged("IO_ERROR", said)
    return found.name
