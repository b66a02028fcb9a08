"""The audit trail: a line for each order."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from rich.text import Text

from resilver.cli.plainjson import word
from resilver.cli.words import clock, seconds_of

if TYPE_CHECKING:
    from resilver.v1 import coordinator_pb2 as api

_STYLES: Final = {"DONE": "green", "PARTLY": "yellow", "REFUSED": "red", "UNKNOWN": "magenta"}
_WORDS_CHARS: Final = 7


def audit_line(entry: api.AuditEntry) -> Text:
    """`2026-11-22 14:31:07Z  REFUSED  elect primary vm1  AMBIGUOUS  …  by … from …`."""
    result = word(entry, "result")
    line = Text(clock(seconds_of(entry.create_time)), style="dim")
    line.append(f"  {result:<{_WORDS_CHARS}}", style=f"{_STYLES.get(result, '')} not dim")
    where = " ".join(part for part in (", ".join(entry.volumes), f"on {entry.node}" if entry.node else "") if part)
    line.append(f"  {_method(entry.method)}", style="bold not dim")
    line.append(f" {where}" if where else "", style="not dim")
    line.append(f"  {entry.reason}" if entry.reason else "", style="red not dim")
    line.append(f"  {entry.message}" if entry.message else "", style="not dim")
    line.append(f"  by {entry.principal}")
    if entry.address != entry.principal:
        line.append(f" from {entry.address}")
    if entry.attempt_count > 1:
        line.append(f"  {entry.attempt_count} times, last {clock(seconds_of(entry.last_time))}", style="not dim")
    return line


def _method(name: str) -> str:
    """`ElectPrimary` as `elect primary`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
