"""`resilver plan`: what would be copied from where, what is kept first, and the commands that do it."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Group
from rich.text import Text

from resilver.cli.output import next_line
from resilver.cli.plainjson import cp_text, word
from resilver.cli.screens.layout import Noted, Unbroken, indented, table
from resilver.cli.words import called, clock, count, listing, seconds_of, size, state

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import RenderableType

    from resilver.v1 import error_pb2
    from resilver.v1 import volume_pb2 as pb

_COLUMNS = ("NODE", "STATE", "ACTION", "COMMON", "TO COPY", "FROM", "SPACE need/free")


def screen(
    plan: pb.Plan,
    selection: str,
    *,
    took_snapshot: bool = False,
    paused: Mapping[str, pb.Problem] = MappingProxyType({}),
) -> Group:
    """The whole screen; `selection` is what was asked for, as the commands below repeat it. `paused` has the volumes
    whose resyncs would be refused for that, each with what is to be said of it.
    """
    when = clock(seconds_of(plan.create_time), date=False) if plan.create_time.seconds else ""
    head = Text("PLAN ", style="bold").append(plan.etag or "-", style="cyan not bold")
    changed = "nothing but consistency points was made" if took_snapshot else "nothing was changed"
    head.append(f"   {when}   {changed}; valid until a replica changes", style="not bold")
    parts: list[RenderableType] = [head]
    rows = {volume.volume: [_row(volume, replica) for replica in volume.replicas] for volume in plan.volumes}
    widths = _widths(row for volume in rows.values() for row in volume)
    for volume in plan.volumes:
        parts += _volume(volume, rows[volume.volume], widths)
        if volume.volume in paused:
            parts += _paused(paused[volume.volume])
    parts.append(_total(plan))
    if any(_copies(replica) for replica in _replicas(plan)):
        waiting = [one for volume in plan.volumes if volume.takes_snapshot for one in volume.replicas if _copies(one)]
        if waiting:
            figures = "Closer" if all(replica.estimated for replica in waiting) else "Exact"
            parts.append(Unbroken(Text(f"{figures} figures: resilver plan {selection} --snapshot")))
    if any(_copies(replica) for volume in plan.volumes if volume.volume not in paused for replica in volume.replicas):
        parts.append(Unbroken(Text("Do it: ").append(f"resilver resync {selection} --plan {plan.etag}", style="bold")))
    return Group(*parts)


def _replicas(plan: pb.Plan) -> list[pb.ReplicaPlan]:
    return [replica for volume in plan.volumes for replica in volume.replicas]


def _copies(replica: pb.ReplicaPlan) -> bool:
    return word(replica, "action") in ("DELTA", "FULL")


def _volume(volume: pb.VolumePlan, rows: Sequence[Sequence[Text]], widths: Sequence[int]) -> list[RenderableType]:
    target = cp_text(volume.target_cp) or "-"
    head = Text(volume.volume, style="bold")
    if volume.primary:
        head.append(f"   primary {volume.primary}", style="not bold")
    head.append(f"   target {target}", style="not bold")
    if volume.takes_snapshot:
        first = target == "1-1"  # taken whether or not anything was written since another tool's newest snapshot
        why = "the volume's first" if first else f"{volume.primary}'s live copy is modified"
        head.append(f", taken first ({why})", style="not bold")
    parts: list[RenderableType] = [head]
    if volume.HasField("refusal"):
        # Reasons alone: the sentence and the next command go to stderr, as for every refusal of what was asked.
        head.append("   refused: ", style="not bold").append(", ".join(volume.refusal.reasons), style="bold red")
    if rows:
        grid = table(*_COLUMNS, wrap=("TO COPY", "FROM", "SPACE need/free"))
        for column, width in zip(grid.columns, widths, strict=True):
            column.min_width = width if column.no_wrap else None
        for row in rows:
            grid.add_row(*row)
        parts.append(Noted(grid, [_beneath(replica) for replica in volume.replicas]))
    return parts


def _paused(problem: pb.Problem) -> list[RenderableType]:
    line = Text.assemble(("PAUSED", "bold red"), f": a resync is refused; {problem.message}")
    return [indented(line), Unbroken(Text("  ").append_text(next_line(problem.next_command)))]


def _row(volume: pb.VolumePlan, replica: pb.ReplicaPlan) -> tuple[Text, ...]:
    action = word(replica, "action")
    space = f"{_need(replica)} / {size(replica.free_bytes)}" if _copies(replica) else "-"
    return (
        Text(replica.node, style="bold"),
        state(word(replica, "state")),
        Text.assemble(state(action)),
        Text(called(replica.base_name, cp_text(replica.base_cp)) or ("none" if action == "FULL" else "-")),
        Text(_to_copy(volume, replica)),
        Text(listing(replica.sources)),
        Text(space),
    )


def _need(replica: pb.ReplicaPlan) -> str:
    if not replica.HasField("need_bytes") and replica.estimated:
        return "unknown"
    return size(replica.need_bytes) if replica.need_bytes else "small"


def _to_copy(volume: pb.VolumePlan, replica: pb.ReplicaPlan) -> str:
    if not _copies(replica):
        return "-"
    # A replica that is at the primary's tip lacks only what the coming snapshot will hold: no figure is known yet.
    unknown = not replica.HasField("copy_bytes")
    none_yet = not replica.estimated if unknown else not replica.copy_bytes
    if not replica.exact and volume.takes_snapshot and none_yet:
        base = called(replica.base_name, cp_text(replica.base_cp))
        return f"writes since {base}" if base else "all of it"
    if unknown:
        return "unknown" if replica.estimated else "not known yet"
    bound = _bound([(volume, replica)])
    ranges = f", {count(replica.range_count, 'range')}" if replica.HasField("range_count") else ""
    return f"{bound}{size(replica.copy_bytes)}{ranges}"


def _bound(rows: Iterable[tuple[pb.VolumePlan, pb.ReplicaPlan]]) -> str:
    """`>= ` before a lower bound, `~` before an estimate."""
    least = about = False
    for volume, replica in rows:
        about |= replica.estimated
        unknown = not replica.HasField("copy_bytes")
        least |= not replica.exact and (volume.takes_snapshot or not replica.estimated or unknown)
    return (">= " if least else "") + ("~" if about else "")


def _beneath(replica: pb.ReplicaPlan) -> list[RenderableType]:
    """What does not fit in a row: what is kept first, why a full copy, why not at all."""
    node = replica.node
    parts: list[RenderableType] = []
    if replica.base_name and not cp_text(replica.base_cp):
        parts.append(indented(Text(f"{node}: starts from {replica.base_name}, another tool's snapshot"), 6))
    if replica.preserve:
        kept = f", {size(replica.preserve_bytes)}" if replica.HasField("preserve_bytes") else ""
        what = " and ".join(part for part in (", ".join(replica.preserve[:-1]), replica.preserve[-1]) if part)
        parts.append(indented(Text(f"{node}: preserved first: its own {what} (kept until dropped{kept})"), 6))
    if replica.HasField("refusal"):
        parts += _refusal(replica.refusal, 6, node)  # its sentence is the why of a blocked replica
    elif word(replica, "action") in ("FULL", "BLOCKED") and replica.why:
        parts.append(indented(Text(f"{node}: {replica.why}"), 6))
    return parts


def _refusal(refusal: error_pb2.Refusal, by: int, node: str) -> list[RenderableType]:
    line = Text(f"{node}: ").append(", ".join(refusal.reasons), style="bold red").append(f": {refusal.message}")
    parts: list[RenderableType] = [indented(line, by)]
    if refusal.next_command:
        parts.append(Unbroken(Text(" " * by).append_text(next_line(refusal.next_command))))
    return parts


def _total(plan: pb.Plan) -> Text:
    replicas = _replicas(plan)
    copying = [replica for replica in replicas if _copies(replica)]
    full = [r.node for r in copying if word(r, "action") == "FULL"]
    blocked = [r.node for r in replicas if word(r, "action") == "BLOCKED"]
    refused = [volume.volume for volume in plan.volumes if volume.HasField("refusal")]
    total = sum(replica.copy_bytes for replica in copying)
    bound = _bound((volume, replica) for volume in plan.volumes for replica in volume.replicas if _copies(replica))
    head = f"{count(len(copying), 'replica')}, {bound}{size(total)} to copy."
    if bound and not total:
        head = f"{count(len(copying), 'replica')} to bring up to date; how many bytes is not known yet."
    if not copying:
        idle = f"Nothing to copy: {count(len(replicas), 'replica')} in sync."
        if not replicas:
            idle = "Nothing to copy: no other node with the volume is known."
        head = "Nothing can be copied." if blocked or refused else idle
    return Text(f"{head} Full copies: {_short(full)}. Blocked: {_short([*refused, *blocked])}. Discarded: nothing.")


def _short(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names)})" if names else "none"


def _widths(rows: Iterable[Sequence[Text]]) -> list[int]:
    """The widest cell of each column over all volumes, so that their tables stand in line."""
    columns = list(zip(*rows, strict=True))
    if not columns:
        return [0] * len(_COLUMNS)
    return [max(cell_len(cell.plain) for cell in column) for column in columns]
