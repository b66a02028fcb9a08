"""An election, taken or refused: what each candidate was, what would be lost, and what was decided."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.text import Text

from resilver.cli.plainjson import cp_text, word
from resilver.cli.screens.layout import indented, table
from resilver.cli.words import called, clock, count, seconds_of, state
from resilver.spans import age

if TYPE_CHECKING:
    from rich.console import RenderableType

    from resilver.v1 import error_pb2
    from resilver.v1 import volume_pb2 as pb

_CP: Final = re.compile(r"[0-9]+-[0-9]+")


def screen(election: pb.Election, *, dry_run: bool) -> Group:
    """The decision first, then what it was made from. A refusal itself goes to stderr, not here."""
    parts: list[RenderableType] = [_decision(election, dry_run=dry_run)]
    if election.candidates:
        parts.append(indented(candidates(election)))
    if election.HasField("refusal") and election.refusal.losses:
        parts.append(Text("WHAT WOULD BE LOST", style="bold"))
        parts += [indented(Text(loss_text(loss))) for loss in election.refusal.losses]
    return Group(*parts)


def _decision(election: pb.Election, *, dry_run: bool) -> Text:
    if election.HasField("refusal"):
        return Text(f"{election.volume}: nobody {'would be' if dry_run else 'was'} elected", style="bold")
    verb = "would be" if dry_run else "is"
    stays = election.winner == election.previous_primary
    head = Text(f"{election.volume}: {election.winner} {verb} primary", style="bold")
    head.append(", as before" if stays else "", style="not bold")
    if election.epoch:
        head.append(f"; epoch {election.epoch}", style="not bold")
    if cp := cp_text(election.cp):
        head.append(f", from {cp}", style="not bold")
    head.append(f"; rule: {election.rule}" if election.rule else "", style="not bold")
    if election.accepted_losses:
        head.append(f"; loss accepted: {', '.join(election.accepted_losses)}", style="yellow not bold")
    return head


def candidates(election: pb.Election) -> RenderableType:
    """One row for each candidate."""
    rows = table("NODE", "ANSWERED", "NEWEST CP", "LIVE COPY", "STATE", "VERDICT", wrap=("ANSWERED", "VERDICT"))
    for one in election.candidates:
        last = seconds_of(one.report_time)
        away = f"no, last report {clock(last)}" if last else "no, never"
        rows.add_row(
            Text(one.node, style="bold"),
            "yes" if one.reported else away,
            called(one.snapshot_name, cp_text(one.cp)) or "-",
            word(one, "live").lower() or "-",
            state(word(one, "state")),
            one.verdict or "-",
        )
    return rows


def loss_text(loss: error_pb2.Loss) -> str:
    """What goes with one node, in words."""
    parts = []
    if loss.from_cp or loss.to_cp:
        span = loss.from_cp if loss.from_cp == loss.to_cp else f"{loss.from_cp or '?'} .. {loss.to_cp or '?'}"
        # Another tool's snapshots have no CP, and are called by name.
        what = "CP" if all(_CP.fullmatch(end) for end in (loss.from_cp, loss.to_cp) if end) else "snapshot"
        cps = f" ({count(loss.lost_cps, what)})" if loss.HasField("lost_cps") else ""
        parts.append(span + cps)
    if loss.live_modified:
        parts.append("writes to its live copy")
    if not loss.HasField("unseen_seconds"):
        return f"{loss.node}: {' and '.join(parts) or 'whatever it has'}, never heard of"
    parts.append(f"whatever it has written since it was last heard of, {age(loss.unseen_seconds)} ago")
    return f"{loss.node}: {' and '.join(parts)}"
