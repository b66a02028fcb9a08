"""Volumes that are snapshotted together: one instant at which all of them are held, whatever each one's thread does.

Each volume's own thread checks its order and arrives; the last to arrive runs every `before` hook and freezes what is
mounted from the volumes. Then each clones. The last to have cloned thaws, and asks whether all was held till now; only
then does any of the snapshots count, and each thread makes its own one permanent. At the end each thread waits for the
`after` hooks, so that nothing of the next order begins before them.

If one volume fails before that, nothing is taken of any: what is held is let go at once, and the others fail with its
reason. A volume that is taken alone is a group of one, without the freezing, which its backend does.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from agent.disk import loops, quiesce
from agent.disk.durable import make_dir
from agent.hooks import Hooked, HookWatch
from agent.leftovers import holding, recover
from resilver.errors import Refused, ResilverError, Unavailable, error_for
from resilver.lineage import Consistency

HOOKS_DIR: Final = "hooks"
ARRIVE_MAX_S: Final = 60.0
SETTLE_MAX_S: Final = 240.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Member:
    """A volume that is ready for its snapshot. `live` is where its live copy is."""

    hooked: Hooked
    live: str
    needed: bool = True


class Together:
    """One order for several volumes, in the order in which their hooks run. `directory` is where hooks are recorded."""

    def __init__(
        self, volumes: Sequence[str], node: str, directory: Path | None, *, group: str = "", group_id: str = ""
    ) -> None:
        self.group_id: Final = group_id
        self._volumes: Final = tuple(volumes)
        self._node: Final = node
        self._group: Final = group
        self._directory: Final = directory
        self._turn = threading.Condition()
        self._members: dict[str, Member] = {}
        self._how: dict[str, Consistency] = {}
        self._left: set[str] = set()
        self._error: ResilverError | None = None
        self._culprit = ""
        self._begun = self._settled = self._ended = False
        self._covered: set[str] = set()
        self._since = 0.0
        self._frozen: tuple[contextlib.ExitStack, quiesce.Quiesced] | None = None
        self._watch: HookWatch | None = None
        self._holding: Final = contextlib.ExitStack()
        self._failed: dict[str, str] = {}

    # Each from the thread of a volume.

    def arrive(self, member: Member) -> bool:
        """Returns once all have arrived and are held; False if none of them needs a snapshot."""
        volume = member.hooked.volume
        with self._turn:
            self._members[volume] = member
            if len(self._members) == len(self._volumes) and self._error is None:
                self._try(volume, self._hold)
                self._begun = True
                self._turn.notify_all()
            if not self._turn.wait_for(lambda: self._begun or self._error is not None, ARRIVE_MAX_S):
                self._fail("", Unavailable("DEADLINE", f"{', '.join(self._missing())} did not come to it in time"))
            self._raise(volume)
            return self._needed

    def settle(self, volume: str, how: Consistency) -> Consistency:
        """Returns once all have cloned, if all were held until then; how the snapshot was taken."""
        with self._turn:
            self._how[volume] = how
            if len(self._how) == len(self._volumes) and self._error is None:
                self._try(volume, self._let_go)
                self._settled = True
                self._turn.notify_all()
            if not self._turn.wait_for(lambda: self._settled or self._error is not None, SETTLE_MAX_S):
                self._fail("", Unavailable("DEADLINE", "the other volumes of the group were not cloned in time"))
            self._raise(volume)
            if self._members[volume].hooked.hooks.freezes and how is not Consistency.CLOSED:
                return Consistency.FROZEN
            # Frozen by its own kind alone, for a moment of its own, the claim is not one for the group.
            alone = len(self._volumes) > 1 and volume not in self._covered
            return Consistency.SYNCED if how is Consistency.FROZEN and alone else how

    def leave(self, volume: str, error: BaseException | None = None) -> str | None:
        """At the end, or when the volume fails. Returns once every `after` has run: why the volume's own failed, empty
        if it did not; None if there was none to run.
        """
        with self._turn:
            if error is not None:
                told = error if isinstance(error, ResilverError) else ResilverError("INTERNAL", repr(error))
                self._fail(volume, told)
            elif volume not in (self._how if self._needed else self._members) and len(self._volumes) > 1:
                self._fail(volume, Refused("TARGET_CHANGED", f"{volume} was taken by this request before"))
            self._left.add(volume)
            if len(self._left) == len(self._volumes) or self._error is not None:
                self._end()
            self._turn.wait_for(lambda: self._ended, SETTLE_MAX_S)
            return None if self._watch is None else self._failed.get(volume, self._failed.get("", ""))

    # Under the lock.

    @property
    def _needed(self) -> bool:
        return any(member.needed for member in self._members.values())

    def _hold(self) -> None:
        members = [self._members[volume] for volume in self._volumes]
        if not self._needed:
            return
        self._since = time.monotonic()
        if len(members) > 1:
            self._to_freeze(members)  # what cannot be held is refused before anything is
        hooked = [member.hooked for member in members if member.hooked.hooks.any]
        if hooked:
            self._watch = self._hooks_begun(hooked)
        if len(members) > 1 and self._directory is not None:
            until = self._since + min(each.hooks.timeout_s for each in hooked) if hooked else None
            self._freeze(members, self._directory, until)

    def _hooks_begun(self, hooked: list[Hooked]) -> HookWatch:
        if self._directory is None:
            raise Refused("HOOK_FAILED", "this agent has nowhere to record what its hooks hold")
        self._holding.enter_context(holding(self._volumes))
        for each in hooked:
            for volume, why in recover(self._directory, each.volume, held=self._volumes).items():
                _log.error("an `after` that is still due failed again", volume=volume, why=why)
        self._since = time.monotonic()
        return HookWatch.begin(self._directory, self._node, self._group, hooked)

    def _freeze(self, members: list[Member], directory: Path, until: float | None) -> None:
        stats = self._to_freeze(members)
        make_dir(directory)
        stack = contextlib.ExitStack()
        record = directory / f"{self.group_id}.frozen"
        held = quiesce.quiesced_together(stats, record, others_write=True, until=until)
        self._frozen = stack, stack.enter_context(held)

    def _to_freeze(self, members: list[Member]) -> list[os.stat_result]:
        """The live copies whose mounts are to be frozen here. What is mounted from an LV itself is none of them: LVM
        freezes it for the moment of its snapshot, and cannot suspend a device whose file system is frozen already
        (seen on Linux 6.1). Nor may the device be suspended beforehand: then `lvcreate` leaves a snapshot out that its
        metadata has. So what writes to it must be stopped otherwise, and be said to be.
        """
        stats = []
        for member in members:
            try:
                found = os.stat(member.live)  # noqa: PTH116 - the text may name something that is no path
            except OSError:
                continue
            volume, mount = member.hooked.volume, loops.mount_upon(found)
            if mount is None:
                stats.append(found)
                self._covered.add(volume)
            elif not member.hooked.hooks.freezes:
                said = (
                    f"no consistency point was taken: {volume} is mounted at {mount.point} from a logical volume, "
                    "which cannot be held frozen with a group. Stop what writes to it by hooks and say "
                    "`freezes = true` under its [volumes.hooks], unmount it, or take it out of its group"
                )
                raise Refused("NOT_SUPPORTED", said, volume=volume, field="volumes.hooks.freezes")
        return stats

    def _let_go(self) -> None:
        """Thaws first: an `after` may want to write to what was frozen."""
        held = self._thaw()
        if self._watch is not None:
            self._watch.release()
        if self._watch is not None or len(self._volumes) > 1:
            _log.info("held", volumes=self._volumes, seconds=round(time.monotonic() - self._since, 3))
        if not held:  # whatever each one claims for itself: there was no instant at which all of them stood still
            said = "no consistency point was taken: what is mounted was not frozen until the last volume was cloned"
            raise Refused("HOOK_FAILED", said)

    def _thaw(self) -> bool:
        frozen, self._frozen = self._frozen, None
        if frozen is None:
            return True
        frozen[0].close()
        return frozen[1].held

    def _end(self) -> None:
        """Whatever has become of it, nothing stays held."""
        if self._ended:
            return
        self._thaw()
        if self._watch is not None:
            self._failed = self._watch.end()
        self._holding.close()
        self._ended = True
        self._turn.notify_all()

    def _try(self, volume: str, action: Callable[[], None]) -> None:
        try:
            action()
        except ResilverError as error:
            self._fail(volume if len(self._volumes) == 1 else error.metadata.get("volume", ""), error)

    def _fail(self, volume: str, error: ResilverError) -> None:
        if self._error is None:
            self._error, self._culprit = error, volume
        self._turn.notify_all()

    def _raise(self, volume: str) -> None:
        error = self._error
        if error is None:
            return
        if self._culprit in {"", volume}:
            raise error_for(error.reason, error.message, **error.metadata)
        said = f"{volume} was not taken, because {self._culprit} was not: {error.message}"
        raise error_for(error.reason, said, **{**error.metadata, "because": self._culprit})

    def _missing(self) -> list[str]:
        return [volume for volume in self._volumes if volume not in self._members]
