"""What is kept of an order: who gave it, from where, what it said, and what it was answered. Times are Unix ms."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class AuditResult(Enum):
    """What became of an order. UNKNOWN: it is being carried out, or its leader ended before it was answered."""

    UNKNOWN = "UNKNOWN"
    DONE = "DONE"
    PARTLY = "PARTLY"
    REFUSED = "REFUSED"


@dataclass(frozen=True, slots=True)
class Asked:
    """An order as it came in. `volumes` and `node` are what it names; `request` is all of it, as JSON."""

    method: str
    principal: str
    address: str
    volumes: tuple[str, ...] = ()
    node: str = ""
    request: str = ""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One order.

    `sequence` grows over all reigns, as an event's does. Refusals of one kind within an hour are one entry: `count`
    says of how many, and `last_time_ms` when the last of them was.
    """

    sequence: int
    create_time_ms: int
    method: str
    principal: str
    address: str
    volumes: tuple[str, ...] = ()
    node: str = ""
    request: str = ""
    result: AuditResult = AuditResult.UNKNOWN
    reason: str = ""
    message: str = ""
    end_time_ms: int = 0
    count: int = 1
    last_time_ms: int = 0
