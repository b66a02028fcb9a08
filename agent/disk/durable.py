"""Small files that survive a crash: JSON values, an append-only log, and the syncing of directories.

* `write_json` replaces a file in one step: a private temporary file beside it, fsync, rename, fsync of the directory.
  A crash leaves the old value or the new one. One writer at a time for each path.
* Every file names its format and carries a BLAKE3 digest of its value, so that a damaged one is told from an old one:
  `read_json` raises `Damaged("IO_ERROR")` with the path, and answers None only if there is no file.
* `append_log` adds one checksummed line and returns when it is on the disk. Only the last line can be torn, by a
  crash during its own append: it is ignored, and cut off by the next append. A bad line before it is damage. What would
  make a log too long to be read is refused. `rewrite_log` replaces all of it as `write_json` does a value.

Files are made 0600 and directories 0700: what stands in them concerns other people's disks. None of them is followed if
it is a symbolic link, for reading or for writing: its place is where it is looked for, and nowhere else. What is not a
plain file, or is larger than a bound, is `Damaged` without being read. A digest tells chance from intent no better than
any checksum: what a value means is checked by whoever reads it (`agent/stored.py`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import blake3

from resilver.errors import Damaged, Refused, ResilverError

Json = dict[str, Any]

FORMAT: Final = 1
FILE_MODE: Final = 0o600
DIR_MODE: Final = 0o700
VALUE_BYTES_MAX: Final = 32 << 20
LOG_BYTES_MAX: Final = 256 << 20
LOG_RESERVE_BYTES: Final = 16 << 20
"""What is left for those who make a log shorter."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
OF_THE_DISK: Final = _FULL | {errno.EIO, errno.EROFS, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.EUCLEAN}
"""Errors that only a disk or its file system gives."""


def disk_error(error: OSError, path: Path | str) -> ResilverError:
    """What an OSError from the disk is to the rest of the program: NO_SPACE or IO_ERROR, with the path."""
    what = error.strerror or str(error)
    if error.errno in _FULL:
        return Refused("NO_SPACE", f"{path}: {what.lower()}; free some space there and try again", path=str(path))
    return Damaged("IO_ERROR", f"{path}: {what}", path=str(path))


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turns an OSError raised inside into `disk_error`; the path of the error itself goes first."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, error.filename or path) from error


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a plain file of ours; FileNotFoundError, or Damaged for a link or whatever else stands there."""
    try:
        # Without O_NONBLOCK a pipe of that name would hold us up.
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, FILE_MODE)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            raise _no_file(path) from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _no_file(path)
    return fd


def read_own(path: Path, bytes_max: int) -> bytes:
    """What a plain file of ours holds; Damaged if it is larger than the bound."""
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        # By the size first, so that a large one costs nothing; by what came, because it may be growing.
        raw = file.read(bytes_max + 1) if size <= bytes_max else b""
    if size > bytes_max or len(raw) > bytes_max:
        raise Damaged("IO_ERROR", f"{path} is damaged: it is larger than {bytes_max:,} bytes", path=str(path))
    return raw


def _no_file(path: Path) -> Damaged:
    said = f"{path} is no plain file: links and devices are not followed here; put back what stood there"
    return Damaged("IO_ERROR", said, path=str(path))


def fsync_dir(path: Path) -> None:
    """Returns when the names in a directory are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dir(path: Path) -> None:
    """Makes a directory and its missing parents, private, each on the disk before the next."""
    if path.is_dir():
        return
    make_dir(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=DIR_MODE)
    fsync_dir(path.parent)


def make_own_dir(path: Path) -> None:
    """As `make_dir`, for a directory that others must not have put elsewhere: Damaged if it is a symbolic link."""
    if path.is_symlink():
        raise Damaged("IO_ERROR", f"{path} is a symbolic link: put back the directory that stood there", path=str(path))
    make_dir(path)


def write_json(path: Path, value: Json) -> None:
    """Replaces a file by a value, atomically and durably. NO_SPACE or IO_ERROR leave the old file as it was."""
    _replace(path, (sealed(value),))


