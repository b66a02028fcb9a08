"""Sizes, ages and state words, as every screen writes them."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from rich.text import Text

from resilver.spans import age

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.timestamp_pb2 import Timestamp

KIB: Final = 1024
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_FINE_FROM: Final = 3
"""From GiB on, two decimals: a tenth of a GiB is too coarse to plan by."""

NAME_CHARS_MAX: Final = 17
"""Of the name that another tool gave a snapshot, in a table; other tools put the date into it, so both ends count."""

STYLES: Final = {
    "IN_SYNC": "green",
    "HEALTHY": "green",
    "SUCCEEDED": "green",
    "DELTA": "cyan",
    "NONE": "green",
    "STALE": "yellow",
    "DEGRADED": "yellow",
    "OPENING": "yellow",
    "RECOVERING": "yellow",
    "UNINITIALIZED": "yellow",
    "EMPTY": "yellow",
    "FULL": "yellow",
    "UNKNOWN": "magenta",
    "CANCELLED": "magenta",
    "DIVERGED": "red",
    "UNRELATED": "red",
    "FOREIGN": "red",
    "LOST": "red",
    "BLOCKED": "bold red",
    "FAILED": "bold red",
}
"""Colour only repeats what the word says."""


def state(name: str) -> Text:
    """A state word in its colour; "-" for none."""
    return Text(name or "-", style=STYLES.get(name, ""))


def size(count: int) -> str:
    """Bytes for a person: `0 B`, `234.9 MiB`, `1.31 GiB`, `96 GiB`."""
    return f"{_scaled(count, _unit(count)).removesuffix('.00')} {_UNITS[_unit(count)]}"


def size_of(done: int, total: int, *, about: str = "") -> str:
    """Two sizes in the unit of the larger, at a steady width: `135.7 / 238.0 MiB`; `about` marks an estimate."""
    unit = _unit(max(done, total))
    return f"{_scaled(done, unit)} / {about}{_scaled(total, unit)} {_UNITS[unit]}"


def _unit(count: int) -> int:
    unit = 0
    while unit < len(_UNITS) - 1 and count >= KIB ** (unit + 1):
        unit += 1
    return unit


def _scaled(count: int, unit: int) -> str:
    if unit == 0:
        return str(count)
    value = count / KIB**unit
    decimals = 1 if unit < _FINE_FROM else 0 if value >= 100 else 2
    return f"{value:.{decimals}f}"


def seconds_of(stamp: Timestamp) -> float:
    """Unix time of a Timestamp; 0 for one that is not set."""
    return stamp.seconds + stamp.nanos / 1e9


def since(stamp: Timestamp, now: float) -> str:
    """How long ago; "-" for a time that is not set. A clock that is ahead of ours reads as 0s."""
    return age(now - seconds_of(stamp)) if stamp.seconds else "-"


def clock(seconds: float, *, date: bool = True) -> str:
    """A moment in UTC: `2026-11-22 14:31:07Z`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ" if date else "%H:%M:%SZ")


def now() -> float:
    return time.time()


def count(number: int, one: str, many: str = "") -> str:
    """`1 CP`, `3 CPs`, `10,485 ranges`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listing(items: Iterable[str]) -> str:
    """`a, b`; "-" for none."""
    return ", ".join(items) or "-"


def called(name: str, cp: str | None, chars_max: int = NAME_CHARS_MAX) -> str:
    """A snapshot in a cell: its CP, else the name that another tool gave it, cut in the middle; "" for none."""
    if cp or len(name) <= chars_max:
        return cp or name
    head = (chars_max - 1) // 2
    return f"{name[:head]}…{name[head + 1 - chars_max :]}"


def short_id(identity: str) -> str:
    """The first eight characters of a UUID; other ids whole."""
    return identity[:8] if len(identity) == 36 and identity.count("-") == 4 else identity or "-"
