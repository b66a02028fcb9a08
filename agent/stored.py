"""Values out of files, as the classes that they were.

Whoever can write to a disk can make a digest match, and disks are carried from machine to machine. So what stands in a
file is checked like what comes over the wire (`resilver/fields.py`): every field has its type, numbers are below 2^63
and not negative, a CP is written `3-42`, what is an id or a name has the form of one, because it becomes a path. What
does not fit is `Damaged("IO_ERROR")` that names the file and the field; nothing is guessed, and nothing changed.

A field that a newer version added is passed over.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from resilver.errors import Damaged, Invalid
from resilver.fields import NUMBER_MAX, check_id, check_name
from resilver.lineage import ConsistencyPoint

T = TypeVar("T")

TEXT_CHARS_MAX: Final = 64 << 10
DEPTH_MAX: Final = 16
_CPS: Final = frozenset({"cp", "newest_cp"})
_IDS: Final = frozenset(
    {
        "base", "based_on", "epoch_id", "group_id", "id", "keeps", "leader_id", "live_pid", "new_tip", "newest_id",
        "old_tip", "parent", "resync_id", "secret", "spare_of", "store_id", "target", "ticket", "tip", "volume_id",
    }
)  # fmt: skip
_NAMES: Final = frozenset({"cluster", "members", "node", "primary", "target_node", "volume"})
_SIGNED: Final = frozenset({"priority", "resync_priority"})


def typed(path: Path | str, value: Any, kind: type[T]) -> T:
    """The value that stood in a file as what it is; Damaged("IO_ERROR") if it is none."""
    with understood(path):
        return msgspec.convert(checked(value), kind)


@contextlib.contextmanager
def understood(path: Path | str) -> Iterator[None]:
    """Around what takes a file's value apart: whatever of it is not as it should be is damage of that file."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError, Invalid) as error:
        why = f"{type(error).__name__} {error}" if isinstance(error, LookupError) else str(error)
        raise Damaged("IO_ERROR", f"{path} is damaged: {why[:500]}", path=str(path)) from error


def checked(value: Any, field: str = "", depth: int = 0) -> Any:
    """The same with each `cp` read; ValueError or Invalid for what no file of ours holds."""
    if depth > DEPTH_MAX:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict):
        return {key: checked(each, key, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [checked(each, field, depth + 1) for each in value]
    if isinstance(value, str):
        return _text(value, field)
    if isinstance(value, bool) or value is None:
        return value
    if not isinstance(value, int | float):
        raise TypeError(f"{field} is a {type(value).__name__}")
    least = -NUMBER_MAX if field in _SIGNED else 0
    if not least <= value <= NUMBER_MAX:  # refuses what is no number in floating point, too
        raise ValueError(f"{field} is {value}, which is no number that it can be")
    return value


def _text(value: str, field: str) -> Any:
    if field in _CPS:
        cp = ConsistencyPoint.parse(value)
        if max(cp.epoch, cp.sequence) > NUMBER_MAX:
            raise ValueError(f"{field} is {value}, which is beyond every CP")
        return cp
    if len(value) > TEXT_CHARS_MAX or "\0" in value:
        raise ValueError(f"{field} is too long, or holds a NUL character")
    if value and field in _IDS:
        check_id(value, field)
    elif value and field in _NAMES:
        check_name(value, field)
    else:
        return value
    # One of a volume's ids stands in half a dozen of its files, and a node may have 10,000 volumes.
    return sys.intern(value)
