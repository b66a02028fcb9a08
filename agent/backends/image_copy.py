"""How an image's bytes are duplicated and compared, by shared extents where the file system has them, else by reading.

With shared extents (XFS, Btrfs, bcachefs, newer ZFS) a duplicate is a clone, and two files are compared by their
extent maps. Elsewhere a duplicate is a sparse copy with a table of block digests beside it. Every file that is made
here is 0600 and carries the hint that keeps XFS from holding 32 blocks for each scattered write.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from agent.backends.image_layout import Layout, load_stored
from agent.delta import DeltaMap
from agent.disk import contents, extents, ioctl
from agent.disk.durable import DIR_MODE, FILE_MODE, disk_errors
from agent.disk.inuse import Lease
from agent.disk.unfinished import unfinished
from resilver.errors import Invalid, Refused

NO_MAPS: Final = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL})
_CANNOT_SHARE: Final = frozenset(
    {*NO_MAPS, errno.EXDEV, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EISDIR, errno.ENOENT}
)
_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.EPERM, errno.EACCES})


def _never() -> None:
    return None


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor for the length of a block."""
    fd = os.open(path, flags | os.O_CLOEXEC, FILE_MODE)
    try:
        yield fd
    finally:
        os.close(fd)


def create(path: Path) -> int:
    """Makes a private file that must not be there yet; its descriptor, open for both."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        hint(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def hint(fd: int) -> None:
    """Asks XFS to hold one block for each block that is written into a clone. Not being allowed to is no error."""
    with contextlib.suppress(OSError):
        ioctl.set_cow_extent_hint(fd, os.fstatvfs(fd).f_bsize)


def fresh_dir(path: Path) -> Path:
    """Makes an empty private directory; what an earlier attempt has left of it goes first."""
    remove_tree(path)
    path.mkdir(mode=DIR_MODE)
    return path


def remove_tree(path: Path) -> None:
    """Removes a file or a directory with all that is in it; one that is not there is no error."""
    try:
        if path.is_dir() and not path.is_symlink():
            for entry in path.iterdir():
                remove_tree(entry)
            path.rmdir()
        else:
            path.unlink()
    except FileNotFoundError:
        return


class Copier:
    """Duplicates and compares files of one replica."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._probed: dict[int, bool] = {}

    @property
    def reflink(self) -> bool:
        """Whether files can share extents there; found by trying, once for each file system."""
        place = self._layout.root if self._layout.root.is_dir() else self._layout.live.parent
        try:
            device = place.stat().st_dev
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return False
        if device not in self._probed:
            self._probed[device] = _can_share(place)
        return self._probed[device]

    def duplicate(self, source_fd: int, directory: Path, *, check: Callable[[], None] = _never) -> str:
        """Makes `data` (and `table`) in a directory, on the disk when this returns; answers the table's digest."""
        with opened(directory / "data", os.O_RDWR | os.O_CREAT | os.O_EXCL) as target_fd:
            hint(target_fd)
            if self.reflink:
                ioctl.copy_nocow(source_fd, target_fd)
                ioctl.clone(target_fd, source_fd)
                os.fsync(target_fd)
                return ""
            with opened(directory / "table", os.O_RDWR | os.O_CREAT | os.O_EXCL) as table_fd:
                digest = contents.copy(source_fd, target_fd, table_fd, check=check)
                os.fsync(table_fd)
            os.fsync(target_fd)
            return digest

    def fill(self, source_fd: int, target_fd: int, table: Path | None) -> str:
        """As `duplicate`, into a file that is there and need not be empty; a table only if asked for."""
        if self.reflink:
            _share(source_fd, target_fd)
            return ""
        os.ftruncate(target_fd, 0)
        if table is None:
            return contents.copy(source_fd, target_fd, None)
        table.unlink(missing_ok=True)
        with opened(table, os.O_RDWR | os.O_CREAT | os.O_EXCL) as table_fd:
            digest = contents.copy(source_fd, target_fd, table_fd)
            os.fsync(table_fd)
        return digest

    def delta(self, base: Path | None, target: Path) -> DeltaMap:
        """What differs between the snapshots in two directories; without a base, what is allocated in the target."""
        with contextlib.ExitStack() as stack:
            target_fd = _open_data(stack, target, "TARGET_GONE")
            base_fd = _open_data(stack, base, "BASE_GONE") if base is not None else None
            if self.reflink:
                return differing(base_fd, target_fd)
            tables = _open_tables(stack, base, target)
            if tables is None:
                return _by_contents(base_fd, target_fd)
            size = os.fstat(target_fd).st_size
            return extents.collect(size, contents.table_changes(tables[0], tables[1], size))

    def live_equals(self, lease: Lease, snapshot: Path) -> bool:
        """Whether a file under a lease has the bytes of a snapshot. InUseError if somebody comes to wait for it."""
        with contextlib.ExitStack() as stack:
            data_fd = _open_data(stack, snapshot, "BASE_GONE")
            same_size = os.fstat(lease.fd).st_size == os.fstat(data_fd).st_size
            equal = same_size and self._equal(lease, data_fd, snapshot)
        lease.check()
        return equal

    def _equal(self, lease: Lease, data_fd: int, snapshot: Path) -> bool:
        if self.reflink:
            os.fsync(lease.fd)
            return not len(differing(data_fd, lease.fd, check=lease.check, all_of_it=False))
        if load_stored(snapshot).table:
            with opened(snapshot / "table") as table_fd:
                return contents.equals_table(lease.fd, table_fd, check=lease.check)
        return not len(_by_contents(data_fd, lease.fd, check=lease.check, all_of_it=False))

    def differences(self, lease: Lease, snapshot: Path) -> DeltaMap | None:
        """All in which a file under a lease differs from a snapshot, in one pass: `live_equals` and `own_bytes` at the
        cost of one of them. None where that would mean reading all of it. InUseError if somebody comes to wait for it.
        """
        if not self.reflink or not (snapshot / "data").exists():
            return None
        with opened(snapshot / "data") as data_fd:
            os.fsync(lease.fd)
            found = differing(data_fd, lease.fd, check=lease.check)
        lease.check()
        return found

    def own_bytes(self, fd: int, snapshot: Path | None, *, check: Callable[[], None] = _never) -> int | None:
        """How many bytes of a file the snapshot does not share; None where that would mean reading all of it."""
        if not self.reflink or snapshot is None or not (snapshot / "data").exists():
            return None
        with opened(snapshot / "data") as data_fd:
            os.fsync(fd)
            return differing(data_fd, fd, check=check).data_bytes


