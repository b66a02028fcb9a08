"""What mirroring may take of a node: values that travel. Pure.

A cap comes from the node's file, or for a while from an operator's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from resilver import spans

RATE_MIN_BYTES_S: Final = 64 << 10
"""Below that a frame would take so long that its connection passes for one that hangs."""
RATE_MAX_BYTES_S: Final = 1 << 50
LIMIT_SECONDS_DEFAULT: Final = 24 * 3600
LIMIT_SECONDS_MAX: Final = 30 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Cap:
    """Bytes a second; 0 is none. `until_ms` is when an order ends and the file's value counts again; 0: it does now."""

    bytes_s: int = 0
    until_ms: int = 0


@dataclass(frozen=True, slots=True)
class NodeLimits:
    """What holds on a node now; a count of 0 is not known."""

    receive: Cap = Cap()
    send: Cap = Cap()
    receive_max_count: int = 0
    send_max_count: int = 0


NOT_KNOWN: Final = NodeLimits()


@dataclass(frozen=True, slots=True)
class LimitChange:
    """What an operator orders. None: as it is. `clear`: what the file says counts again, at once."""

    receive_bytes_s: int | None = None
    send_bytes_s: int | None = None
    duration_s: int = LIMIT_SECONDS_DEFAULT
    clear: bool = False


def rate_fault(bytes_s: int) -> str:
    """What is wrong with a cap, for the end of a sentence; empty if nothing is."""
    if bytes_s == 0 or RATE_MIN_BYTES_S <= bytes_s <= RATE_MAX_BYTES_S:
        return ""
    return f"should be 0 (no cap), or at least {RATE_MIN_BYTES_S} bytes a second, and is {bytes_s}"


def described(change: LimitChange) -> str:
    """What an operator ordered, in words."""
    rates = {"receive": change.receive_bytes_s, "send": change.send_bytes_s}
    parts = [
        f"{side} {spans.rate(rate) if rate else 'without a cap'}" for side, rate in rates.items() if rate is not None
    ]
    said = ["as its file says"] if change.clear else []
    if parts:
        said.append(f"{', '.join(parts)}, for {spans.span(change.duration_s)}")
    return "; then ".join(said) or "unchanged"
