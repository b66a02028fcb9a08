"""What is to be reached, and whether it was: from the raw figures alone.

Competitors that ran in the same round are compared with each other, round by round, and the median of these ratios
counts. A bar whose case was not run, or whose competitor was not there, says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any, Final

MIB: Final = 1 << 20
LIMIT: Final = "the limit"
OURS: Final = "resilver, transfer and read-back"
WHOLE: Final = "resilver resync, the whole command"
RSYNC: Final = ("rsync, locally", "rsync, over its daemon")
BTRFS: Final = "btrfs send and receive"
STORIES: Final = frozenset({"killed", "sources"})
"""Cases in which every competitor is a cluster of ours."""
ONE, TWO, ONE_DIES = "one source", "two sources", "two sources, one killed at half"

Found = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """One of them; `found` None: not measured."""

    what: str
    wanted: str
    found: str | None
    met: bool

    @property
    def row(self) -> str:
        verdict = "not measured" if self.found is None else "yes" if self.met else "**no**"
        return f"| {self.what} | {self.wanted} | {self.found or ''} | {verdict} |"


def entry_of(case: Found | None, name: str) -> Found | None:
    """A competitor that ran in that case."""
    entries = case["entries"] if case is not None else []
    return next((entry for entry in entries if entry["name"] == name and entry["runs"]), None)


def times(entry: Found) -> list[float]:
    return [float(run["time_s"]) for run in entry["runs"]]


def ratios(one: Found | None, other: Found | None, what: str = "time_s") -> list[float]:
    """One's figure over the other's, for each round in which both ran."""
    if one is None or other is None:
        return []
    theirs = {run["round"]: value(run, what) for run in other["runs"]}
    return [value(run, what) / theirs[run["round"]] for run in one["runs"] if theirs.get(run["round"], 0.0) > 0]


def value(run: Found, what: str) -> float:
    """A figure of a run, by its name; those that only some have stand among its parts."""
    return float(run[what] if what in run else run["parts"][what])


def at_most(what: str, found: list[float], bound: float, unit: str = "", *, digits: int = 3) -> Bar:
    middle = median(found) if found else None
    met = middle is not None and middle <= bound
    return Bar(
        what,
        f"at most {bound:g}{unit}",
        None if middle is None else f"{middle:.{digits}g}{unit}{spread(found, digits)}",
        met,
    )


def at_least(what: str, found: list[float], bound: float, unit: str = "") -> Bar:
    middle = median(found) if found else None
    met = middle is not None and middle >= bound
    return Bar(what, f"at least {bound:g}{unit}", None if middle is None else f"{middle:.3g}{unit}{spread(found)}", met)


def spread(found: list[float], digits: int = 3) -> str:
    return f" ({min(found):.{digits}g} … {max(found):.{digits}g})" if len(found) > 1 else ""


def bars(known: dict[str, Found]) -> list[Bar]:
    """All of them."""
    return [
        *of_selecting(known.get("selecting")),
        *of_delta(known.get("delta")),
        *of_first_copy(known.get("first-copy")),
        *of_sources(known.get("sources")),
        at_most("Target killed at half: sent again", most(known.get("killed"), "resent_bytes", MIB), 16, " MiB"),
        at_most("Peak memory of an agent in all of it", sorted(peaks(known))[-1:], 200, " MiB"),
    ]


def of_selecting(case: Found | None) -> list[Bar]:
    entries = [entry for entry in case["entries"] if entry["runs"]] if case is not None else []
    made = []
    for temper in ("cold", "warm"):
        pair = [entry for entry in entries if entry["name"].endswith(temper)]
        small, large = pair if len(pair) == 2 else (None, None)
        made.append(at_most(f"Selecting, {temper}", times(small) if small is not None else [], 0.3, " s"))
        made.append(at_most(f"… over a {temper} image of 16 times the size", ratios(large, small), 1.2))
    return made


def of_delta(case: Found | None) -> list[Bar]:
    ours, rsync = entry_of(case, OURS), [entry_of(case, name) for name in RSYNC]
    ran = [entry for entry in rsync if entry is not None]
    faster = min(ran, key=lambda entry: median(times(entry))) if ran else None
    return [
        at_least("Delta: times faster than the faster rsync", ratios(faster, ours), 30),
        at_least("Delta: times faster than btrfs send and receive", ratios(entry_of(case, BTRFS), ours), 2),
        at_most("Delta: over the limit, read-back and all", ratios(ours, entry_of(case, LIMIT)), 1.5),
        at_most("Delta: wire over changed", wires(case, ours), 1.01, digits=5),
    ]


def of_first_copy(case: Found | None) -> list[Bar]:
    ours = entry_of(case, OURS)
    return [
        at_least("First copy: of the limit's speed, read-back and all", ratios(entry_of(case, LIMIT), ours), 0.6),
        at_most("First copy: wire over changed", wires(case, ours), 1.01, digits=5),
    ]


def of_sources(case: Found | None) -> list[Bar]:
    one, two, dies = (entry_of(case, name) for name in (ONE, TWO, ONE_DIES))
    again = [value(run, "resent_bytes") / MIB for run in dies["runs"]] if dies is not None else []
    return [
        at_least("Two capped sources: rate over one's", ratios(two, one, "rate_bytes_per_s"), 1.8),
        at_most("One of two killed at half: sent again", [max(again)] if again else [], 16, " MiB"),
    ]


def wires(case: Found | None, entry: Found | None) -> list[float]:
    return [run["wire_bytes"] / case["changed_bytes"] for run in entry["runs"]] if case and entry else []


def most(case: Found | None, what: str, unit: int) -> list[float]:
    """The largest of all runs."""
    runs = [run for entry in case["entries"] for run in entry["runs"]] if case is not None else []
    return [max(value(run, what) / unit for run in runs)] if runs else []


def peaks(known: dict[str, Found]) -> list[float]:
    """Of all of our own processes, in every case."""
    return [
        run["peak_bytes"] / MIB
        for case in known.values()
        for entry in case["entries"]
        if case["name"] in {"selecting", *STORIES} or entry["name"] in {OURS, WHOLE}
        for run in entry["runs"]
    ]
