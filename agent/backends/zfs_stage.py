"""What is becoming the target of a stream: a dataset beside the live copy, which nobody sees before the commit.

A stream is received as a clone of its base: with `zfs receive -o origin=` where there is that, else by marking its
first record as one of a clone, and then ZFS finds the base by its guid. Without either, `zfs receive` would look for a
dataset that has the base and receive into *that*: so an incremental stream never goes to it unmarked.

ZFS shows nothing of what it receives before the END of the stream has come and its checksum agrees. A broken transfer
leaves nothing but the spool in the stage's directory, which feeds the next attempt; with resume tokens it leaves the
dataset, too, and goes on behind what has come.

**Verified** is a stage whose contents were read back: the stream is made again from what was received, with its blocks
read from the disk and their checksums checked by ZFS, and its digest compared (see `zfs_stream`). Where the target may
leave out blocks that it had already (nopwrite), or the first part came in an earlier attempt, reading is all there is.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from agent.backends import zfs_keys
from agent.backends.base import StreamOrigin
from agent.backends.zfs_layout import INCOMING, Layout, State, find
from agent.backends.zfs_send import PLAIN, Words, open_stream, reap
from agent.backends.zfs_stream import Change, Contents, Reader
from agent.disk import zfs
from agent.disk.advance import advanced
from agent.disk.durable import disk_errors, fsync_dir, make_dir, read_json, write_json
from agent.stored import typed
from agent.stream.work import Stopped
from resilver.errors import Damaged, Invalid, ResilverError

STALLED_MAX_S: Final = 600.0
_PIECE_BYTES: Final = 1 << 20
_POLL_MS: Final = 200
_CLOSE_S: Final = 10.0
_LARGE_BYTES: Final = 128 << 10
_STRONG: Final = frozenset({"sha256", "sha512", "skein", "edonr", "blake3"})


@dataclass(frozen=True, slots=True)
class Plan:
    """What a stage is of, and how far it is, as in `stage.json`. `digest` is empty where none can be compared."""

    base: str
    target: str
    native_base: str
    native_target: str
    whole: bool = False
    stream_format: str = PLAIN
    digest: str = ""
    outline: str = ""
    block_bytes_max: int = 0


class Receiver:
    """A running `zfs receive`, fed through a pipe; also used by a commit, to receive on the same pool.

    Of a stream that is not to and from the guids expected nothing is passed on.
    """

    def __init__(self, arguments: list[str], change: Change | None, expected: tuple[str, str]) -> None:
        self.reader: Final = Reader(change)
        self._closing: Final = threading.Lock()
        self._feeding: Final = threading.Lock()
        self._closed = False
        self._expected: Final = expected
        self._name: Final = arguments[-1]
        self._process: Final = subprocess.Popen(
            [zfs.command("zfs"), "receive", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=zfs.environment(),
        )
        assert self._process.stdin is not None
        self._fd: Final = self._process.stdin.fileno()
        os.set_blocking(self._fd, False)
        self._words: Final = Words(self._process.stderr)

    def feed(self, data: memoryview) -> None:
        """Takes the next bytes of the stream."""
        with self._feeding:
            for piece in self.reader.feed(data):
                self._check()
                self._write(memoryview(piece))

    def _check(self) -> None:
        begin = self.reader.begin
        if begin is not None and (begin.to_guid, begin.from_guid) != self._expected:
            said = f"{begin.from_guid or 'nothing'} to {begin.to_guid} ({begin.to_name})"
            raise Damaged("SOURCE_DAMAGED", f"the stream is from {said}, which was not asked for")

    def _write(self, piece: memoryview) -> None:
        poll = select.poll()
        if not self._closed:
            poll.register(self._fd, select.POLLOUT)
        deadline = time.monotonic() + STALLED_MAX_S
        while piece:
            if self._closed:
                raise Stopped
            if not poll.poll(_POLL_MS):
                if time.monotonic() > deadline:
                    raise Damaged("IO_ERROR", f"zfs receive {self._name} has taken nothing for {STALLED_MAX_S:.0f} s")
                continue
            try:
                piece = piece[os.write(self._fd, piece) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self._gave_up() from None
            deadline = time.monotonic() + STALLED_MAX_S

    def _gave_up(self) -> ResilverError:
        self._end_of_input()
        reap(self._process)
        said = zfs.brief(self._words.told()) or "it ended early"
        return zfs.ZfsError(f"zfs receive {self._name}", said).refused()

    def _end_of_input(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def finish(self) -> None:
        """The stream has ended: returns when ZFS has taken all of it. Damaged if it was cut short."""
        with self._feeding:
            if not self.reader.whole:
                raise Damaged("SOURCE_DAMAGED", f"the stream for {self._name} ended early")
            self._end_of_input()
        deadline = time.monotonic() + STALLED_MAX_S
        while not self._closed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_POLL_MS / 1000)
                break
            if time.monotonic() > deadline:
                raise Damaged("IO_ERROR", f"zfs receive {self._name} does not end")
        if self._closed:
            raise Stopped
        if self._process.returncode != 0:
            raise self._gave_up()

    def close(self) -> None:
        """Ends it, also in the middle. Without its pipe it ends by itself and removes what came; else it is killed."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        with self._feeding:
            self._end_of_input()
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            reap(self._process)
        self._words.told()


