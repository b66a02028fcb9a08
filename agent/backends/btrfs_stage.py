"""The stage: a subvolume that `btrfs receive` is making from a stream.

`stage/stage.json` says of which base, target and native target; the receiving goes on in `stage/in-<hex>/`, beside the
notes of what came (`btrfs_verify.py`). A receive cannot be gone on with: what another start has left is removed, and
the bytes come again, from the spool. When the stream is whole the directory becomes `stage/tree` and `received.json`
tells what is in it: only then anything believes it.

One thing is added to the stream. New files come under another name in the subvolume's own directory first, which sets
its times, and a delta in which that directory is the same does not set them back. So its last command is one that does.

`btrfs receive` takes a stream that stops between two commands for whole, and finds its parent by identity alone among
all subvolumes: so it is checked here that the end came, that the stream is from the base to the target that are meant,
and that what was taken as the parent is the base, untouched.
"""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from agent.backends import btrfs_verify
from agent.backends.base import StreamOrigin
from agent.backends.btrfs_layout import (
    SubvolumeLayout,
    fresh_dir,
    is_untouched,
    load_native,
    native_of,
    remove,
    save_native,
    touched,
    unused,
)
from agent.backends.btrfs_send import END_MAX_S, PIPE_BYTES, Words, end, environment, failed, formats
from agent.backends.btrfs_stream import END_BYTES, Attribute, Command, Kind, Parser, root_times
from agent.disk import btrfs
from agent.disk.advance import advanced
from agent.disk.durable import disk_errors, fsync_dir, make_dir, read_json, write_json
from resilver.errors import Damaged, Invalid

FINISH_MAX_S: Final = 600.0
_UTIMES: Final = int(Kind.UTIMES)


