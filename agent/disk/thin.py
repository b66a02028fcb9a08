"""A thin pool's metadata: which chunks of two thin volumes differ, and how full the pool is.

`thin_delta` and `thin_dump` read a live pool only through a *metadata snapshot*, of which a pool has one at a time:

* One lock for each pool of this machine, so that our own volumes wait for each other. It is taken with a deadline.
* A process of its own reserves and releases it (`pool_hold.py`), also when the agent is killed meanwhile.
* Before it is reserved, a marker is written beside the volume's records, and the block it stands in after; released,
  the marker goes. So one that is left behind when both are killed is known, and released at the next use or start.
* Nothing else is ever released. One that is not ours is waited for, then told with the command that releases it:
  another tool may be at work. So is one that may be ours, because both were killed before the block was written down.

What the tools print is read as it comes, strictly: an element that is not known is an error, a new attribute is not.
Two snapshots have equal chunks where the pool maps both to the same place. Numbers are in chunks of the pool.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final
from xml.parsers import expat

import numpy as np
import numpy.typing as npt
import structlog

from agent.disk import dm, lvm, pool_hold
from agent.disk.durable import disk_error, disk_errors, make_dir, read_json, remove_file, write_json
from resilver.errors import Damaged, Exhausted, Refused

LOCKS: Final = Path("/run/lock/resilver")
LOCK_MAX_S: Final = 120.0
FOREIGN_MAX_S: Final = 10.0
HOLDER_MAX_S: Final = 60.0
TOOL_MAX_S: Final = 600.0
END_MAX_S: Final = 30.0
RANGES_MAX: Final = 8_000_000
CHUNKS_MAX: Final = 1 << 48
SECTOR_BYTES: Final = 512

SAME: Final = 0
DIFFERENT: Final = 1
LEFT_ONLY: Final = 2
RIGHT_ONLY: Final = 3
_KINDS: Final = {"same": SAME, "different": DIFFERENT, "left_only": LEFT_ONLY, "right_only": RIGHT_ONLY}
_AROUND: Final = frozenset({"superblock", "diff", "device"})
_MAPPED: Final = {"single_mapping": "origin_block", "range_mapping": "origin_begin"}
_POLL_S: Final = 0.1
_READ_BYTES: Final = 1 << 16
_ANSWER_BYTES_MAX: Final = 64

_log = structlog.get_logger(__name__)

Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Chunks:
    """Stretches of chunks in order, each of one kind; `chunk_bytes` is the pool's."""

    chunk_bytes: int
    begins: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """How a pool is. `held_root` is the block of its metadata snapshot, 0 if there is none."""

    metadata_used: int
    metadata_total: int
    data_used: int
    data_total: int
    held_root: int
    mode: str
    queues_when_full: bool
    needs_check: bool


@dataclass(frozen=True, slots=True)
class Pool:
    """An active pool: its own volume and the one of its metadata. A metadata snapshot is written down at `marker`."""

    lv: lvm.Lv
    metadata: lvm.Lv
    marker: Path

    @classmethod
    def of(cls, group: lvm.Group, lv: lvm.Lv, marker: Path) -> Pool:
        metadata = group.named(f"{lv.name}_tmeta")
        if metadata is None:
            raise Damaged("IO_ERROR", f"{lv.full_name} has no metadata volume {lv.name}_tmeta")
        if dm.find(lv.dm_uuid) is None:
            lvm.lvm("lvchange", "-ay", lv.full_name)
        return cls(lv, replace(metadata, dm_uuid=f"{metadata.dm_uuid}-tmeta"), marker)

    @property
    def release_command(self) -> str:
        return f"dmsetup message {_mapped_name(self.lv)}-tpool 0 release_metadata_snap"

    def metadata_node(self) -> Path:
        device = self.metadata.device
        if device is None:
            raise Damaged("IO_ERROR", f"the metadata of thin pool {self.lv.full_name} has no device")
        return device.node

    def status(self) -> PoolStatus:
        with disk_errors(self.lv.path):
            kind, words = dm.status(self.lv.dm_uuid)
        return parse_status(kind, words, self.lv.full_name)


def _mapped_name(lv: lvm.Lv) -> str:
    return f"{lv.group.replace('-', '--')}-{lv.name.replace('-', '--')}"


def parse_status(kind: str, words: str, name: str) -> PoolStatus:
    """Reads the kernel's line of a thin pool: `transaction used/total used/total held mode option... needs_check -`."""
    fields = words.split()
    if kind != "thin-pool" or len(fields) < 5:
        raise Damaged("IO_ERROR", f"thin pool {name} is out of order: its status is {words or kind!r}")
    try:
        metadata_used, metadata_total = map(int, fields[1].split("/"))
        data_used, data_total = map(int, fields[2].split("/"))
        held = 0 if fields[3] == "-" else int(fields[3])
    except ValueError as error:
        raise Damaged("IO_ERROR", f"the status of thin pool {name} is not understood: {words!r}") from error
    options = fields[5:]
    return PoolStatus(
        metadata_used=metadata_used,
        metadata_total=metadata_total,
        data_used=data_used,
        data_total=data_total,
        held_root=held,
        mode=fields[4],
        queues_when_full="queue_if_no_space" in options,
        needs_check="needs_check" in options,
    )