def _replace(path: Path, parts: Iterable[bytes]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            fd = open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            with os.fdopen(fd, "wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        fsync_dir(path.parent)


def sealed(value: Json) -> bytes:
    """A value as its file holds it."""
    body = {"format": FORMAT, "blake3": _digest(value), "value": value}
    return json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"


def sealed_line(value: Json) -> bytes:
    """A value as a line of a log."""
    return json.dumps({"format": FORMAT, "blake3": _digest(value), "value": value}, sort_keys=True).encode() + b"\n"


def read_json(path: Path) -> Json | None:
    """The value in a file, None if there is no such file; `Damaged("IO_ERROR")` if it cannot be trusted."""
    with disk_errors(path):
        try:
            raw = read_own(path, VALUE_BYTES_MAX)
        except (FileNotFoundError, NotADirectoryError):
            return None
    value = _checked(raw)
    if value is None:
        raise Damaged("IO_ERROR", f"{path} is damaged: its content does not match its digest", path=str(path))
    return value


def remove_file(path: Path) -> None:
    """Removes a file durably; one that is not there is no error."""
    with disk_errors(path):
        try:
            path.unlink()
        except FileNotFoundError:
            return
        fsync_dir(path.parent)


def append_log(
    path: Path, value: Json, *, bytes_max: int = LOG_BYTES_MAX - LOG_RESERVE_BYTES, advice: str = ""
) -> None:
    """Adds a value to a log and returns when it is on the disk; a torn last line is cut off first.

    NO_SPACE with the advice, and nothing is changed, if the log would be larger than `bytes_max`.
    """
    line = sealed_line(value)
    with disk_errors(path):
        fd = open_own(path, os.O_RDWR | os.O_CREAT)
        try:
            end = _sound_length(fd, path)
            if end + len(line) > bytes_max:
                raise Refused("NO_SPACE", f"{path} would be larger than {bytes_max:,} bytes{advice}", path=str(path))
            os.ftruncate(fd, end)
            try:
                _write_at(fd, end, line)
                os.fsync(fd)
            except OSError:
                # What could not be synced counts as clean to the kernel: it must not be taken for a line to build on.
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, end)
                raise
        finally:
            os.close(fd)
        fsync_dir(path.parent)


def rewrite_log(path: Path, values: Iterable[Json]) -> None:
    """Replaces a log by one of these values, atomically and durably. NO_SPACE or IO_ERROR leave the old one, or if it
    was the directory's sync that failed the new one: each is whole.
    """
    _replace(path, map(sealed_line, values))


def read_log(path: Path) -> list[Json]:
    """The values in a log, oldest first; empty if there is no file. `Damaged("IO_ERROR")` for a bad line within."""
    with disk_errors(path):
        try:
            raw = read_own(path, LOG_BYTES_MAX)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [value for value, _end in _lines(raw, path)]


def _write_at(fd: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _lines(raw: bytes, path: Path) -> Iterator[tuple[Json, int]]:
    """Each sound line's value and where it ends; a bad last line ends the log."""
    start = 0
    while start < len(raw):
        newline = raw.find(b"\n", start)
        end = len(raw) if newline < 0 else newline + 1
        value = _checked(raw[start:end]) if newline >= 0 else None
        if value is None:
            if end == len(raw):
                return
            raise Damaged("IO_ERROR", f"{path} is damaged at byte {start}", path=str(path))
        yield value, end
        start = end


def _sound_length(fd: int, path: Path) -> int:
    """Where the next line is to stand. The whole log is read: an append is rare, and must not hide damage."""
    with os.fdopen(os.dup(fd), "rb") as file:
        return max((end for _value, end in _lines(file.read(), path)), default=0)


def _checked(raw: bytes) -> Json | None:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, dict) or body.get("format") != FORMAT or not isinstance(body.get("value"), dict):
        return None
    value: Json = body["value"]
    try:
        return value if body.get("blake3") == _digest(value) else None
    except (ValueError, RecursionError):  # a number of thousands of digits, or nested too deeply to be written
        return None


def _digest(value: Json) -> str:
    return blake3.blake3(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
