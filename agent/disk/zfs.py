"""Calls of `zfs` and `zpool`, and what they answer.

Written for OpenZFS and for zfs-fuse alike. What a command can do is read from its own usage text at the first call,
never assumed: zfs-fuse has no estimates, no resume tokens, no `written`, and no `zfs holds` that works.

* Properties are asked for with `zfs get -Hp`, in exact numbers; `zfs list` rounds where it knows no `-p`.
* A user property counts only where it is the dataset's or snapshot's own: snapshots show their file system's too.
* Every command has a deadline, an argument list and the plain locale; what fails says so in its own words. "Busy" is
  tried again a few times: a receive that was killed lets go of its dataset only when the kernel has noticed.
* Names are letters, digits, `-_.:` and blanks, so a tab or a new line never stands in one.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from resilver.errors import Damaged, Refused, ResilverError

COMMAND_TIMEOUT_S: Final = 120.0
BUSY_TIMEOUT_S: Final = 20.0
_BUSY_PAUSE_S: Final = 0.1
_OWN: Final = frozenset({"local", "received"})
_SPACE: Final = ("out of space", "no space left", "quota exceeded")
_ABSENT: Final = (
    "dataset does not exist",
    "no such pool",
    "no such dataset",
    "could not find any snapshots to destroy",
)
_BUSY: Final = ("is busy", "mount point busy", "is already mounted")
_NO_SERVICE: Final = (
    "zfs-fuse daemon",
    "modules are not loaded",
    "/dev/zfs",
    "failed to initialize",
)
_COLUMNS: Final = (
    "type",
    "guid",
    "createtxg",
    "creation",
    "userrefs",
    "used",
    "referenced",
    "available",
    "origin",
    "mounted",
    "mountpoint",
    "readonly",
    "sharenfs",
    "sharesmb",
)
_ENCRYPTION: Final = ("encryption", "keystatus")
_LOCKED: Final = "key must be loaded"
# `umount` takes a dataset's name for a path first, and in / it may be the mount point of another one.
_NOWHERE: Final = "/proc"
_DIGITS_MAX: Final = 20
_PATH: Final = "/usr/local/sbin:/usr/sbin:/sbin"


class ZfsError(Exception):
    """Internal: a command failed; `text` is what it said."""

    def __init__(self, command: str, text: str) -> None:
        super().__init__(f"{command}: {text}")
        self.command: Final = command
        self.text: Final = text

    @property
    def absent(self) -> bool:
        return any(words in self.text for words in _ABSENT)

    @property
    def busy(self) -> bool:
        return any(words in self.text for words in _BUSY)

    @property
    def exists(self) -> bool:
        return "already exists" in self.text

    def refused(self) -> ResilverError:
        """What it is to the rest of the program."""
        said = f"{self.command}: {self.text}"
        if any(words in self.text.lower() for words in _SPACE):
            return Refused("NO_SPACE", f"{said}; free some space in the pool and try again")
        if any(words in self.text for words in _NO_SERVICE):
            return Refused("NOT_SUPPORTED", f"{said}; load the zfs module, or start zfs-fuse")
        if _LOCKED in self.text:
            return Refused("NOT_SUPPORTED", f"{said}; zfs load-key loads it, if this node may read the data")
        return Damaged("IO_ERROR", said)


@dataclass(frozen=True, slots=True)
class Features:
    """What the installed commands can do."""

    written: bool
    estimate: bool
    send_large: bool
    resume: bool
    origin: bool
    unmounted: bool
    encryption: bool


@dataclass(frozen=True, slots=True)
class Dataset:
    """A file system or a snapshot, as `zfs get` tells it. `own` are the user properties that are its own.

    `locked`: it is encrypted, and its key is not loaded.
    """

    name: str
    kind: str
    guid: str = ""
    create_txg: int = 0
    create_time_ms: int = 0
    holds: int = 0
    used_bytes: int = 0
    referenced_bytes: int = 0
    free_bytes: int = 0
    origin: str = ""
    mounted: bool = False
    mountpoint: str = ""
    readonly: bool = False
    shared: tuple[str, ...] = ()
    encrypted: bool = False
    locked: bool = False
    own: Mapping[str, str] = field(default_factory=dict)

    @property
    def snapshot(self) -> str:
        """The part behind the @, empty for a file system."""
        return self.name.partition("@")[2]


def command(name: str) -> str:
    """The path of `zfs` or `zpool`; both live where only root looks by default."""
    found = shutil.which(name) or shutil.which(name, path=_PATH)
    if found is None:
        raise Refused("NOT_SUPPORTED", f"there is no {name} command on this node: install zfsutils-linux, or zfs-fuse")
    return found


def environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def run(tool: str, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """What a command prints; raises ZfsError with its own words."""
    shown = " ".join((tool, *arguments[:1], *arguments[1:][-1:]))
    try:
        done = subprocess.run(
            [command(tool), *arguments],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env=environment(),
            cwd=_NOWHERE,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Damaged("IO_ERROR", f"{shown} has not answered for {timeout_s:.0f} s") from None
    if done.returncode != 0:
        raise ZfsError(shown, brief(done.stderr) or f"ended with {done.returncode}")
    return done.stdout.decode(errors="replace")


def patient(tool: str, *arguments: str, check: Callable[[], None] = lambda: None) -> str:
    """As `run`, and again for a while as long as the dataset is busy; `check` raises before what must not be tried."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        check()
        try:
            return run(tool, *arguments)
        except ZfsError as error:
            if not error.busy or time.monotonic() > deadline:
                raise
        time.sleep(_BUSY_PAUSE_S)  # until a deadline: ZFS tells nobody when it is done


