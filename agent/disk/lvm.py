"""LVM's own commands, and what they say of a volume group.

* `look` is one `lvs`; what it answers is a moment's picture, and nothing is remembered. Logical volumes are followed by
  UUID, so that a rename by hand breaks nothing. Whether one is active or open is asked of the kernel (`dm.py`).
* Commands come from lists, in the C locale, one at a time for a group by LVM's own lock. One that does not end in time
  is asked to, never killed: a command killed between suspend and resume would leave a device hanging.
* What LVM says is passed on in its own words, with the command.
"""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import dataclass
from typing import Final

import msgspec

from agent.disk import dm
from agent.disk.durable import disk_errors
from resilver.errors import Damaged, Refused, ResilverError

COMMAND_MAX_S: Final = 180.0
_LEAVE_MAX_S: Final = 5.0
_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
ENV: Final = {"LC_ALL": "C", "PATH": _PATH, "LVM_SUPPRESS_FD_WARNINGS": "1"}
_FIELDS: Final = (
    "vg_uuid,vg_extent_size,lv_name,lv_uuid,lv_size,lv_attr,lv_tags,thin_id,origin,pool_lv,segtype,chunk_size,zero,"
    "discards,lv_when_full"
)


class _Volumes(msgspec.Struct):
    lv: list[dict[str, str]]


class _Report(msgspec.Struct):
    report: list[_Volumes]


@dataclass(frozen=True, slots=True)
class Lv:
    """A logical volume as the group's metadata has it; the last four are a thin pool's."""

    group: str
    name: str
    uuid: str
    size_bytes: int
    kind: str
    tags: frozenset[str]
    thin_id: int
    pool: str
    read_only: bool
    skip: bool
    dm_uuid: str
    chunk_bytes: int
    zeroes: bool
    discards: str
    error_when_full: bool

    @property
    def full_name(self) -> str:
        return f"{self.group}/{self.name}"

    @property
    def path(self) -> str:
        return f"/dev/{self.group}/{self.name}"

    @property
    def device(self) -> dm.Device | None:
        """Its device, None while it is not active."""
        with disk_errors(dm.CONTROL):
            return dm.find(self.dm_uuid)


@dataclass(frozen=True, slots=True)
class Group:
    """A volume group that is there."""

    name: str
    uuid: str
    extent_bytes: int
    volumes: tuple[Lv, ...]

    def named(self, name: str) -> Lv | None:
        return next((lv for lv in self.volumes if lv.name == name), None)

    def of_uuid(self, uuid: str) -> Lv | None:
        return next((lv for lv in self.volumes if lv.uuid == uuid), None)

    def pools(self) -> list[Lv]:
        return [lv for lv in self.volumes if lv.kind == "thin-pool"]


def look(group: str) -> Group | None:
    """The group with its logical volumes, hidden ones too; None if there is no such group."""
    report = ["--reportformat", "json", "--units", "b", "--nosuffix"]
    done = _ended("lvm", "lvs", "-a", *report, "-o", _FIELDS, group)
    if done.returncode != 0:
        if f'Volume group "{group}" not found' in done.stderr:
            return None
        raise _failed(done)
    return parse_report(group, done.stdout)


def parse_report(group: str, text: str) -> Group:
    """What `lvs --reportformat json` prints of a group; Damaged("IO_ERROR") if that is not understood."""
    rows = _rows(text)
    if not rows:
        return Group(group, "", 0, ())
    try:
        volumes = tuple(_volume(group, row) for row in rows)
        return Group(group, rows[0]["vg_uuid"], int(rows[0]["vg_extent_size"]), volumes)
    except (LookupError, ValueError) as error:
        raise Damaged("IO_ERROR", f"lvs {group} answers what is not understood here: {error!r}") from error


def _rows(text: str) -> list[dict[str, str]]:
    """Every value in it is a text, whatever it means."""
    try:
        reports = msgspec.json.decode(text, type=_Report).report
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Damaged("IO_ERROR", f"lvs answers no JSON report: {text[:200]!r}: {error}") from error
    if not reports:
        raise Damaged("IO_ERROR", "lvs answers a report without logical volumes")
    return reports[0].lv


def _volume(group: str, row: dict[str, str]) -> Lv:
    attributes, kind = row["lv_attr"], row["segtype"]
    uuid = row["lv_uuid"]
    layer = "-tpool" if kind == "thin-pool" else ""
    return Lv(
        group=group,
        name=row["lv_name"].strip("[]"),
        uuid=uuid,
        size_bytes=int(row["lv_size"]),
        kind=kind,
        tags=frozenset(filter(None, row["lv_tags"].split(","))),
        thin_id=int(row["thin_id"] or -1),
        pool=row["pool_lv"].strip("[]"),
        read_only=attributes[1] in "rR",
        skip=attributes[9] == "k",
        dm_uuid=f"LVM-{row['vg_uuid'].replace('-', '')}{uuid.replace('-', '')}{layer}",
        chunk_bytes=int(row["chunk_size"] or 0),
        zeroes=row["zero"] in {"zero", "1"},
        discards=row["discards"],
        error_when_full=row["lv_when_full"] == "error",
    )


def run(*words: str) -> str:
    """Runs a command and answers what it printed; NO_SPACE or IO_ERROR with its own words if it failed."""
    done = _ended(*words)
    if done.returncode != 0:
        raise _failed(done)
    return done.stdout


def lvm(*words: str) -> None:
    """Runs an LVM command."""
    run("lvm", *words)


def _ended(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
        )
    except FileNotFoundError:
        raise Refused(
            "NOT_SUPPORTED", f"{words[0]} is not installed: apt-get install lvm2 thin-provisioning-tools"
        ) from None
    try:
        out, said = process.communicate(timeout=COMMAND_MAX_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):  # in a section that must not be interrupted
            process.communicate(timeout=_LEAVE_MAX_S)
        raise Damaged("IO_ERROR", f"{' '.join(words)}: not done within {COMMAND_MAX_S:g} s") from None
    return subprocess.CompletedProcess(words, process.returncode, out, said)


def _failed(done: subprocess.CompletedProcess[str]) -> ResilverError:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and "WARNING" not in line]
    said = "; ".join(lines[-3:]) or f"exit code {done.returncode}"
    message = f"{' '.join(done.args)}: {said}"
    if "free space" in said or "insufficient" in said.lower():
        return Refused("NO_SPACE", message)
    return Damaged("IO_ERROR", message)


def activate(lv: Lv) -> dm.Device:
    """Makes its device, also if it is marked to be left out."""
    found = lv.device
    if found is None:
        lvm("lvchange", "-ay", "-K", lv.full_name)
        found = lv.device
    if found is None:
        raise Damaged("IO_ERROR", f"{lv.full_name} has no device although LVM has activated it")
    return found


def deactivate(lv: Lv) -> bool:
    """Takes its device away, so that nobody can open it; False if somebody has it open."""
    if lv.device is None:
        return True
    try:
        lvm("lvchange", "-an", lv.full_name)
    except Damaged:
        found = lv.device
        if found is not None and found.open_count:
            return False
        raise
    return lv.device is None


def remove(lv: Lv) -> bool:
    """Removes it with its data; False if somebody has it open."""
    if not deactivate(lv):
        return False
    lvm("lvremove", "-y", lv.full_name)
    return True


def rename(lv: Lv, name: str) -> None:
    lvm("lvrename", lv.group, lv.name, name)
