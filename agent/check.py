"""`resilver-agent --check`: what the configuration would meet on this machine, without serving anything.

Prints a line for each thing that was looked at. Nothing is created but the file that a file system is tried with, and
that one is gone at once. What would keep the agent from working is a fault; what an operator should know is a note.
"""

from __future__ import annotations

import os
import socket
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from agent.backends.kinds import make_backend
from agent.hooks import program_fault, user_fault
from resilver.credentials import credentials_of
from resilver.errors import ResilverError
from resilver.names import Name, Role
from resilver.volume import Presence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.backends.base import Examined
    from resilver.config import AgentConfig, VolumeConfig

OK: Final = 0
FAULTY: Final = 2


class Weight(StrEnum):
    """What a line begins with."""

    OK = "ok"
    NOTE = "note"
    FAULT = "FAULT"


Line = tuple[Weight, str]


def check(config: AgentConfig, out: TextIO) -> int:
    """Prints what was found; 0 if an agent would work, 2 if not."""
    faulty = False
    for weight, said in _lines(config):
        faulty = faulty or weight is Weight.FAULT
        print(f"{weight:5}  {said}", file=out)
    return FAULTY if faulty else OK


def _fault_if(wrong: bool) -> Weight:
    return Weight.FAULT if wrong else Weight.OK


def _lines(config: AgentConfig) -> Iterator[Line]:
    volumes = "1 volume" if len(config.volumes) == 1 else f"{len(config.volumes)} volumes"
    yield Weight.OK, f"node {config.node} of cluster {config.cluster}, {volumes}"
    for address in config.coordinators:
        yield _resolves(address.host, address.port, f"coordinator {address}")
    yield _certificate(config)
    yield _state_dir(config.state_dir)
    yield _sees_users()
    for volume in config.volumes:
        yield from _volume(volume, config)
        yield from _hooks(volume)
    for group in sorted({volume.group for volume in config.volumes if volume.group}):
        names = [volume.name for volume in config.volumes if volume.group == group]
        yield Weight.OK, f"group {group}: {', '.join(names)}, snapshotted together"


def _resolves(host: str, port: int, what: str) -> Line:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return Weight.FAULT, f"{what}: its name cannot be resolved: {error.strerror or error}"
    return Weight.OK, f"{what} is {found[0][4][0]}"


def _certificate(config: AgentConfig) -> Line:
    try:
        tls = credentials_of(config.tls, Name(config.cluster, Role.NODE, config.node))
    except ResilverError as error:
        return Weight.FAULT, error.message
    if tls is None:
        weight = Weight.NOTE if config.insecure else Weight.OK
        return weight, "no TLS: " + ("INSECURE, anybody may read and order" if config.insecure else "loopback only")
    return _fault_if(
        tls.ends_at <= datetime.now(UTC)
    ), f"certificate of {tls.name}, until {tls.ends_at:%Y-%m-%d %H:%M}Z"


def _state_dir(path: Path) -> Line:
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return Weight.FAULT, f"state_dir {path}: {place} is no directory"
    if not os.access(place, os.W_OK | os.X_OK):
        return Weight.FAULT, f"state_dir {path}: this user may not write to {place}"
    return Weight.OK, f"state_dir {path}" + ("" if place == path else ", which will be created")


def _sees_users() -> Line:
    """Who has a file open is told by /proc/<pid>/fd, which only its owner and root may read."""
    try:
        next(Path("/proc/1/fd").iterdir(), None)
    except OSError:
        return (
            Weight.NOTE,
            "in use: processes of other users cannot be named by this user, but are noticed; root names them",
        )
    return Weight.OK, "in use: processes of all users can be named"


def _volume(volume: VolumeConfig, config: AgentConfig) -> Iterator[Line]:
    try:
        examined = make_backend(volume, config).examine(compare_live=False)
    except ResilverError as error:
        yield Weight.FAULT, f"volume {volume.name}: {error.message}"
        return
    yield from _found(volume, examined)


def _hooks(volume: VolumeConfig) -> Iterator[Line]:
    name, hooks = f"volume {volume.name}", volume.hooks
    if hooks.any and (fault := user_fault(hooks.user)):
        yield Weight.FAULT, f"{name}: hooks: {fault}"
    for phase, words in (("before", hooks.before), ("after", hooks.after)):
        if words:
            fault = program_fault(words)
            yield _fault_if(bool(fault)), f"{name}: hook {phase}: {fault or words[0]}"


def _found(volume: VolumeConfig, examined: Examined) -> Iterator[Line]:
    name = f"volume {volume.name}"
    if not examined.file_system_id:
        yield Weight.FAULT, f"{name}: {'; '.join(examined.problems) or 'its disk is not there'}"
        return
    tip = examined.lineage.tip
    what = {
        Presence.PRESENT: f"at {tip.name}" if tip is not None else "with data that was never mirrored",
        Presence.EMPTY: "empty",
        Presence.LOST: "lost",
    }[examined.presence]
    yield Weight.OK, f"{name}: {volume.path}, {what}"
    if examined.live.in_use:
        yield Weight.NOTE, f"{name}: in use by {', '.join(examined.live.in_use_by)}"
    how = "snapshots share its blocks" if examined.reflink else "no shared blocks here: each snapshot is a full copy"
    yield Weight.OK if examined.reflink else Weight.NOTE, f"{name}: {how} (file system {examined.file_system_id})"
    free, reserve = examined.free_bytes, examined.reserve_bytes
    said = f"{name}: {free:,} bytes free, of which {reserve:,} stay in reserve"
    yield _fault_if(free < reserve), said + ("; nothing can be received or snapshotted" if free < reserve else "")
    for problem in examined.problems:
        yield Weight.NOTE, f"{name}: {problem}"
