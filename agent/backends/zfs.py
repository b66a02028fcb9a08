"""The `zfs` backend: a volume is a dataset, a snapshot is a snapshot of it, and a delta is ZFS' own stream.

This file is the door: it checks space, calls what does the work, and turns errors of the disk into ours.

=====================  ============================================================================
`zfs_layout.py`        where everything stands, how a snapshot is known for ours, how the tip is found
`zfs_records.py`       the dataset of the records beside it: made, mounted, another agent's
`zfs_snapshot.py`      taking a consistency point
`zfs_live.py`          the live copy as it is found: in use by whom, modified or not
`zfs_send.py`          what `zfs send` writes, and whether a resume token is of what was asked for
`zfs_stream.py`        the stream itself: read, summed up, changed in its first record (no I/O)
`zfs_stage.py`         what is being received, beside the live copy
`zfs_commit.py`        the stage becomes the tip: by following or by replacing
`zfs_finish.py`        the intention of a commit, finished or undone after a kill
`zfs_keys.py`          what is encrypted stays so
`zfs_keep.py`          preserved copies, dropping, exporting, sweeping
=====================  ============================================================================

Works with OpenZFS and with zfs-fuse; what is not there is found out at the first call (`agent/disk/zfs.py`).
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, Literal

from agent.backends import (
    image_layout,
    mandate,
    zfs_commit,
    zfs_finish,
    zfs_keep,
    zfs_live,
    zfs_records,
    zfs_send,
    zfs_snapshot,
    zfs_stage,
)
from agent.backends.base import AnyStage, CommitOrder, Examined, NewSnapshot, SendStream, StreamOrigin, StreamStage
from agent.backends.rules import drop_each
from agent.backends.zfs_layout import (
    OWNER,
    SEND_TAG,
    State,
    find,
    load_state,
    make_layout,
)
from agent.disk import advance, orphans, zfs
from agent.disk.claim import Claim
from agent.disk.durable import disk_errors
from resilver.errors import Invalid, NotFound, Refused
from resilver.lineage import Lineage, Origin, Snapshot
from resilver.volume import Grant, LiveCopy, Presence, PreservedCopy, VolumeRecord

STEPS: Final = (
    *zfs_snapshot.STEPS,
    *zfs_commit.STEPS,
    "drop.logged",
    "drop.destroyed",
)

_MARGIN_MIN_BYTES: Final = 64 << 20


class ZfsBackend:
    """One replica whose live copy is a dataset. `step` is called by name at the points listed in STEPS."""

    kind = "zfs"
    shape: Literal["stream"] = "stream"

    def __init__(
        self,
        volume: str,
        path: Path,
        snapshot_dir: Path,
        *,
        reserve_ratio: float = 0.05,
        reserve_min_bytes: int = 1 << 30,
        preserved_max_count: int = 64,
        preserved_max_bytes: int = 0,
        state_dir: Path | None = None,
        step: Callable[[str], None] = advance.step,
    ) -> None:
        self._layout: Final = make_layout(volume, path, snapshot_dir.absolute(), state_dir)
        self._claim: Final = Claim(self._layout.root, state_dir)
        self._reserve = (reserve_ratio, reserve_min_bytes)
        self._step: Final = step
        self._tools: Final = zfs_commit.Tools(self._layout, step, preserved_max_count, preserved_max_bytes)
        self._begun = self._replayed = False
        self._sending: Counter[str] = Counter()
        self._held: Final = threading.Lock()

    def set_reserve(self, ratio: float, min_bytes: int) -> None:
        """Another reserve, from the next look at the space on."""
        self._reserve = (ratio, min_bytes)

    def recover(self) -> str:
        layout = self._layout
        with self._errors():
            around = zfs.looks(layout.pool, layout.parent)
        where = around[layout.pool].guid if around.keys() >= {layout.pool, layout.parent} else ""
        with self._alone() as there:
            if not there:
                return where
            zfs_finish.settle_unless_used(layout, self._step)
            state = load_state(layout, there=True)
            zfs_keep.sweep(layout, state)
            plan = zfs_stage.load_plan(layout)
            # Of no use any more: its target is here, or its dataset is not.
            if plan is None or plan.target in state.where or (plan.whole and zfs.look(layout.stage) is None):
                zfs_stage.discard(layout)
        return where

    def examine(self, *, compare_live: bool = True) -> Examined:
        layout = self._layout
        with self._errors(), contextlib.ExitStack() as stack:
            around = zfs.looks(layout.pool, layout.parent, layout.records, properties=(OWNER,))
            pool, parent = around.get(layout.pool), around.get(layout.parent)
            if pool is None or parent is None:
                self._replayed = False  # with what its disks have been through by the time they are there
                return self._nowhere(pool.guid if pool is not None else "")
            there = zfs_records.mounted(layout, around.get(layout.records))
            another = self._another(stack, compare=compare_live) if there else ()
            waiting = self._cut_off() if there and not another else ()
            state = load_state(layout, there=there)
            unread = self._replay(state) if compare_live and not another else ()
            compare = compare_live and not another and (self._replayed or not self._begun)
            live, problems = zfs_live.look(layout, state, compare=compare)
            free, reserve = self._space(pool, parent)
            return Examined(
                presence=Presence.PRESENT if state.head is not None else Presence.EMPTY,
                volume_id=state.volume_id,
                lineage=state.lineage,
                live=live,
                record=mandate.load_record(layout.files, state.volume_id) if there else None,
                grant=mandate.load_grant(layout.files) if there else None,
                preserved=zfs_keep.list_preserved(layout) if there else (),
                free_bytes=free,
                reserve_bytes=reserve,
                reflink=True,
                file_system_id=pool.guid,
                problems=(*another, *waiting, *unread, *state.problems, *problems),
                others=state.others,
            )

    def _cut_off(self) -> tuple[str, ...]:
        """Why a commit that was cut off is not finished or undone yet: who only looks at an agent's disks does not."""
        if self._begun:
            return zfs_finish.settle_unless_used(self._layout, self._step)
        return zfs_finish.waiting(self._layout)

    def _another(self, stack: contextlib.ExitStack, *, compare: bool) -> tuple[str, ...]:
        """Which other agent works here, as a problem: then a look neither finishes what that one has begun, nor takes a
        snapshot to compare by. Otherwise no other one does until the end of the stack. Who is no agent, and compares
        nothing, makes nobody's orders wait.
        """
        try:
            if self._begun or compare:
                stack.enter_context(self._claim.held(takes=self._begun))
            else:
                self._claim.check()
        except Refused as error:
            return (f"{error.reason}: {error.message}",)
        return ()

    def _replay(self, state: State) -> tuple[str, ...]:
        """Once for each start of an agent: what the live copy's intent log alone has, so that an election knows of it;
        as a problem why it is not known yet.
        """
        if not self._begun or self._replayed:
            return ()
        try:
            self._replayed = zfs_live.replay_unmounted(self._layout, state)
        except zfs.ZfsError as error:
            return (f"what {self._layout.live} had synced before its last unmount is not known: {error}",)
        return ()

    def _nowhere(self, pool: str) -> Examined:
        """What the live copy would stand under is not there, and the caller knows if it was."""
        layout = self._layout
        what = f"there is no dataset {layout.parent}: create it" if pool else f"pool {layout.pool} is not imported"
        return Examined(
            presence=Presence.EMPTY,
            volume_id="",
            lineage=Lineage(),
            live=LiveCopy(path=layout.live),
            record=None,
            grant=None,
            preserved=(),
            free_bytes=0,
            reserve_bytes=0,
            reflink=True,
            file_system_id=pool,
            problems=(what,),
        )

    def save_record(self, record: VolumeRecord) -> None:
        with self._alone(make=True):
            mandate.save_record(self._layout.files, record)

    def save_grant(self, grant: Grant | None) -> None:
        with self._alone(make=grant is not None) as there:
            if grant is not None:
                zfs_live.give_back(self._layout)
            if there:
                mandate.save_grant(self._layout.files, grant)

    def take_snapshot(self, new: NewSnapshot) -> Snapshot:
        layout = self._layout
        image_layout.check_id(new.id)
        with self._settled() as state:
            held = zfs_snapshot.taken_before(layout, state, new)
            if held is not None:
                return held
            self._check_free(0, "a consistency point")
            with self._alone(make=True):
                return zfs_snapshot.take(layout, state, new, self._step)

    def formats(self) -> tuple[str, ...]:
        with self._errors():
            return zfs_send.formats(self._layout.pool)

    def delta_bytes(self, base: str, target: str) -> int | None:
        with self._errors():
            state = self._state()
            below = find(self._layout, state, base, "BASE_GONE").name if base else ""
            above = find(self._layout, state, target, "TARGET_GONE").name
            # Of a replica that goes back to its own tip nothing is sent, and OpenZFS knows no stream of it.
            return 0 if below == above else zfs_send.estimate(below, above)

    def native_id(self, snapshot_id: str) -> str:
        with self._errors():
            return find(self._layout, self._state(), snapshot_id, "TARGET_GONE").guid

    def open_send(self, base: str, target: str, stream_format: str, token: str = "") -> SendStream:
        layout = self._layout
        with self._errors():
            state = self._state()
            below = find(layout, state, base, "BASE_GONE") if base else None
            above = find(layout, state, target, "TARGET_GONE")
            if stream_format not in zfs_send.formats(layout.pool):
                raise Invalid("INVALID_FIELD", f"this node cannot write {stream_format!r}", field="format")
            if token:
                zfs_send.check_token(token, below.guid if below is not None else "", above.guid)
            names = [one.name for one in (below, above) if one is not None]
            self._hold(names)
            try:
                release = partial(self._release, names)
                return zfs_send.open_stream(below.name if below else "", above.name, stream_format, token, release)
            except BaseException:
                self._release(names)
                raise

    def _hold(self, names: list[str]) -> None:
        """Nobody destroys what is being sent; several streams may need the same."""
        with self._held:
            for name in names:
                if not self._sending[name]:
                    zfs.hold(SEND_TAG, name)
                self._sending[name] += 1

    def _release(self, names: list[str]) -> None:
        with self._held:
            for name in names:
                self._sending[name] -= 1
                if not self._sending[name]:
                    del self._sending[name]
                    with contextlib.suppress(zfs.ZfsError):  # swept at the next start
                        zfs.release(SEND_TAG, name)

    def check_base(self, base: str, native_base: str) -> None:
        with self._errors():
            zfs_stage.base_of(self._layout, self._state(), base, native_base)

    def check_stream_space(self, stream_bytes: int | None, *, resumed_bytes: int = 0) -> int:
        """What the stage takes, and the live copy once more when it follows; a margin where the length is not known."""
        with self._errors():
            told = stream_bytes or 0
            need = max(0, 2 * told - resumed_bytes) + max(told // 100, _MARGIN_MIN_BYTES)
            self._check_free(need, "receiving this")
            return need

    def open_stream_stage(self, base: str, target: str, origin: StreamOrigin) -> StreamStage:
        for snapshot_id in filter(None, (base, target)):
            image_layout.check_id(snapshot_id)
        for field, value in (("native_base", origin.native_base), ("native_target", origin.native_target)):
            if re.fullmatch(r"[0-9]{0,20}", value) is None:
                raise Invalid("INVALID_FIELD", f"{value!r} is no guid of ZFS", field=field)
        with self._settled(make=True) as state:
            return zfs_stage.open_stage(self._layout, state, base, target, origin)

    def discard_stage(self) -> None:
        with self._alone() as there:
            if there:
                zfs_finish.settle(self._layout, self._step)
                zfs_stage.discard(self._layout)

    def commit(self, stage: AnyStage, order: CommitOrder) -> tuple[PreservedCopy, ...]:
        if not isinstance(stage, zfs_stage.ZfsStage):
            raise TypeError("a stage of another backend")
        with self._alone():
            return zfs_commit.commit(self._tools, stage, order)

    def drop(self, snapshot_id: str) -> int:
        layout = self._layout
        with self._settled() as state:
            copy = next((copy for copy in self._preserved() if copy.id == snapshot_id), None)
            if copy is not None:
                return zfs_keep.drop_preserved(layout, copy, self._step)
            record = state.known.get(snapshot_id)
            foreign = any(other.id == snapshot_id for other in state.others)
            if foreign or (record is not None and record.origin is Origin.ADOPTED):
                raise Refused("PINNED", f"{snapshot_id} was made by another tool, which is to destroy it")
            if record is None:
                raise self._unknown(snapshot_id)
            if snapshot_id == state.tip:
                raise Refused("PINNED", f"{snapshot_id} is the newest snapshot here, which the live copy stands on")
            if snapshot_id not in state.where:
                return 0
            if self._sending[state.where[snapshot_id].name]:  # zfs-fuse would wait for the end of the stream
                raise Refused("PINNED", f"{snapshot_id} is being sent")
            return zfs_keep.drop_snapshot(layout, state, snapshot_id, self._step)

    def prune(self, keep_last: int, pinned: frozenset[str]) -> tuple[tuple[str, int], ...]:
        """Passes over what other tools have made, and what a preserved copy stands on."""
        with self._settled() as state:
            ours = [record.id for record in state.lineage if record.present and state.is_ours(record.id)]
            going = [here for here in ours[max(1, keep_last) :] if here not in pinned]
            # Oldest first: whatever interrupts it, the newest ones are there.
            return drop_each(reversed(going), self.drop)

    def export(self, snapshot_id: str, path: Path, *, writable: bool) -> int:
        """Copies to a directory, which is writable in any case: who may write is told by the files' own modes."""
        del writable
        with self._settled() as state:
            copy = next((copy for copy in self._preserved() if copy.id == snapshot_id), None)
            if copy is None and snapshot_id not in state.known:
                raise self._unknown(snapshot_id)
            name = copy.path if copy is not None else find(self._layout, state, snapshot_id, "TARGET_GONE").name
            zfs_keep.check_export(path)
            with self._alone(make=True):
                return zfs_keep.export_tree(self._layout, name, path)

    def _preserved(self) -> tuple[PreservedCopy, ...]:
        return zfs_keep.list_preserved(self._layout) if zfs_records.ready(self._layout) else ()

    def _unknown(self, snapshot_id: str) -> NotFound:
        said = f"no snapshot or preserved copy {snapshot_id} of {self._layout.volume}"
        return NotFound("SNAPSHOT_NOT_FOUND", said, snapshot=snapshot_id)

    def _state(self) -> State:
        return load_state(self._layout, there=zfs_records.ready(self._layout))

    @contextlib.contextmanager
    def _settled(self, *, make: bool = False) -> Iterator[State]:
        """Alone, the state once a commit that was interrupted in this very process is finished or undone."""
        with self._alone(make=make) as there:
            if there:
                zfs_finish.settle(self._layout, self._step)
            yield load_state(self._layout, there=there)

    @contextlib.contextmanager
    def _alone(self, *, make: bool = False) -> Iterator[bool]:
        """No other agent works here meanwhile, nor does a command that one has left; whether the records, by which
        another agent is known, are there.
        """
        with self._errors(), contextlib.ExitStack() as stack:
            if make:
                zfs_records.make_root(self._layout)
            there = make or zfs_records.ready(self._layout)
            if there:
                stack.enter_context(self._claim.held())
            if not self._begun:
                orphans.wait(self._layout.concerns)
                self._begun = True
            yield there

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with disk_errors(self._layout.root):
            try:
                yield
            except zfs.ZfsError as error:
                raise error.refused() from error

    def _space(self, pool: zfs.Dataset, parent: zfs.Dataset) -> tuple[int, int]:
        """Free bytes, and those that are never used up."""
        ratio, least = self._reserve
        return parent.free_bytes, max(least, int((pool.used_bytes + pool.free_bytes) * ratio))

    def _check_free(self, need: int, what: str) -> None:
        layout = self._layout
        around = zfs.looks(layout.pool, layout.parent)
        if layout.pool not in around or layout.parent not in around:
            said = f"there is no dataset {layout.parent}: create it, or import its pool"
            raise Invalid("INVALID_FIELD", said, field="path")
        free, reserve = self._space(around[layout.pool], around[layout.parent])
        if free - need < reserve:
            raise Refused(
                "NO_SPACE",
                f"{what} needs {need:,} bytes above the reserve of {reserve:,}, and {free:,} are free for "
                f"{self._layout.live}; free {need + reserve - free:,} more there",
                need_bytes=str(need),
                free_bytes=str(free),
                reserve_bytes=str(reserve),
            )
