"""The live copy as it is found: who uses it, and what it is to its tip.

*Unmodified* is exact: a snapshot is taken for the moment, and the incremental stream from the tip to it holds nothing
between its first record and its last. Where ZFS tells what was written since a snapshot,
nothing is enough.

*Shut* is a live copy while a commit is under way: `readonly=on`, and `canmount=noauto`, so that neither a boot nor
`zfs mount` lets anybody write. Whoever sets that back on purpose can; so nothing is taken for unmodified by that alone.

*In use* is a live copy that a process has open, mapped or stands in, that is mounted at a second place, exported (by
ZFS, or as any directory is), a layer of an overlay, or under a loop device. Being mounted where it belongs is not use:
that can be undone, and whether it can is for the kernel to say (`set_aside`).

*Aside* is a live copy that was unmounted for a commit. Where it is to be mounted again is written down before, so that
it comes back whatever becomes of the commit, and of the agent.
"""

from __future__ import annotations

import ctypes
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Final

import structlog

from agent.backends import zfs_keys
from agent.backends.zfs_layout import TAKING, WAS_CANMOUNT, WAS_READONLY, Layout, State
from agent.backends.zfs_send import open_stream
from agent.backends.zfs_stream import Reader
from agent.disk import exports, mounted, overlays, zfs, zfs_mounts
from agent.disk.advance import advanced
from agent.disk.durable import read_json, remove_file, write_json
from agent.stored import typed
from resilver.errors import Refused, ResilverError
from resilver.volume import LiveCopy, LiveState

LOOK: Final = "look"
LEGACY: Final = "legacy"
_SHUT: Final = {"readonly": "on", "canmount": "noauto"}
_PIECE_BYTES: Final = 64 << 10
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Uses:
    """`who` uses it, by name; `at` are the places in our own namespace, `writable` if anybody could write."""

    who: tuple[str, ...]
    at: tuple[str, ...]
    writable: bool


def uses(layout: Layout, head: zfs.Dataset) -> Uses:
    """Everybody who has the live copy in use."""
    found = mounted.places(layout.live)
    own = [place for place in found if place.own]
    first = next((place for place in own if place.point == head.mountpoint), own[0] if own else None)
    extra = [f"a mount at {place.point}" for place in own if place is not first]
    shared = [f"an export ({share})" for share in head.shared] if own else []
    exported = {f"NFS export {export.path}" for place in own for export in exports.reaching(place.point)}
    devices = {place.device for place in found}
    layered = {f"overlay mount at {layer.point}" for layer in overlays.layers() if layer.device in devices}
    who = (*mounted.users(found), *extra, *shared, *sorted(exported), *sorted(layered))
    return Uses(who, tuple(place.point for place in own), not head.readonly)


def refuse(layout: Layout, who: tuple[str, ...]) -> Refused:
    names = ", ".join(who) or "a process that cannot be seen from here"
    return Refused("IN_USE", f"{layout.live} is in use by {names}; it is not touched until that ends", in_use_by=names)


def look(layout: Layout, state: State, *, compare: bool) -> tuple[LiveCopy, tuple[str, ...]]:
    """The live copy, and what an operator should know of it."""
    head = state.head
    if head is None:
        return LiveCopy(LiveState.ABSENT, layout.live, based_on=state.tip), ()
    found = uses(layout, head)
    problems: tuple[str, ...] = ()
    try:
        what = _against_tip(layout, state, found, compare=compare)
    except Refused as error:  # a full pool takes no snapshot, not even for a moment; without a key nothing is read
        what, problems = LiveState.UNKNOWN, (f"{layout.live} cannot be compared: {error.message}",)
    if head.locked:
        problems = (*problems, zfs_keys.locked(layout))
    if state.children:
        names = ", ".join(state.children)
        problems = (
            *problems,
            f"{names}: datasets below {layout.live} are no part of the volume, and hinder its replacing",
        )
    live = LiveCopy(
        state=what,
        path=layout.live,
        size_bytes=head.referenced_bytes,
        allocated_bytes=head.used_bytes,
        based_on=state.tip,
        in_use=bool(found.who),
        in_use_by=found.who,
    )
    return live, problems