def brief(raw: bytes) -> str:
    """The words of a failed command, without the usage text that some print behind them."""
    text = raw.decode(errors="replace").partition("usage:")[0]
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())[:500]


@functools.cache
def features() -> Features:
    """Reads what the usage texts offer, once for each process."""
    return parse_usages(*(_usage(verb) for verb in ("send", "receive", "get")))


def parse_usages(send: str, receive: str, properties: str) -> Features:
    """What the usage texts of `zfs send`, `receive` and `get` offer."""
    can_send, can_receive = _letters(send), _letters(receive)
    return Features(
        written=re.search(r"^\s+written\s", properties, re.MULTILINE) is not None,
        estimate={"n", "P", "v"} <= can_send,
        send_large={"L", "c"} <= can_send,
        resume="s" in can_receive and "receive_resume_token" in properties,
        origin="-o origin=" in receive or "[-o <property>=<value>]" in receive or "[-o property=value]" in receive,
        unmounted="u" in can_receive,
        encryption=re.search(r"^\s+keystatus\s", properties, re.MULTILINE) is not None,
    )


def _usage(verb: str) -> str:
    """A command without arguments prints how it is used, and fails."""
    done = subprocess.run(
        [command("zfs"), verb],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=environment(),
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    text = (done.stdout + done.stderr).decode(errors="replace")
    if "usage:" not in text:  # the kernel's module is not loaded yet: nothing is known, and nothing to be remembered
        raise ZfsError(f"zfs {verb}", brief(text.encode()) or f"ended with {done.returncode}")
    return text


def _letters(usage: str) -> set[str]:
    return {letter for group in re.findall(r"\[-([A-Za-z]+)\]", usage) for letter in group}


def pool_of(name: str) -> str:
    return name.partition("/")[0].partition("@")[0]


def look(name: str, *properties: str) -> Dataset | None:
    """A file system or a snapshot, None if it is not there. `properties` are user properties that are wanted too."""
    try:
        found = _get((name,), properties)
    except ZfsError as error:
        if error.absent:
            return None
        raise
    return found.get(name)


def looks(*names: str, properties: tuple[str, ...] = ()) -> dict[str, Dataset]:
    """Those of several datasets that are there, by name."""
    try:
        return _get(names, properties)
    except ZfsError as error:
        if not error.absent:
            raise
    found = (look(name, *properties) for name in names)
    return {one.name: one for one in found if one is not None}


def family(name: str, *properties: str) -> dict[str, Dataset]:
    """A file system, its snapshots and its children by name, empty if it is not there."""
    try:
        return _get((name,), properties, "-r", "-d", "1")
    except ZfsError as error:
        if error.absent:
            return {}
        raise


def get(name: str, prop: str) -> str:
    """One property of a dataset; "-" where it has none."""
    return run("zfs", "get", "-Hp", "-o", "value", prop, name).removesuffix("\n")


def local_properties(name: str) -> dict[str, str]:
    """The properties that were set on a file system itself, or came with a stream that another tool received."""
    text = run("zfs", "get", "-Hp", "-s", "local,received", "-o", "name,property,value,source", "all", name)
    rows = (line.split("\t") for line in text.split("\n"))
    return {row[1]: row[2] for row in rows if len(row) == 4 and row[0] == name}


def _get(names: tuple[str, ...], properties: tuple[str, ...], *how: str) -> dict[str, Dataset]:
    asked = ",".join((*_COLUMNS, *(_ENCRYPTION if features().encryption else ()), *properties))
    return parse_get(run("zfs", "get", "-Hp", *how, "-o", "name,property,value,source", asked, *names))


def parse_get(text: str) -> dict[str, Dataset]:
    """What `zfs get -Hp -o name,property,value,source` prints, by name; what is no such line is passed over."""
    values: dict[str, dict[str, str]] = {}
    own: dict[str, dict[str, str]] = {}
    # By new lines alone: the value of a property may hold what else Python takes for the end of a line.
    for line in text.split("\n"):
        row = line.split("\t")
        if len(row) != 4 or "#" in row[0]:  # a bookmark is no snapshot
            continue
        values.setdefault(row[0], {})[row[1]] = row[2]
        if ":" in row[1] and row[3] in _OWN:
            own.setdefault(row[0], {})[row[1]] = row[2]
    return {key: _dataset(key, value, own.get(key, {})) for key, value in values.items()}


def _dataset(name: str, value: dict[str, str], own: dict[str, str]) -> Dataset:
    def number(key: str) -> int:
        text = value.get(key, "-")
        return int(text) if text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX else 0

    shares = [f"{key}={value[key]}" for key in ("sharenfs", "sharesmb") if value.get(key, "off") not in {"off", "-"}]
    return Dataset(
        name=name,
        kind=value.get("type", "-"),
        guid=value.get("guid", ""),
        create_txg=number("createtxg"),
        create_time_ms=number("creation") * 1000,
        holds=number("userrefs"),
        used_bytes=number("used"),
        referenced_bytes=number("referenced"),
        free_bytes=number("available"),
        origin="" if value.get("origin", "-") == "-" else value["origin"],
        mounted=value.get("mounted") == "yes",
        mountpoint=value.get("mountpoint", ""),
        readonly=value.get("readonly") == "on",
        shared=tuple(shares),
        encrypted=value.get("encryption", "off") not in {"off", "-"},
        locked=value.get("keystatus") == "unavailable",
        own=own,
    )


def snapshots_of(found: Mapping[str, Dataset], name: str) -> list[Dataset]:
    """The snapshots of a file system, oldest first: in the order of its own history. One without a name is none."""
    mine = [one for key, one in found.items() if key.startswith(f"{name}@") and one.snapshot]
    return sorted(mine, key=lambda one: one.create_txg)


def hold(tag: str, snapshot: str) -> None:
    """Keeps a snapshot from being destroyed; again is fine."""
    try:
        run("zfs", "hold", tag, snapshot)
    except ZfsError as error:
        if "tag already exists" not in error.text:
            raise


def release(tag: str, snapshot: str) -> None:
    """Takes a hold back; none is fine."""
    try:
        run("zfs", "release", tag, snapshot)
    except ZfsError as error:
        if "no such tag" not in error.text and not error.absent:
            raise


def sync(pool: str) -> None:
    """Returns when all that was written before is in the pool, and so in what its datasets tell of themselves."""
    run("zpool", "sync", pool)


def destroy(name: str) -> None:
    """Destroys a file system without snapshots and children, or a snapshot; one that is not there is fine."""
    try:
        patient("zfs", "destroy", name)
    except ZfsError as error:
        if not error.absent:
            raise
