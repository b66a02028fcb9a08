"""The lists: one row for each thing, ids shortened, ages instead of dates where only the age matters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from resilver.cli.plainjson import cp_text, word
from resilver.cli.screens.layout import table
from resilver.cli.words import clock, count, listing, seconds_of, short_id, since, size, state
from resilver.spans import age, rate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.table import Table

    from resilver.v1 import volume_pb2 as pb


def volumes(items: Iterable[pb.Volume], now: float) -> Table:
    rows = table("VOLUME", "STATE", "EPOCH", "PRIMARY", "NEWEST CP", "TAKEN", "REPLICAS", wrap=("VOLUME",))
    for volume in items:
        in_sync = sum(word(replica, "state") == "IN_SYNC" for replica in volume.replicas)
        taken = since(volume.newest_cp_time, now)
        rows.add_row(
            Text(volume.name, style="bold"),
            state(word(volume, "state")),
            str(volume.epoch),
            volume.primary or "-",
            cp_text(volume.newest_cp) or "-",
            f"{taken} ago" if taken != "-" else "-",
            f"{in_sync} of {len(volume.replicas)} in sync",
        )
    return rows


def nodes(items: Sequence[pb.Node], now: float) -> Table:
    """The caps have a column only where there are some."""
    capped = any(_caps(node, now) for node in items)
    limits = ["LIMITS"] if capped else []
    columns = ("NODE", "STATE", "SEEN", "VOLUMES", *limits, "ADDRESS", "STREAM", "VERSION", "PROBLEMS")
    rows = table(*columns, wrap=("LIMITS", "PROBLEMS"))
    for node in items:
        rows.add_row(
            Text(node.name, style="bold"),
            Text("reachable", style="green") if node.reachable else Text("away", style="red"),
            since(node.report_time, now),
            str(node.volume_count),
            *([_caps(node, now) or "-"] if capped else []),
            node.address or "-",
            node.stream_address or "-",
            node.version or "-",
            "; ".join(f"{problem.reason}: {problem.message}" for problem in node.problems) or "-",
        )
    return rows


def _caps(node: pb.Node, now: float) -> str:
    """`in 50 MB/s, out 800 kB/s for 1h`; empty where nothing is capped, and by nobody's order."""
    said = []
    for way, cap in (("in", node.limits.receive), ("out", node.limits.send)):
        left = f" for {age(seconds_of(cap.until_time) - now)}" if cap.until_time.seconds else ""
        if cap.bytes_per_second or left:
            said.append(f"{way} {_rate(cap)}{left}")
    return ", ".join(said)


def _rate(cap: pb.Cap) -> str:
    return rate(cap.bytes_per_second) if cap.bytes_per_second else "no cap"


def limits(node: pb.Node, now: float) -> Table:
    """What holds on one node, each way, and until when."""
    rows = table("NODE", "", "CAP", "UNTIL", "AT ONCE")
    known = node.HasField("limits")
    ways = (
        ("in", node.limits.receive, node.limits.receive_max_count),
        ("out", node.limits.send, node.limits.send_max_count),
    )
    for way, cap, at_once in ways:
        ordered = cap.until_time.seconds
        until = seconds_of(cap.until_time)
        rows.add_row(
            Text(node.name, style="bold"),
            way,
            _rate(cap) if known else "not known: it is away",
            f"{clock(until)} ({age(until - now)} left)" if ordered else "as its file says" if known else "-",
            str(at_once or "-"),
        )
    return rows


def snapshots(items: Sequence[pb.Snapshot], now: float) -> Table:
    """The group has a column only where there is one: equal ids are snapshots that were taken together.

    A file system's snapshots have no size of their own; those of other tools were taken in their own way.
    """
    grouped = any(snapshot.group_id for snapshot in items)
    columns = ["SNAPSHOT", "CP", "AGE", "SIZE", "TAKEN", *(["GROUP"] if grouped else []), "ON", "PINNED BY", "NOTE"]
    rows = table(*columns, wrap=("ON", "PINNED BY", "NOTE"))
    for snapshot in items:
        adopted = word(snapshot, "origin") == "ADOPTED"
        pins = {reason: None for copy in snapshot.copies for reason in copy.pinned_by}
        rows.add_row(
            Text(short_id(snapshot.id), style="bold"),
            cp_text(snapshot.cp) or "-",
            since(snapshot.create_time, now),
            size(snapshot.size_bytes) if snapshot.size_bytes else "-",
            "adopted" if adopted else word(snapshot, "consistency").lower() or "-",
            *([short_id(snapshot.group_id) or "-"] if grouped else []),
            listing(copy.node for copy in snapshot.copies),
            listing(pins),
            _note(snapshot),
        )
    return rows


