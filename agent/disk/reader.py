"""An open file or device that is read in pieces from several threads, as a delta names them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from agent.delta import DeltaRange
from agent.disk import contents
from agent.disk.durable import disk_errors


class FileReader:
    """A `SnapshotReader` of what is at `node`, else at `path`. `size_bytes`: of a device, whose status says 0.

    OSError if it cannot be opened; later errors name `path`.
    """

    def __init__(self, path: Path, node: Path | None = None, size_bytes: int | None = None) -> None:
        self._path = path
        # What stands in our own directories is what it is called, and no link to anything else.
        self._fd = os.open(node or path, os.O_RDONLY | os.O_CLOEXEC | (0 if node else os.O_NOFOLLOW))
        self.size_bytes = os.fstat(self._fd).st_size if size_bytes is None else size_bytes
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def read_into(self, offset: int, view: memoryview) -> None:
        with disk_errors(self._path):
            contents.read_exactly(self._fd, offset, view)

    def announce(self, ranges: Sequence[DeltaRange]) -> None:
        contents.announce(self._fd, ranges)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