def _share(source_fd: int, target_fd: int) -> None:
    """Clones over what a file holds: extents that both have already cost nothing. Truncated first, or a tail stays."""
    size = os.fstat(source_fd).st_size
    try:
        if os.fstat(target_fd).st_size:
            os.ftruncate(target_fd, size)
            ioctl.clone(target_fd, source_fd)
            return
    except OSError as error:
        if error.errno != errno.EINVAL:  # Btrfs: only one of the two is "no copy on write", which wants an empty file
            raise
    os.ftruncate(target_fd, 0)
    ioctl.copy_nocow(source_fd, target_fd)
    os.ftruncate(target_fd, size)
    ioctl.clone(target_fd, source_fd)


def _open_data(stack: contextlib.ExitStack, directory: Path, gone: str) -> int:
    try:
        return stack.enter_context(opened(directory / "data"))
    except (FileNotFoundError, NotADirectoryError):
        raise Refused(gone, f"the data of snapshot {directory.name} is not on this node") from None


def _open_tables(
    stack: contextlib.ExitStack, base: Path | None, target: Path
) -> tuple[contents.Table | None, contents.Table] | None:
    """The tables of both, None if one of them has none (it came from a file system that shares extents)."""
    digests = [load_stored(directory).table if directory is not None else "" for directory in (base, target)]
    if not digests[1] or (base is not None and not digests[0]):
        return None
    old = contents.Table(stack.enter_context(opened(base / "table")), digests[0]) if base is not None else None
    return old, contents.Table(stack.enter_context(opened(target / "table")), digests[1])