# The metadata snapshot.


class _Holder:
    """The process that has reserved it. `root` is the block that it stands in."""

    def __init__(self, process: subprocess.Popen[bytes], root: int) -> None:
        self._process = process
        self.root: Final = root

    @classmethod
    def start(cls, pool: Pool, lock: int) -> _Holder | None:
        """Reserves it; None if another was quicker. The process keeps the lock open as long as it holds anything."""
        command = [sys.executable, "-I", "-S", pool_hold.__file__, pool.lv.dm_uuid, str(pool.marker)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, pass_fds=(lock,), start_new_session=True
        )
        made = cls(process, 0)
        word, _, number = made._answer().partition(" ")
        if word == "reserved" and number.isdecimal():
            return cls(process, int(number))
        made.release(pool)
        if word != "failed":
            raise Damaged("IO_ERROR", f"the metadata of thin pool {pool.lv.full_name} could not be reserved")
        if int(number) == errno.EBUSY:
            return None
        raise disk_error(OSError(int(number), os.strerror(int(number))), pool.lv.path)

    def release(self, pool: Pool) -> None:
        """Ends it; the marker goes with it. A process that does not end releases when it can."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(HOLDER_MAX_S)
        except subprocess.TimeoutExpired:
            said = f"the metadata of thin pool {pool.lv.full_name} was not released within {HOLDER_MAX_S:g} s"
            raise Damaged("IO_ERROR", said) from None
        finally:
            self._process.stdout.close()

    def _answer(self) -> str:
        """Its line, which comes at once; empty at its end or if none comes in time."""
        assert self._process.stdout is not None
        ready = select.poll()
        ready.register(self._process.stdout, select.POLLIN)
        line = self._process.stdout.read(_ANSWER_BYTES_MAX) if ready.poll(HOLDER_MAX_S * 1000) else b""
        return (line or b"").decode().strip()


@contextlib.contextmanager
def metadata_snapshot(pool: Pool, step: Step) -> Iterator[None]:
    """Holds the pool's metadata snapshot for the block; released whatever happens in it. The lock is free while one of
    others is waited for.
    """
    until = time.monotonic() + LOCK_MAX_S
    foreign_until = time.monotonic() + FOREIGN_MAX_S
    while True:
        with _locked(pool, until) as lock:
            holder = _reserved(pool, lock, step) if _release_ours(pool) else None
            if holder is not None:
                try:
                    step("metadata.reserved")
                    write_json(pool.marker, {"pool": pool.lv.uuid, "root": holder.root})
                    step("metadata.known")
                    yield
                    return
                finally:
                    holder.release(pool)
        if time.monotonic() > foreign_until:
            raise _foreign(pool)
        time.sleep(_POLL_S)  # until a deadline: the kernel tells nobody


def _reserved(pool: Pool, lock: int, step: Step) -> _Holder | None:
    write_json(pool.marker, {"pool": pool.lv.uuid, "root": 0})
    step("metadata.marked")
    return _Holder.start(pool, lock)


def release_left(pool: Pool) -> None:
    """At start: releases the metadata snapshot of a run before this one, if it is certain to be that one's."""
    if read_json(pool.marker) is None:
        return
    with _locked(pool, time.monotonic() + LOCK_MAX_S):
        if not _release_ours(pool):
            _log.warning("a metadata snapshot was not released", why=_foreign(pool).message)


def _release_ours(pool: Pool) -> bool:
    """Releases what the marker names, and answers whether none is held now. The lock is held."""
    held = pool.status().held_root
    marked = read_json(pool.marker)
    if marked is None:
        return not held
    ours = marked.get("pool") == pool.lv.uuid
    if held and ours and marked.get("root") == held:
        with disk_errors(pool.lv.path):
            pool_hold.release(pool.lv.dm_uuid)
        held = 0
    if not (held and ours and marked.get("root") == 0):  # of which it is not known whose it is: the marker says so
        remove_file(pool.marker)
    return not held


def _foreign(pool: Pool) -> Refused:
    whose = "that this agent has not made"
    if read_json(pool.marker) is not None:
        whose = "of which it is not known whether this agent, killed just as it made one, or another tool has made it"
    return Refused(
        "IN_USE",
        f"thin pool {pool.lv.full_name} has a metadata snapshot {whose}, and there can be one only. If no other tool "
        f"is at work with it, release it: {pool.release_command}",
        next_command=pool.release_command,
    )


