"""How the decisions speak: ages, sizes, CPs and lists, as they stand in messages.

Pure. Whoever reads a message is at a terminal at night: a number has a unit, a list has an end.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Final

from coordinator.core.cluster import ReplicaView
from resilver import spans
from resilver.lineage import NO_CP, ConsistencyPoint, Snapshot
from resilver.volume import LiveState

NAMED_MAX: Final = 6

_KIB: Final = 1024.0

_LIVE: Final = {
    LiveState.UNMODIFIED: "live copy unmodified",
    LiveState.MODIFIED: "live copy modified",
    LiveState.UNKNOWN: "live copy in use, so it may be modified",
    LiveState.ABSENT: "no live copy",
}


def age(ms: int) -> str:
    """`47s`, `4m12s`, `12m`, `3h5m`, `9d`; a clock that ran backwards reads as 0s."""
    return spans.age(max(ms, 0) // 1000)


def age_holds_ms(ms: int) -> int:
    """For how long an age that grows goes on to read the same."""
    return _step_ms(ms) - max(ms, 0) % _step_ms(ms)


def rest_holds_ms(ms: int) -> int:
    """The same of one that shrinks."""
    return max(ms, 0) % _step_ms(ms) + 1


def _step_ms(ms: int) -> int:
    return 1000 * spans.step_s(max(ms, 0) // 1000)


def size(count: int) -> str:
    """`0 B`, `61.2 MiB`."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < _KIB:
            return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= _KIB
    return f"{amount:.1f} PiB"


def name_of(snapshot: Snapshot) -> str:
    """Its CP, or the name that another tool gave it."""
    return snapshot.name


def point(cp: ConsistencyPoint, snapshot_id: str) -> str:
    """A CP, the id where there is only that, `none` where there is nothing."""
    return str(cp) if cp != NO_CP else snapshot_id or "none"


def listed(names: Iterable[str]) -> str:
    """`a, b and 4 more`."""
    rows = list(names)
    shown = ", ".join(rows[:NAMED_MAX])
    return shown if len(rows) <= NAMED_MAX else f"{shown} and {len(rows) - NAMED_MAX} more"


def span(snapshots: Sequence[Snapshot]) -> str:
    """CPs, oldest first, of a stretch given tip first: `4-10, 4-11`, or `5-10 .. 5-18`."""
    if len(snapshots) > NAMED_MAX:
        return f"{name_of(snapshots[-1])} .. {name_of(snapshots[0])}"
    return ", ".join(name_of(one) for one in reversed(snapshots))


def counted_snapshots(snapshots: Sequence[Snapshot]) -> str:
    """`2 CPs`; `2 snapshots` where one of them was adopted and is no CP."""
    return counted(len(snapshots), "CP" if all(one.cp != NO_CP for one in snapshots) else "snapshot")


def counted(count: int, one: str) -> str:
    return f"{count} {one}" if count == 1 else f"{count} {one}s"


def silent(replica: ReplicaView, now_ms: int) -> str:
    """Why a node's word is not there: it does not answer, or not in time, or two do."""
    if replica.duplicate:
        return f"two agents call themselves {replica.node}; neither is believed until the other is stopped"
    if replica.late:
        late = f"{replica.node} is connected, and has not answered in time: its disk is busy, or hangs"
        return f"{late}; {last_seen(replica, now_ms)}"
    return f"{replica.node} does not answer; {last_seen(replica, now_ms)}"


def last_seen(replica: ReplicaView, now_ms: int) -> str:
    """`its last CP was 1-4, heard 47s ago, live copy modified`."""
    report = replica.report
    if report is None:
        return "nothing has been heard of it"
    what = "snapshot" if report.lineage and report.lineage.cp == NO_CP else "CP"
    heard = f"heard {age(now_ms - replica.report_time_ms)} ago, {_LIVE[report.live.state]}"
    return f"its last {what} was {report.lineage.tip_name}, {heard}"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` or what is known, for the end of a NotFound's sentence."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names[:8])}" if names else "; none is known yet"