def differing(
    base_fd: int | None, target_fd: int, *, check: Callable[[], None] = _never, all_of_it: bool = True
) -> DeltaMap:
    """By extent maps; by contents where a file system that shares extents tells no maps.

    Without `all_of_it` it ends at the first difference.
    """
    size = os.fstat(target_fd).st_size
    try:
        found = extents.changes(base_fd, target_fd, check=check)
        return extents.collect(size, found if all_of_it else itertools.islice(found, 1))
    except OSError as error:
        if error.errno not in NO_MAPS:
            raise
    return _by_contents(base_fd, target_fd, check=check, all_of_it=all_of_it)


def _by_contents(
    base_fd: int | None, target_fd: int, *, check: Callable[[], None] = _never, all_of_it: bool = True
) -> DeltaMap:
    size = os.fstat(target_fd).st_size
    found = contents.compare(base_fd, target_fd, 0, size, check=check)
    rows = (
        (np.array([at], np.int64), np.array([run], np.int64), np.array([zero], np.bool_)) for at, run, zero in found
    )
    return extents.collect(size, rows if all_of_it else itertools.islice(rows, 1))


def _can_share(place: Path) -> bool:
    """Clones one unnamed empty file onto another. Where there is no room even for those, the file system is asked."""
    flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
    try:
        with opened(place, flags) as one, opened(place, flags) as other:
            ioctl.clone(one, other)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
            return _says_it_shares(place)
        if error.errno not in _CANNOT_SHARE:
            raise  # a disk that fails has not answered, and the answer would stand as long as the agent runs
        return False
    return True


def _says_it_shares(place: Path) -> bool:
    magic = ioctl.fs_magic(place)
    if magic != ioctl.XFS_MAGIC:
        return magic == ioctl.BTRFS_MAGIC
    with opened(place, os.O_DIRECTORY) as fd:
        return ioctl.xfs_shares(fd)


def copy_attributes(source_fd: int, target_fd: int) -> None:
    """Owner, mode, ACL and extended attributes, exactly: what the target had besides goes."""
    stat = os.fstat(source_fd)
    mine = os.fstat(target_fd)
    if (mine.st_uid, mine.st_gid) != (stat.st_uid, stat.st_gid):
        os.fchown(target_fd, stat.st_uid, stat.st_gid)
    os.fchmod(target_fd, stat.st_mode & 0o7777)
    wanted = set(_attributes(source_fd))
    for name in _attributes(target_fd):
        if name not in wanted:
            _tolerated(os.removexattr, target_fd, name)
    for name in wanted:
        _tolerated(os.setxattr, target_fd, name, os.getxattr(source_fd, name))


def _attributes(fd: int) -> list[str]:
    try:
        return os.listxattr(fd)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise


def _tolerated(call: Callable[..., None], fd: int, name: str, *rest: bytes) -> None:
    """Labels that only the security module may set are left to it; everything else must succeed."""
    try:
        call(fd, name, *rest)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not name.startswith(("security.", "trusted.")):
            raise


def export_file(source: Path, target: Path, *, writable: bool) -> int:
    """Copies a file to a new name, anywhere: cloned where that works, else sparsely; whole or not at all."""
    if os.path.lexists(target):
        raise Invalid("INVALID_FIELD", f"{target} is there already; name a path that is not", field="path")
    if not target.parent.is_dir():
        raise Invalid("INVALID_FIELD", f"{target.parent} is no directory; create it first", field="path")
    with disk_errors(target):
        with unfinished(target, _make_file, remove_tree) as (temporary, _lock):
            with opened(source) as source_fd, opened(temporary, os.O_RDWR | os.O_NOFOLLOW) as target_fd:
                try:
                    ioctl.copy_nocow(source_fd, target_fd)
                    ioctl.clone(target_fd, source_fd)
                except OSError as error:
                    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO}:
                        raise
                    contents.copy(source_fd, target_fd, None)
                os.fchmod(target_fd, FILE_MODE if writable else FILE_MODE & ~0o222)
                os.fsync(target_fd)
                size = os.fstat(target_fd).st_size
            ioctl.rename_new(temporary, target)
        with opened(target.parent, os.O_DIRECTORY) as parent_fd:
            os.fsync(parent_fd)
    return size


def _make_file(path: Path) -> None:
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL):
        pass