def _note(snapshot: pb.Snapshot) -> str:
    """Its note; of another tool's snapshot that is the name, and where it lies beside the lineage."""
    off = [copy.node for copy in snapshot.copies if copy.off_lineage]
    if not off:
        return snapshot.note or "-"
    where = "" if len(off) == len(snapshot.copies) else f" on {listing(off)}"
    return f"{snapshot.note} (not in the lineage{where})".strip()


def preserved(items: Iterable[pb.PreservedCopy], now: float) -> Table:
    columns = ("PRESERVED", "VOLUME", "NODE", "WHAT", "AGE", "SIZE", "ITS OWN", "PATH")
    rows = table(*columns, wrap=("VOLUME", "PATH"))
    for copy in items:
        cp = cp_text(copy.cp) or short_id(copy.based_on)
        rows.add_row(
            Text(short_id(copy.id), style="bold"),
            copy.volume,
            copy.node,
            f"live copy after {cp}" if copy.live else f"snapshot {cp}",
            since(copy.create_time, now),
            size(copy.size_bytes) if copy.size_bytes else "-",  # of a subvolume nobody counts it
            size(copy.exclusive_bytes) if copy.HasField("exclusive_bytes") else "-",
            copy.path or "-",
        )
    return rows


def resyncs(items: Iterable[pb.Resync], now: float) -> Table:
    columns = ("RESYNC", "REPLICA", "STATE", "ACTION", "TO", "COPIED", "WIRE", "SENT AGAIN", "STARTED", "TOOK", "WHY")
    rows = table(*columns, wrap=("REPLICA", "WHY"))
    for resync in items:
        begun, ended = seconds_of(resync.start_time) or seconds_of(resync.create_time), seconds_of(resync.end_time)
        rows.add_row(
            Text(short_id(resync.id), style="bold"),
            f"{resync.volume}/{resync.node}",
            state(word(resync, "state")),
            state(word(resync.plan, "action")),
            cp_text(resync.plan.target_cp) or "-",
            size(resync.done_bytes),
            size(resync.wire_bytes),
            size(resync.resent_bytes),
            f"{since(resync.create_time, now)} ago" if resync.create_time.seconds else "-",
            age((ended or now) - begun) if begun else "-",
            f"{', '.join(resync.refusal.reasons)}: {resync.refusal.message}" if resync.HasField("refusal") else "-",
        )
    return rows


def history(items: Iterable[pb.Election]) -> Table:
    rows = table("WHEN", "RESULT", "EPOCH", "FROM", "AT CP", "WHY", "ASKED BY", wrap=("WHY",))
    elections = list(items)
    for at, election in enumerate(elections):
        refused = election.HasField("refusal")
        why = f"{', '.join(election.refusal.reasons)}: {election.refusal.message}" if refused else election.rule
        if election.accepted_losses:
            why += f"; loss accepted: {', '.join(election.accepted_losses)}"
        rows.add_row(
            clock(seconds_of(election.create_time)) if election.create_time.seconds else "-",
            Text("refused", style="red") if refused else Text(_elected(election, elections[at + 1 :]), style="green"),
            str(election.epoch or "-"),
            election.previous_primary or "-",
            cp_text(election.cp) or "-",
            why or "-",
            election.principal or "-",
        )
    return rows


def _elected(election: pb.Election, older: Sequence[pb.Election]) -> str:
    """`a stays` where its epoch had been opened before; of the oldest that is kept, the primary alone tells."""
    opened = older and all(one.epoch_id != election.epoch_id for one in older)
    stays = election.winner == election.previous_primary and not opened
    return f"{election.winner} stays" if stays else f"elected {election.winner}"


def event_line(event: pb.Event) -> Text:
    """One event as one line."""
    where = "/".join(part for part in (event.volume, event.node) if part) or "-"
    line = Text(clock(seconds_of(event.create_time)), style="dim")
    line.append(f"  {event.type:<22} ", style="bold not dim").append(where, style="not dim")
    if event.reason:
        line.append(f"  {event.reason}", style="red not dim")
    line.append(f"  {event.message}" if event.message else "", style="not dim")
    return line.append(f"  by {event.principal}" if event.principal else "", style="dim")


def found(number: int, one: str, many: str = "") -> str:
    """`3 snapshots`, under a list."""
    return count(number, one, many)