class ZfsStage:
    """An open stage; see `StreamStage`."""

    def __init__(self, layout: Layout, state: State, plan: Plan, *, resumed: bool) -> None:
        self.base = plan.base
        self.target = plan.target
        self.directory: Path = layout.files.stage
        self.spools = zfs_keys.may_spool(layout)
        self.resumed = resumed
        self.plan = plan
        self.layout: Final = layout
        self._base = (
            "" if not plan.base or plan.base == plan.target else find(layout, state, plan.base, "BASE_GONE").name
        )
        self._receiver: Receiver | None = None
        self._continued = False
        self._closed = False

    @property
    def received(self) -> str:
        """The snapshot that the stream makes."""
        return f"{self.layout.stage}@{INCOMING}"

    @property
    def complete(self) -> bool:
        return self.plan.whole

    def resume_token(self) -> str:
        if self.plan.whole or not zfs.features().resume or zfs.look(self.layout.stage) is None:
            return ""
        token = zfs.get(self.layout.stage, "receive_resume_token")
        return token.removeprefix("-")

    def start(self, stream_format: str, token: str = "") -> None:
        if self.base == self.target:
            raise Invalid("INVALID_FIELD", "base and target are one: nothing is to be received", field="format")
        self._end()
        if self.plan.whole:
            self.plan = replace(self.plan, whole=False, digest="")
            save_plan(self.layout, self.plan)
        can = zfs.features()
        arguments = [*(["-u"] if can.unmounted else []), *(["-s"] if can.resume else [])]
        change = None
        if token:
            self._continued = True
        else:
            self._continued = False
            drop_dataset(self.layout)
            if self._base and can.origin:
                arguments += ["-o", f"origin={self._base}"]
            elif self._base:
                change = Change(clone=True)
        self.plan = replace(self.plan, stream_format=stream_format)
        expected = (self.plan.native_target, self.plan.native_base)
        self._receiver = Receiver([*arguments, self.received], change, expected)

    def feed(self, data: memoryview) -> None:
        if self._receiver is None:
            raise Invalid("INVALID_FIELD", "the stage was not started", field="data")
        self._receiver.feed(data)

    def finish(self) -> None:
        if not self.plan.whole:
            if self._receiver is None:
                raise Invalid("INVALID_FIELD", "the stage was not started", field="data")
            self._receiver.finish()
            advanced()
            self.plan = replace(self.plan, whole=True)
            if not self._continued:
                self.plan = replace(self.plan, **asdict(self._receiver.reader.contents()))
            self._check()
            save_plan(self.layout, self.plan)
        elif self.base != self.target:
            self._check()

    def _check(self) -> None:
        """That the stage is what was asked for: the snapshot by its guid, upon the base that is meant."""
        made = zfs.look(self.received)
        if made is None or made.guid != self.plan.native_target:
            found = "nothing" if made is None else f"guid {made.guid}"
            said = f"{self.received} should have guid {self.plan.native_target}, and there is {found}"
            raise Damaged("SOURCE_DAMAGED", said)
        stage = zfs.look(self.layout.stage)
        origin = stage.origin if stage is not None else ""
        if origin != self._base:
            said = f"{self.layout.stage} became a clone of {origin or 'nothing'} instead of {self._base or 'nothing'}"
            raise Damaged("SOURCE_DAMAGED", f"{said}: another snapshot of the pool has the same guid")

    def verify(self, stop: threading.Event, on_share: Callable[[], None] | None = None) -> None:
        if self.base == self.target:
            return
        found = read_back(self._base, self.received, self.plan.stream_format, stop, on_share)
        came = Contents(self.plan.digest, self.plan.outline, self.plan.block_bytes_max)
        if self.plan.digest and not agrees(came, found, self.layout.stage, self.plan.stream_format):
            said = f"what {self.received} gives back is not what came"
            raise Damaged("READBACK_MISMATCH", f"{said}; zpool status {self.layout.pool} may say more")

    def close(self) -> None:
        self._closed = True
        self._end()

    def _end(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.close()


def read_back(
    base: str,
    target: str,
    stream_format: str,
    stop: threading.Event | None = None,
    on_share: Callable[[], None] | None = None,
) -> Contents:
    """The contents of a stream that is made again from what is on the disk.

    `zfs send` reads, and shows of that only what it gives: `on_share` is called with each piece, of 1 MiB at most. One
    that gives nothing for ten minutes has failed (`zfs_send.SILENT_MAX_S`).
    """
    stream = open_stream(base, target, stream_format)
    reader = Reader()
    buffer = memoryview(bytearray(_PIECE_BYTES))
    try:
        while got := stream.read_into(buffer):
            if stop is not None and stop.is_set():
                raise Stopped
            for _piece in reader.feed(buffer[:got]):
                pass
            if on_share is not None:
                on_share()
    finally:
        stream.close()
    if not reader.whole:
        raise Damaged("READBACK_MISMATCH", f"the stream of {target} ends early")
    return reader.contents()


def agrees(came: Contents, found: Contents, dataset: str, stream_format: str) -> bool:
    """Whether a dataset gives back what came, as far as that can be compared; all of it was read in any case.

    Blocks as they are stored are others where the dataset compresses what came uncompressed. Where other tools sent the
    base without large blocks, ZFS goes on to store those files in smaller ones than came.
    """
    if came.digest == found.digest or leaves_out(dataset):
        return True
    if stream_format == PLAIN:
        return False
    if came.outline == found.outline:
        return zfs.get(dataset, "compression") != "off"
    return came.block_bytes_max > _LARGE_BYTES


def leaves_out(dataset: str) -> bool:
    """Whether ZFS may leave out blocks that are there already: under a strong checksum and with compression."""
    return zfs.get(dataset, "checksum").split(",")[0] in _STRONG and zfs.get(dataset, "compression") != "off"


# The stage on the disk.


def open_stage(layout: Layout, state: State, base: str, target: str, origin: StreamOrigin) -> ZfsStage:
    """The stage of those two and their guids, gone on with if it is there; any other is discarded first."""
    if base != target:
        zfs_keys.check(layout, base)
    wanted = Plan(base, target, origin.native_base, origin.native_target, whole=base == target)
    found = load_plan(layout)
    if found is not None and _of(found) == _of(wanted):
        lost = found.whole and base != target and zfs.look(f"{layout.stage}@{INCOMING}") is None
        if not lost:
            return ZfsStage(layout, state, found, resumed=True)
    discard(layout)
    stage = ZfsStage(layout, state, wanted, resumed=False)
    with disk_errors(layout.files.stage):
        making = layout.files.new("stage")
        shutil.rmtree(making, ignore_errors=True)
        make_dir(making)
        write_json(making / "stage.json", _to_json(wanted))
        making.rename(layout.files.stage)
        fsync_dir(layout.root)
    return stage


def _of(plan: Plan) -> tuple[str, ...]:
    return (plan.base, plan.target, plan.native_base, plan.native_target)


def _to_json(plan: Plan) -> dict[str, object]:
    return {name: getattr(plan, name) for name in Plan.__slots__}


def save_plan(layout: Layout, plan: Plan) -> None:
    write_json(layout.files.stage / "stage.json", _to_json(plan))


def load_plan(layout: Layout) -> Plan | None:
    path = layout.files.stage / "stage.json"
    value = read_json(path)
    return None if value is None else typed(path, value, Plan)


def drop_dataset(layout: Layout) -> None:
    """Destroys what was received; a receive that is still ending is waited for."""
    try:
        if zfs.features().resume and zfs.look(layout.stage) is not None and _is_partial(layout.stage):
            zfs.patient("zfs", "receive", "-A", layout.stage)
        for one in zfs.snapshots_of(zfs.family(layout.stage), layout.stage):
            zfs.destroy(one.name)
        zfs.destroy(layout.stage)
    except zfs.ZfsError as error:
        raise error.refused() from error


def _is_partial(dataset: str) -> bool:
    return zfs.get(dataset, "receive_resume_token") != "-"


def discard(layout: Layout) -> None:
    """Removes the stage, its dataset first: without that the directory is nothing."""
    drop_dataset(layout)
    with disk_errors(layout.files.stage):
        gone = layout.files.trash("stage")
        shutil.rmtree(gone, ignore_errors=True)
        try:
            layout.files.stage.rename(gone)
        except FileNotFoundError:
            return
        fsync_dir(layout.root)
        shutil.rmtree(gone, ignore_errors=True)


def base_of(layout: Layout, state: State, base: str, native_base: str) -> None:
    """That a base is here and is the source's."""
    here = find(layout, state, base, "BASE_GONE")
    if here.guid != native_base:
        said = f"{here.name} has guid {here.guid}, and the source's snapshot {native_base}"
        raise Damaged("BASE_MISMATCH", f"{said}: they are not the same")
