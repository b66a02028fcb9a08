"""What is part of nothing any more, and cannot be removed now: it is passed over, told, and removed later.

A replica that can be read is not lost because something beside it stays:

* A subvolume that is being sent the kernel does not remove (EPERM): what was let go in the middle of a transfer, or
  what `resilver inspect` compares by. That ends by itself, and is not told.
* One that holds another subvolume (NOT_SUPPORTED), or any on a file system that is read-only by now (EROFS), is told as
  a problem until it is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent.backends.btrfs_layout import remove
from resilver.errors import Damaged, Refused, ResilverError

TOLD_MAX: Final = 4
_ENDS: Final = frozenset({errno.EPERM, errno.EBUSY})


class Debris:
    """What is left of one replica's debris, and why, since its backend was made."""

    def __init__(self) -> None:
        self._left: dict[Path, str] = {}

    def remove(self, path: Path) -> None:
        """As `btrfs_layout.remove`, but for what is to be passed over."""
        with self.passed_over(path):
            remove(path)

    @contextlib.contextmanager
    def passed_over(self, path: Path) -> Iterator[None]:
        """Around what removes debris, or moves it away. Any other error of the disk is raised."""
        why = ""
        try:
            yield
        except (OSError, ResilverError) as error:
            found = _why(path, error)
            if found is None:
                raise
            why = found
        # Another one in its place: who looks in another thread goes through the one that he has.
        left = {one: said for one, said in self._left.items() if one != path and os.path.lexists(one)}
        self._left = {**left, path: why} if why else left

    def problems(self) -> tuple[str, ...]:
        """What an operator should know of; the first few, and how many more there are."""
        told = [said for path, said in self._left.items() if os.path.lexists(path)]
        more = len(told) - TOLD_MAX
        return (
            *told[:TOLD_MAX],
            *((f"{more:,} more things that are left over cannot be removed",) if more > 0 else ()),
        )


def _why(path: Path, error: BaseException) -> str | None:
    """Why something is left over, empty if that ends by itself; None for an error that is not passed over."""
    if isinstance(error, Damaged) and isinstance(error.__cause__, OSError):
        error = error.__cause__  # which `disk_errors` has turned into one of ours
    if isinstance(error, Refused) and error.reason == "NOT_SUPPORTED":
        return error.message
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"{path} is left over, and cannot be removed: {os.strerror(errno.EROFS).lower()}"
    return "" if isinstance(error, OSError) and error.errno in _ENDS else None