def _against_tip(layout: Layout, state: State, found: Uses, *, compare: bool) -> LiveState:
    if state.lineage.tip is None or (found.who and found.writable):
        return LiveState.MODIFIED
    tip = state.where.get(state.tip)
    if tip is None or found.who or not compare:
        return LiveState.UNKNOWN
    flush(found)
    return LiveState.UNMODIFIED if unchanged(layout.live, tip.name) else LiveState.MODIFIED


def flush(found: Uses) -> None:
    """Brings what was written through a mapping, or lies in a cache, to the file system."""
    libc = ctypes.CDLL(None, use_errno=True)
    for point in found.at[:1]:
        try:
            fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            libc.syncfs(fd)
        finally:
            os.close(fd)


@contextmanager
def _moment(dataset: str) -> Iterator[str]:
    """A snapshot for the moment; one that is left by a kill is swept at the next start."""
    name = f"{dataset}@resilver-{LOOK}-{uuid.uuid4().hex[:12]}"
    try:
        zfs.run("zfs", "snapshot", "-o", f"{TAKING}={LOOK}", name)
    except zfs.ZfsError as error:
        raise error.refused() from error
    try:
        yield name
    finally:
        zfs.destroy(name)


def unmodified(layout: Layout, since: str) -> bool:
    """Whether nothing at all was changed since that snapshot of the live copy, which nobody has mounted."""
    return replayed(layout, layout.live) and unchanged(layout.live, since)


def replayed(layout: Layout, dataset: str) -> bool:
    """Brings into a file system what its intent log alone has; False if that cannot be, and so nobody knows of it."""
    try:
        zfs_mounts.replay(dataset, str(layout.root))
    except zfs.ZfsError as error:
        _log.warning("taken for modified: it cannot be mounted", dataset=dataset, message=error.text)
        return False
    return True


def replay_unmounted(layout: Layout, state: State) -> bool:
    """As `replayed`, before the first look; only what nobody has mounted is behind. False while its key is missing;
    ZfsError if it cannot be.
    """
    head = state.head
    if head is None or head.mounted or mounted.places(layout.live):
        return True
    if head.locked:
        return False
    # Nobody else sees what it covers; of a dataset that is not ours yet there are no records.
    zfs_mounts.replay(layout.live, str(layout.root if layout.root.is_dir() else "/mnt"))
    return True


def unchanged(dataset: str, since: str) -> bool:
    """Whether nothing at all was changed in a file system since that snapshot: its own, or the one it is a clone of."""
    if zfs.features().written and since.partition("@")[0] == dataset:
        if mounted.places(dataset):
            zfs.sync(zfs.pool_of(dataset))  # what is still in memory, or only in the intent log, is not counted before
        if zfs.get(dataset, f"written@{since.partition('@')[2]}") == "0":
            return True
    with _moment(dataset) as now:
        return empty_between(since, now)


def empty_between(base: str, target: str) -> bool:
    """Whether two snapshots of one dataset hold the same: their stream says nothing."""
    stream = open_stream(base, target, "zfs")
    reader = Reader()
    buffer = memoryview(bytearray(_PIECE_BYTES))
    try:
        while (got := stream.read_into(buffer)) and not reader.content_records:
            for _piece in reader.feed(buffer[:got]):
                pass
            advanced()
    finally:
        stream.close()
    return reader.whole and not reader.content_records


@dataclass(frozen=True, slots=True)
class _Aside:
    """Where a live copy was mounted. `point` is empty where ZFS knows it, and nobody has to be told."""

    point: str = ""
    options: str = ""


def set_aside(layout: Layout, head: zfs.Dataset) -> bool:
    """Takes the live copy out of everybody's reach; whether it was mounted. IN_USE: all is as before."""
    found = uses(layout, head)
    if found.who:
        raise refuse(layout, found.who)
    apart = [place for place in mounted.places(layout.live) if not (place.own or place.linked)]
    if apart:
        raise refuse(layout, _named(apart))
    if not found.at and not head.mounted:
        return False
    _note_aside(layout, head)
    if not zfs_mounts.unmount(layout.live):
        remove_file(layout.aside)
        raise refuse(layout, uses(layout, head).who)
    left = mounted.places(layout.live)
    if left:  # linked, and yet not gone with ours
        put_back(layout)
        raise refuse(layout, _named(left))
    return True


