"""Lengths of time and rates in words: the coordinator's messages and the command's screens write them alike. Pure."""

from __future__ import annotations

from typing import Final

_UNITS: Final = ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s"))
_RATE_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")
_MINUTE_S: Final = 60
_FINE_UNTIL_S: Final = 10 * _MINUTE_S
_DAY_S: Final = 86400


def span(seconds: float) -> str:
    """A span that somebody chose, in at most two units: `30s`, `12m30s`, `2h5m`, `3d4h`."""
    whole = max(0, int(seconds))
    for big, small, unit, sub in _UNITS:
        if whole >= big:
            rest = whole % big // small
            return f"{whole // big}{unit}{rest}{sub}" if rest else f"{whole // big}{unit}"
    return f"{whole}s"


def age(seconds: float) -> str:
    """A span that time made, as `span`, without the seconds from ten minutes on: `9s`, `4m12s`, `47m`, `2h5m`."""
    whole = max(0, int(seconds))
    return span(whole - whole % step_s(whole))


def step_s(seconds: float) -> int:
    """By how much an age of that many seconds has to grow to read otherwise."""
    return 1 if seconds < _FINE_UNTIL_S else _MINUTE_S if seconds < _DAY_S else 3600


def rate(bytes_s: int) -> str:
    """A cap, in the units of networks: `50 MB/s`, `1.5 GB/s`, `65.5 kB/s`."""
    value, unit = float(bytes_s), 0
    while value >= 1000 and unit < len(_RATE_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.1f}".removesuffix(".0") + f" {_RATE_UNITS[unit]}/s"
