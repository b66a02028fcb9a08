"""Checks of single fields that came over the wire, and the tables of the enums.

Every check answers the value it was given or raises `Invalid("INVALID_FIELD", field=...)`. Names and ids become paths
and keys, so they are checked by pattern; a number stays below 2^63, so that it fits a file offset and can still grow.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING, Final, TypeVar

from resilver.errors import Invalid
from resilver.lineage import Consistency, Origin
from resilver.v1 import volume_pb2
from resilver.volume import LiveState, Presence, ResyncState

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from google.protobuf.message import Message

ID_CHARS_MAX: Final = 127
NOTE_CHARS_MAX: Final = 1024
TEXT_CHARS_MAX: Final = 2048
PATH_CHARS_MAX: Final = 4096
NUMBER_MAX: Final = 2**63 - 1
CP_NUMBER_MAX: Final = 2**62 - 1
"""An epoch or a sequence: below every other number, so that the next one is still a number."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,126}")
_REASON = re.compile(r"[A-Z][A-Z0-9_]{0,62}")

E = TypeVar("E", bound=Enum)

LIVE_STATES: Final = {
    LiveState.UNMODIFIED: volume_pb2.LIVE_STATE_UNMODIFIED,
    LiveState.MODIFIED: volume_pb2.LIVE_STATE_MODIFIED,
    LiveState.UNKNOWN: volume_pb2.LIVE_STATE_UNKNOWN,
    LiveState.ABSENT: volume_pb2.LIVE_STATE_ABSENT,
}
PRESENCES: Final = {
    Presence.PRESENT: volume_pb2.PRESENCE_PRESENT,
    Presence.EMPTY: volume_pb2.PRESENCE_EMPTY,
    Presence.LOST: volume_pb2.PRESENCE_LOST,
}
CONSISTENCIES: Final = {
    Consistency.CRASH: volume_pb2.CONSISTENCY_CRASH,
    Consistency.SYNCED: volume_pb2.CONSISTENCY_SYNCED,
    Consistency.FROZEN: volume_pb2.CONSISTENCY_FROZEN,
    Consistency.CLOSED: volume_pb2.CONSISTENCY_CLOSED,
}
ORIGINS: Final = {
    Origin.RESILVER: volume_pb2.ORIGIN_RESILVER,
    Origin.ADOPTED: volume_pb2.ORIGIN_ADOPTED,
    Origin.PRESERVED: volume_pb2.ORIGIN_PRESERVED,
}
RESYNC_STATES: Final = {
    ResyncState.QUEUED: volume_pb2.RESYNC_STATE_QUEUED,
    ResyncState.PREPARING: volume_pb2.RESYNC_STATE_PREPARING,
    ResyncState.TRANSFERRING: volume_pb2.RESYNC_STATE_TRANSFERRING,
    ResyncState.VERIFYING: volume_pb2.RESYNC_STATE_VERIFYING,
    ResyncState.COMMITTING: volume_pb2.RESYNC_STATE_COMMITTING,
    ResyncState.SUCCEEDED: volume_pb2.RESYNC_STATE_SUCCEEDED,
    ResyncState.FAILED: volume_pb2.RESYNC_STATE_FAILED,
    ResyncState.CANCELLED: volume_pb2.RESYNC_STATE_CANCELLED,
    ResyncState.BLOCKED: volume_pb2.RESYNC_STATE_BLOCKED,
}
LIVE_BY_VALUE: Final[dict[int, LiveState]] = {wire: state for state, wire in LIVE_STATES.items()}
PRESENCE_BY_VALUE: Final[dict[int, Presence]] = {wire: presence for presence, wire in PRESENCES.items()}
CONSISTENCY_BY_VALUE: Final[dict[int, Consistency]] = {wire: how for how, wire in CONSISTENCIES.items()}
ORIGIN_BY_VALUE: Final[dict[int, Origin]] = {wire: origin for origin, wire in ORIGINS.items()}
RESYNC_BY_VALUE: Final[dict[int, ResyncState]] = {wire: state for state, wire in RESYNC_STATES.items()}