def _named(places: list[mounted.Place]) -> tuple[str, ...]:
    return tuple(f"a mount at {place.point} in another namespace" for place in places)


def _note_aside(layout: Layout, head: zfs.Dataset) -> None:
    aside = _Aside()
    if head.mountpoint == LEGACY:
        place = next((place for place in mounted.places(layout.live) if place.own and place.root == "/"), None)
        aside = _Aside(place.point, place.options) if place is not None else aside
    write_json(layout.aside, asdict(aside))


def put_back(layout: Layout) -> None:
    """Mounts the live copy again where it was, if it was set aside; that it cannot be is the operator's to see."""
    try:
        value = read_json(layout.aside)
        if value is None:
            return
        head = zfs.look(layout.live)
        if head is not None and not any(place.own for place in mounted.places(layout.live)):
            _mount(layout, head, typed(layout.aside, value, _Aside))
    except (zfs.ZfsError, ResilverError) as error:
        _log.warning("live copy not mounted again", dataset=layout.live, message=str(error))
        if isinstance(error, zfs.ZfsError) and error.busy:
            return  # a moment of somebody else's: it is tried again
    remove_file(layout.aside)


def _mount(layout: Layout, head: zfs.Dataset, aside: _Aside) -> None:
    if head.mountpoint != LEGACY:
        zfs_mounts.mount(layout.live)
        return
    # Somebody else's mount there is not to be covered.
    if not aside.point or os.path.ismount(aside.point):
        return
    kept = [option for option in aside.options.split(",") if option not in {"rw", "ro", "relatime"}]
    only_read = head.readonly or "ro" in aside.options.split(",")
    zfs_mounts.mount_legacy(layout.live, aside.point, ",".join([*(["ro"] if only_read else []), *kept]))


# Shut.


def shut(layout: Layout, local: Mapping[str, str]) -> None:
    """Lets nobody write by accident; `local` are its own properties as they are. Again is fine."""
    for name, value in _SHUT.items():
        if local.get(name) != value:
            zfs.run("zfs", "set", f"{name}={value}", layout.live)


def is_shut(local: Mapping[str, str]) -> bool:
    """Whether a live copy with these local properties is shut still."""
    return all(local.get(name) == value for name, value in _SHUT.items())


def stays_shut(readonly: str, canmount: str) -> bool:
    """Whether `open_up` with these has nothing to do, whatever is found."""
    return readonly in {"", _SHUT["readonly"]} and canmount in {"", _SHUT["canmount"]}


def open_up(layout: Layout, readonly: str, canmount: str) -> None:
    """Gives a live copy that was shut its settings back, "inherit" for none of its own; what somebody set since stays.

    Empty: nothing is known of that one, and it stays as it is. While it is mounted `readonly` is not restored, because
    ZFS then tells what the mount is. IN_USE: it cannot be mounted anew for that.
    """
    local = zfs.local_properties(layout.live)
    wanted = (("readonly", readonly), ("canmount", canmount))
    try:
        for name, value in wanted:
            if value and local.get(name) == _SHUT[name] != value:
                words = ("inherit", name) if value == "inherit" else ("set", f"{name}={value}")
                zfs.run("zfs", *words, layout.live)
    except zfs.ZfsError as error:
        head = zfs.look(layout.live)
        if "busy" not in error.text or head is None:
            raise
        raise refuse(layout, uses(layout, head).who) from error


def give_back(layout: Layout) -> None:
    """A primary's dataset is as its operator had it, but for being mounted: that is for him to do."""
    found = zfs.looks(layout.live, layout.group, properties=(WAS_READONLY, WAS_CANMOUNT))
    if layout.live not in found:
        return
    was = found[layout.group].own
    if was.get(WAS_READONLY) == "inherit":
        zfs.run("zfs", "inherit", "readonly", layout.live)
    elif WAS_READONLY in was:
        zfs.run("zfs", "set", f"readonly={was[WAS_READONLY]}", layout.live)
    if WAS_CANMOUNT in was:
        zfs.run("zfs", "set", f"canmount={was[WAS_CANMOUNT]}", layout.live)
    for noted in set(was) & {WAS_READONLY, WAS_CANMOUNT}:
        zfs.run("zfs", "inherit", noted, layout.group)
