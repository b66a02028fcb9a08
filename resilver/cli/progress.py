"""How far resyncs are, for a person who watches.

`Board` keeps what was shown, and what it shows never goes back: a run that is planned anew, or whose total turns out
larger, holds its bar until it has caught up. Percent is rounded down, so that 100 means all of it, and stays there.

Pure: who owns the terminal shows the table live on one, elsewhere a line for each change of step and one every
`LINE_EVERY_S` while bytes move. A table that does not fit gives up its bar first, then columns from the right: which
replica a line is of is always there to be read.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from rich.text import Text

from resilver.cli.plainjson import word
from resilver.cli.screens.layout import Fitting, table
from resilver.cli.words import STYLES, clock, listing, size, size_of
from resilver.spans import age

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from resilver.v1 import volume_pb2 as pb

FINAL_STATES: Final = frozenset({"SUCCEEDED", "FAILED", "CANCELLED", "BLOCKED"})
STEPS: Final = {"SUCCEEDED": "in sync"}
"""Every other step is called by its state."""
BAR_WIDTH: Final = 20
LAYOUTS: Final = ((20, 7), (12, 7), (6, 7), (3, 7), (3, 6), (3, 5), (3, 4))
"""Width of the bar and number of columns, from the widest table to the narrowest."""
RATE_WIDTH: Final = len("999.9 MiB/s")
LEFT_WIDTH: Final = len("59m59s")
COPIED_WIDTH: Final = len("999.9 / 999.9 MiB")
"""Kept free from the start, so that the layout does not change while bytes move."""
LINE_EVERY_S: Final = 10.0
RATE_WINDOW_S: Final = 5.0
"""A rate is what was copied in the last seconds, where the sources tell none."""


def is_final(resync: pb.Resync) -> bool:
    return word(resync, "state") in FINAL_STATES


@dataclass(slots=True)
class Track:
    """One run as it is shown."""

    resync: pb.Resync
    percent: int = 0
    done: int = 0
    total: int | None = None
    printed_state: str = ""
    printed_at: float = 0.0
    marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=64))

    @property
    def state(self) -> str:
        return word(self.resync, "state")

    @property
    def step(self) -> str:
        return STEPS.get(self.state, self.state.lower())

    @property
    def name(self) -> str:
        return f"{self.resync.volume}/{self.resync.node}"

    def update(self, resync: pb.Resync, now: float) -> None:
        """Takes in what the coordinator says; figures never fall."""
        self.resync = resync
        if resync.HasField("total_bytes"):
            self.total = resync.total_bytes
        elif self.total is None and resync.plan.HasField("copy_bytes"):
            self.total = resync.plan.copy_bytes
        self.done = max(self.done, resync.done_bytes)
        self.marks.append((now, self.done))
        if self.total is not None:
            # What was shown as copied stays shown, so a smaller total gives way to it.
            self.total = max(self.total, self.done)
            # A delta may be empty, where only writes to a live copy go; then nothing is all once it was fetched.
            part = 100 * self.done // self.total if self.total else 100 * (self.state in ("VERIFYING", "COMMITTING"))
            # An estimate may prove too short: it is not all before the step is over.
            self.percent = max(self.percent, min(part, 99 if resync.estimated else 100))
        if self.state == "SUCCEEDED":
            self.percent = 100

    def rate(self, now: float) -> float:
        """Bytes a second, 0 while nothing moves."""
        if self.state != "TRANSFERRING":
            return 0.0
        told = sum(source.bytes_per_second for source in self.resync.sources)
        if told:
            return float(told)
        since = next(((at, done) for at, done in self.marks if now - at <= RATE_WINDOW_S), None)
        if since is None or now - since[0] <= 0:
            return 0.0
        return (self.done - since[1]) / (now - since[0])

    def left(self, now: float) -> str:
        """How long it will still take; "-" if nobody can say."""
        if self.state in FINAL_STATES:
            return "-"
        if self.resync.HasField("remaining_duration"):
            return age(self.resync.remaining_duration.seconds)
        rate = self.rate(now)
        if rate <= 0 or self.total is None:
            return "-"
        return age((self.total - self.done) / rate)

    def sources(self) -> str:
        """Where it comes from: `a 44%, b 56%` once bytes have come, before that who may send."""
        wire = sum(source.wire_bytes for source in self.resync.sources)
        if wire and len(self.resync.sources) > 1:
            return listing(f"{s.node} {100 * s.wire_bytes // wire}%" for s in self.resync.sources)
        return listing(source.node for source in self.resync.sources) if wire else listing(self.resync.plan.sources)

    @property
    def unknown(self) -> bool:
        """Whether bytes come of which nobody can say how many there will be."""
        return self.total is None and self.state == "TRANSFERRING"

    def copied(self) -> str:
        if self.total is None:
            return f"{size(self.done)} / unknown" if self.unknown else size(self.done)
        return size_of(self.done, self.total, about="~" if self.resync.estimated else "")


class Board:
    """All runs that are watched, in the order in which they were first seen."""

    def __init__(self) -> None:
        self._tracks: dict[str, Track] = {}

    @property
    def tracks(self) -> list[Track]:
        return list(self._tracks.values())

    @property
    def resyncs(self) -> list[pb.Resync]:
        return [track.resync for track in self._tracks.values()]

    def settled(self) -> bool:
        return all(is_final(resync) for resync in self.resyncs)

    def update(self, resyncs: Iterable[pb.Resync], now: float) -> None:
        for resync in resyncs:
            self._tracks.setdefault(resync.id, Track(resync)).update(resync, now)

    def table(self, now: float) -> Fitting:
        """The live screen, as wide as the terminal lets it be."""
        return Fitting([self._layout(now, width, columns) for width, columns in LAYOUTS])

    def _layout(self, now: float, bar_width: int, columns: int) -> Table:
        names = ("REPLICA", "STEP", "PROGRESS", "COPIED / TOTAL", "RATE", "LEFT", "FROM")[:columns]
        rows = table(*names, wrap=("REPLICA", "FROM"))
        for column, width in zip(rows.columns, (0, 0, 0, COPIED_WIDTH, RATE_WIDTH, LEFT_WIDTH), strict=False):
            column.min_width = width or None
        for track in self.tracks:
            rate = track.rate(now)
            cells = (
                Text(track.name, style="bold"),
                Text(f"{track.step:<12}", style=STYLES.get(track.state, "")),
                bar(None if track.unknown else track.percent, bar_width),
                track.copied(),
                f"{size(int(rate))}/s" if rate else "-",
                track.left(now),
                track.sources(),
            )
            rows.add_row(*cells[:columns])
        return rows

    def lines(self, now: float) -> list[str]:
        """What has become worth a line since the last call."""
        found = []
        for track in self.tracks:
            due = track.state not in FINAL_STATES and now - track.printed_at >= LINE_EVERY_S
            if track.state == track.printed_state and not due:
                continue
            track.printed_state, track.printed_at = track.state, now
            found.append(_line(track, now))
        return found


def bar(percent: int | None, width: int = BAR_WIDTH) -> str:
    """A bar such as `##########.......... 57%`; None: an empty one, without a figure."""
    if percent is None:
        return "." * width + "    -"
    filled = width * percent // 100
    return "#" * filled + "." * (width - filled) + f"{percent:4d}%"


def _line(track: Track, now: float) -> str:
    rate = track.rate(now)
    speed = f"  {size(int(rate))}/s, {track.left(now)} left" if rate else ""
    source = track.sources()
    origin = f"  from {source}" if source != "-" else ""
    part = "" if track.unknown else f"  {track.percent}%"
    return f"{clock(now)}  {track.name}  {track.step}{part}  {track.copied()}{speed}{origin}"