class _Receive:
    """One `btrfs receive` with what was given to it."""

    def __init__(self, stage: BtrfsStage, directory: Path) -> None:
        self._stage = stage
        self.directory = directory
        self.parser = Parser()
        self.recorder = btrfs_verify.Recorder(directory)
        self._begun = self._closed = False
        self._root_times: tuple[int, int] | None = None
        self._held = b""  # what may be the command that ends the stream
        self._busy = threading.Lock()
        self.into = directory / "tree"
        self.into.mkdir(mode=0o700)
        self._words = Words()
        try:
            self.process = subprocess.Popen(
                ["btrfs", "receive", "-q", "-E", "1", str(self.into)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._words.fd,
                env=environment(),
                bufsize=0,
            )
        except OSError as error:
            self._words.close()
            self.recorder.close()
            raise Damaged("IO_ERROR", f"btrfs cannot be started: {error.strerror}; install btrfs-progs") from error
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.process.stdin.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def feed(self, data: memoryview) -> None:
        with self._busy, disk_errors(self.directory):
            self._check_open()
            for command in self.parser.feed(data):
                command.check_paths()
                if not self._begun:
                    self._begin(command)
                self.recorder.take(command)
                if command.kind == _UTIMES and not command.path():
                    self._root_times = command.time_ns(Attribute.ATIME), command.time_ns(Attribute.MTIME)
            given = len(data) - END_BYTES
            if given < 0:
                data = memoryview(self._held + data)
                given = max(0, len(data) - END_BYTES)
            else:
                self._give(memoryview(self._held))
            self._give(data[:given])
            self._held = bytes(data[given:])

    def _give(self, data: memoryview) -> None:
        assert self.process.stdin is not None
        try:
            while data:
                data = data[self.process.stdin.write(data) or 0 :]
        except BrokenPipeError:
            self._gave_up()

    def _check_open(self) -> None:
        if self._closed:
            raise Damaged("IO_ERROR", f"{self.directory}: the stage was closed")

    def _begin(self, command: Command) -> None:
        """The first command says from where to where the stream leads."""
        if command.kind not in {Kind.SUBVOL, Kind.SNAPSHOT}:
            raise Damaged("SOURCE_DAMAGED", "the stream begins with something else than a subvolume")
        found = (
            btrfs.uuid_text(bytes(command.attributes.get(Attribute.CLONE_UUID, b""))),
            btrfs.uuid_text(bytes(command.attributes.get(Attribute.UUID, b""))),
        )
        wanted = (self._stage.native_base, self._stage.native_target)
        if found != wanted:
            said = f"leads from {found[0] or 'nothing'} to {found[1]}, not from {wanted[0] or 'nothing'} to {wanted[1]}"
            raise Damaged("SOURCE_DAMAGED", f"the stream {said}")
        self._begun = True

    def _gave_up(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_MAX_S)
        raise failed(f"btrfs receive ended with {self.process.returncode}", self._words.read(), self.directory)

    def finish(self) -> None:
        """The whole stream was given: returns when it is taken."""
        with self._busy, disk_errors(self.directory):
            self._check_open()
            if not self.parser.whole:
                raise Damaged("SOURCE_DAMAGED", "the stream ends before its end")
            times = self._root_times or self._stage.base_times()
            self._give(memoryview((root_times(*times) if times is not None else b"") + self._held))
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                code = self.process.wait(FINISH_MAX_S)
            except subprocess.TimeoutExpired:
                raise Damaged("IO_ERROR", f"{self.directory}: btrfs receive does not end") from None
            if code:
                self._gave_up()
            self.recorder.finish()

    def close(self) -> None:
        """Kills rather than hangs up: to the child, the end of its input is the end of the stream. From any thread."""
        end(self.process)
        with self._busy:
            self._closed = True
            assert self.process.stdin is not None
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            self.recorder.close()
            self._words.close()


class BtrfsStage:
    """An open stage; used from one thread, but for `close`."""

    spools = True

    def __init__(self, layout: SubvolumeLayout, base: str, target: str, origin: StreamOrigin, *, resumed: bool) -> None:
        self.base, self.target = base, target
        self.native_base, self.native_target = origin.native_base, origin.native_target
        self.directory = layout.stage
        self.resumed = resumed
        self._layout = layout
        self._receive: _Receive | None = None
        self._closing = threading.Lock()

    @property
    def complete(self) -> bool:
        with disk_errors(self.directory):
            return is_received(self._layout)

    def resume_token(self) -> str:
        return ""

    def start(self, stream_format: str, token: str = "") -> None:
        if stream_format not in formats() or token:
            raise Invalid(
                "INVALID_FIELD",
                f"no stream format {stream_format!r} here, but {', '.join(formats())}, from the first byte",
                field="format",
            )
        self._end()
        with disk_errors(self.directory):
            sweep(self._layout, self._layout.stage)
            directory = self.directory / unused("in-")
            directory.mkdir(mode=0o700)
            made = _Receive(self, directory)
        with self._closing:
            self._receive = made

    def feed(self, data: memoryview) -> None:
        if self._receive is None:
            raise Damaged("IO_ERROR", f"{self.directory}: the stage is closed")
        self._receive.feed(data)

    def finish(self) -> None:
        if self.complete:
            return
        if self._receive is None:
            raise Damaged("IO_ERROR", f"{self.directory}: nothing was received")
        self._receive.finish()
        advanced()  # what follows syncs the file system
        with disk_errors(self.directory):
            self._keep(self._receive)

    def _keep(self, receive: _Receive) -> None:
        made = [entry for entry in receive.into.iterdir() if btrfs.is_subvolume(entry)]
        if len(made) != 1:
            raise Damaged("SOURCE_DAMAGED", f"the stream became {len(made)} subvolumes, not one")
        data = receive.into / "data"
        if made[0] != data:
            made[0].rename(data)  # within one directory a read-only subvolume may be renamed
        found = btrfs.info(data)
        if found.native_id != self.native_target or not found.read_only:
            raise Damaged("SOURCE_DAMAGED", f"{data} became {found.native_id}, not {self.native_target}")
        self._check_parent(found)
        btrfs.sync(data)
        for name in ("runs", "places"):
            (receive.directory / name).rename(self.directory / name)
        receive.into.rename(self._layout.tree)
        remove(receive.directory)
        fsync_dir(self.directory)
        save_native(self._layout.received, native_of(self._layout.tree / "data", time.time_ns()))

    def base_times(self) -> tuple[int, int] | None:
        """When the base's own directory was read and changed last; its name is not known where it is another tool's."""
        for path, _info in self._bases():
            stat = path.lstat()
            return stat.st_atime_ns, stat.st_mtime_ns
        return None

    def _bases(self) -> list[tuple[Path, btrfs.Info]]:
        """What is the base here, untouched: all of its name that came by the same receive, ours first.

        Where one receive is told from another there may be others of that name, with other contents: snapshots of a
        subvolume that was received and made writable were all called what that one had been.
        """
        if not self.native_base:
            return []
        mounts = btrfs.mounts_of(self.directory)
        named = [one for one in btrfs.subvolumes(self.directory) if one.info.native_id == self.native_base]
        found = [(path, one.info) for one in named if (path := btrfs.reach(one, mounts)) is not None]
        ours = self._layout.data(self.base)
        if btrfs.is_subvolume(ours):
            mine = btrfs.info(ours)
            same = [(path, info) for path, info in found if info.rtransid == mine.rtransid]
            found = [(ours, mine), *(each for each in same if each[1].uuid != mine.uuid)]
        whole = [(path, info) for path, info in found if is_untouched(self._layout, self.base, path, info)]
        return whole if len({info.rtransid for _path, info in whole}) == 1 else []

    def _check_parent(self, found: btrfs.Info) -> None:
        """That what was taken as the parent is the base, untouched: there may be several of its name."""
        if not self.native_base or found.parent_uuid in {info.uuid for _path, info in self._bases()}:
            return
        raise Damaged(
            "BASE_MISMATCH",
            f"btrfs receive took another subvolume for {self.native_base} ({found.parent_uuid}), which is not the base "
            "or was changed since it came; delete that one, or clear what it says it was received from",
        )

    def verify(self, stop: threading.Event, on_share: Callable[[], None] | None = None) -> None:
        if not is_received(self._layout):
            raise Damaged("IO_ERROR", f"{self.directory}: nothing was received")
        with disk_errors(self.directory):
            btrfs_verify.verify(self._layout.tree / "data", self.directory, stop, on_share)

    def _end(self) -> None:
        with self._closing:
            receive, self._receive = self._receive, None
        if receive is not None:
            receive.close()

    def close(self) -> None:
        self._end()


def is_received(layout: SubvolumeLayout) -> bool:
    """Whether the stage holds a whole target."""
    native = load_native(layout.received)
    return native is not None and not touched(layout.tree / "data", native)


def sweep(layout: SubvolumeLayout, stage: Path) -> None:
    """Removes what was being received, or was received: all but what a transfer keeps there."""
    layout.received.unlink(missing_ok=True)
    for entry in sorted(stage.iterdir()):
        if entry.name.startswith("in-") or entry.name in {"tree", "runs", "places"}:
            remove(entry)


def open_stage(layout: SubvolumeLayout, base: str, target: str, origin: StreamOrigin) -> BtrfsStage:
    """The stage of that pair, gone on with if it is there; any other is discarded first."""
    wanted = {"base": base, "target": target, "native_base": origin.native_base, "native_target": origin.native_target}
    whole = read_json(layout.stage / "stage.json") == wanted
    if not whole:
        discard(layout)
        with disk_errors(layout.stage):
            making = fresh_dir(layout.new("stage"))
            make_dir(making)
            write_json(making / "stage.json", wanted)
            making.rename(layout.stage)
            fsync_dir(layout.root)
    return BtrfsStage(layout, base, target, origin, resumed=whole)


def discard(layout: SubvolumeLayout) -> None:
    """Removes the stage, in one step as far as anybody can see."""
    with disk_errors(layout.stage):
        gone = layout.trash("stage")
        remove(gone)
        try:
            layout.stage.rename(gone)
        except FileNotFoundError:
            return
        fsync_dir(layout.root)
        remove(gone)