@contextlib.contextmanager
def _locked(pool: Pool, until: float) -> Iterator[int]:
    """Holds the lock of the pool; its descriptor."""
    with disk_errors(LOCKS):
        make_dir(LOCKS)
        fd = os.open(LOCKS / f"pool-{pool.lv.uuid}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _try_lock(fd):
            if time.monotonic() > until:
                raise Refused("IN_USE", f"the metadata of thin pool {pool.lv.full_name} is being read for too long")
            time.sleep(_POLL_S)  # until a deadline: the kernel tells nobody
        yield fd
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# What the tools say.


def delta(pool: Pool, left: int, right: int, step: Step) -> Chunks:
    """How the chunks of two thin volumes compare, by their numbers in the pool."""
    with metadata_snapshot(pool, step):
        node = pool.metadata_node()
        return _read(["thin_delta", "-m", "--snap1", str(left), "--snap2", str(right), str(node)], _delta_row)


def mapped(pool: Pool, number: int, step: Step) -> Chunks:
    """The chunks that a thin volume has; their kind is RIGHT_ONLY, as if compared with an empty one."""
    with metadata_snapshot(pool, step):
        node = pool.metadata_node()
        return _read(["thin_dump", "-m", "--dev-id", str(number), str(node)], _dump_row)


Row = tuple[int, int, int]
RowOf = Callable[[str, dict[str, str]], Row | None]


def _delta_row(tag: str, fields: dict[str, str]) -> Row | None:
    kind = _KINDS.get(tag)
    if kind is None:
        return None
    return int(fields["begin"]), int(fields["length"]), kind


def _dump_row(tag: str, fields: dict[str, str]) -> Row | None:
    begin = _MAPPED.get(tag)
    if begin is None:
        return None
    return int(fields[begin]), int(fields.get("length", "1")), RIGHT_ONLY


def _read(command: list[str], row_of: RowOf) -> Chunks:
    """Runs a tool and reads its rows as they come."""
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, bufsize=0, env=lvm.ENV
            )
        except FileNotFoundError:
            fix = "apt-get install thin-provisioning-tools"
            raise Refused("NOT_SUPPORTED", f"{command[0]} is not installed: {fix}") from None
        assert process.stdout is not None
        broken = ""
        found = None
        try:
            found = parse(_pieces(process.stdout, command[0]), row_of, command[0])
            process.wait(timeout=END_MAX_S)
        except expat.ExpatError as error:
            broken = f"its answer is cut off: {error}"
        except subprocess.TimeoutExpired:
            raise Damaged("IO_ERROR", f"{command[0]} does not end") from None
        finally:
            process.kill()  # it only reads
            process.stdout.close()
            with contextlib.suppress(subprocess.TimeoutExpired):  # in a read that the kernel does not give up
                process.wait(END_MAX_S)
        code = process.returncode
        if code == 0 and found is not None:
            return found
        said.seek(0)
        words = said.read(2000).decode(errors="replace").strip().splitlines()
        raise Damaged("IO_ERROR", f"{' '.join(command)}: {words[0] if words else broken}")


def _pieces(out: IO[bytes], tool: str) -> Iterator[bytes]:
    """What a tool prints, until a deadline: reading a disk that does not answer, it would hang for ever."""
    until = time.monotonic() + TOOL_MAX_S
    ready = select.poll()
    ready.register(out, select.POLLIN)
    while ready.poll(max(0.0, until - time.monotonic()) * 1000) and time.monotonic() < until:
        piece = out.read(_READ_BYTES)
        if not piece:
            return
        yield piece
    raise Damaged("IO_ERROR", f"{tool} is not done within {TOOL_MAX_S:g} s")


def parse(pieces: Iterable[bytes], row_of: RowOf, tool: str) -> Chunks:
    """Reads a tool's XML. ExpatError if it is cut off; Damaged for an element that nothing is known of."""
    begins, lengths, kinds = array("q"), array("q"), array("b")
    chunk_bytes = 0

    def element(tag: str, fields: dict[str, str]) -> None:
        nonlocal chunk_bytes
        try:
            row = row_of(tag, fields)
            if tag == "superblock":
                chunk_bytes = int(fields["data_block_size"]) * SECTOR_BYTES
        except (KeyError, ValueError) as error:
            raise Damaged("IO_ERROR", f"{tool}: <{tag}> is not understood: {error!r}") from error
        if row is not None:
            if max(row[:2]) > CHUNKS_MAX:
                raise Damaged("IO_ERROR", f"{tool}: <{tag}> is beyond every pool: {fields}")
            begins.append(row[0])
            lengths.append(row[1])
            kinds.append(row[2])
        elif tag not in _AROUND:
            raise Damaged("IO_ERROR", f"{tool} prints <{tag}>, which is not known here")

    parser = expat.ParserCreate()
    parser.StartElementHandler = element
    for piece in pieces:
        parser.Parse(piece, False)
        if len(begins) > RANGES_MAX:
            raise Exhausted("TOO_LARGE", f"{tool} names more than {RANGES_MAX:,} stretches")
    parser.Parse(b"", True)
    return _checked(
        Chunks(chunk_bytes, np.array(begins, np.int64), np.array(lengths, np.int64), np.array(kinds, np.int8)), tool
    )


def _checked(chunks: Chunks, tool: str) -> Chunks:
    ends = chunks.begins + chunks.lengths
    sound = not len(ends) or (
        bool((chunks.lengths > 0).all()) and int(chunks.begins[0]) >= 0 and bool((ends[:-1] <= chunks.begins[1:]).all())
    )
    if not sound or chunks.chunk_bytes <= 0:
        raise Damaged("IO_ERROR", f"{tool} names stretches that are out of order")
    return chunks