def invalid(field: str, why: str) -> Invalid:
    """The error for a field; `why` continues the sentence "<field> ..."."""
    return Invalid("INVALID_FIELD", f"{field} {why}", field=field)


def check_name(text: str, field: str) -> str:
    """A volume's, node's or cluster's name."""
    if _NAME.fullmatch(text) is None:
        raise invalid(
            field, f"is {text[:80]!r}; a name is 1 to 63 of A-Z a-z 0-9 . _ - and starts with one of A-Z a-z 0-9"
        )
    return text


def check_id(text: str, field: str, *, required: bool = True) -> str:
    """An id of a snapshot, resync, volume, epoch, store, leader or ticket: safe as a file's name."""
    if not text and not required:
        return text
    if _ID.fullmatch(text) is None:
        raise invalid(
            field,
            f"is {text[:80]!r}; an id is 1 to {ID_CHARS_MAX} of A-Z a-z 0-9 . _ : - and starts with a letter or digit",
        )
    return text


def check_text(text: str, field: str, *, chars_max: int = TEXT_CHARS_MAX) -> str:
    if len(text) > chars_max:
        raise invalid(field, f"has {len(text)} characters; at most {chars_max} are allowed")
    if "\0" in text:
        raise invalid(field, "holds a NUL character")
    return text


def check_path(path: str, field: str) -> str:
    """An absolute path that says where it leads: nothing in it climbs."""
    check_text(path, field, chars_max=PATH_CHARS_MAX)
    if not path.startswith("/"):
        raise invalid(field, f"is {path[:80]!r}; it must be absolute, on the node that is named")
    if not {"", ".", ".."}.isdisjoint(path.split("/")[1:]):
        raise invalid(field, f"is {path[:80]!r}; it must name a file, without '.', '..', '//' or a slash at its end")
    return path


def check_number(number: int, field: str, *, least: int = 0) -> int:
    if not least <= number <= NUMBER_MAX:
        raise invalid(field, f"is {number}; it must be between {least} and 2^63 - 1")
    return number


def check_cp_number(number: int, field: str, *, least: int = 0) -> int:
    """An epoch, or a sequence of a CP."""
    if not least <= number <= CP_NUMBER_MAX:
        raise invalid(field, f"is {number}; it must be between {least} and 2^62 - 1")
    return number


def check_count(items: Sequence[object], field: str, count_max: int) -> None:
    if len(items) > count_max:
        raise invalid(field, f"has {len(items)} entries; at most {count_max} are allowed")


def check_texts(texts: Sequence[str], field: str, count_max: int) -> tuple[str, ...]:
    check_count(texts, field, count_max)
    return tuple(check_text(text, f"{field}[{index}]") for index, text in enumerate(texts))


def check_enum(by_value: dict[int, E], value: int, field: str) -> E:
    member = by_value.get(value)
    if member is None:
        raise invalid(field, f"is {value}, which is no value of it that is known here")
    return member


def cut_text(text: str, chars_max: int = TEXT_CHARS_MAX) -> str:
    """The text as it may travel: short enough, without NUL, and without the halves that stand for odd file names."""
    return text[:chars_max].replace("\0", "?").encode("utf-8", "replace").decode()


def cut_texts(texts: Iterable[str], count_max: int) -> list[str]:
    return [cut_text(text) for text in list(texts)[:count_max]]


def check_reason(reason: str, field: str) -> str:
    """A reason of `resilver/errors.py` or of a newer peer; empty for none."""
    if reason and _REASON.fullmatch(reason) is None:
        raise invalid(field, f"is {reason[:80]!r}; a reason is of A-Z 0-9 _")
    return reason


def check_optional(message: Message, name: str, field: str) -> int | None:
    """An optional number of a message; None if it is not set."""
    return check_number(getattr(message, name), f"{field}.{name}") if message.HasField(name) else None
