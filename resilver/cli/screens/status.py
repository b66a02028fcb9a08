"""`resilver status`: the cluster in one line, a row for each replica, then what is wrong and what to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rich.console import Group
from rich.text import Text

from resilver.cli.plainjson import cp_text, word
from resilver.cli.screens.layout import Advice, table
from resilver.cli.words import called, clock, count, seconds_of, since, size, state
from resilver.spans import age

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

    from resilver.v1 import coordinator_pb2 as api
    from resilver.v1 import volume_pb2 as pb

EXIT_BY_STATE = {"HEALTHY": 0, "BLOCKED": 3, "RECOVERING": 3}
"""`--exit-code`; every other state is degraded, 5."""


class Cluster(NamedTuple):
    """What the head of the screen is made from."""

    info: api.GetClusterResponse
    nodes: Sequence[pb.Node]


class Trouble(NamedTuple):
    """One line of the list of problems."""

    where: str
    what: str
    sentence: str
    command: str


def exit_code(volumes: Iterable[pb.Volume]) -> int:
    """The worst of the volumes: 3 blocked, 5 degraded, 0 healthy."""
    codes = {EXIT_BY_STATE.get(word(volume, "state"), 5) for volume in volumes}
    return next((code for code in (3, 5) if code in codes), 0)


def troubles(volumes: Iterable[pb.Volume]) -> list[Trouble]:
    """All problems, volume by volume, the volume's own first."""
    found = []
    for volume in volumes:
        found += [Trouble(volume.name, p.reason, p.message, p.next_command) for p in volume.problems]
        for replica in volume.replicas:
            where = f"{volume.name}/{replica.node}"
            found += [Trouble(where, p.reason, p.message, p.next_command) for p in replica.problems]
    return found


def node_troubles(nodes: Iterable[pb.Node]) -> list[Trouble]:
    return [Trouble(node.name, p.reason, p.message, p.next_command) for node in nodes for p in node.problems]


def with_problems(volumes: Iterable[pb.Volume]) -> list[pb.Volume]:
    """The volumes that something is wrong with."""
    return [volume for volume in volumes if word(volume, "state") != "HEALTHY" or troubles([volume])]


NO_VOLUMES = "No volumes. They appear when an agent that has some in its configuration reports."
NO_PROBLEMS = "No problems."


def screen(cluster: Cluster, volumes: Sequence[pb.Volume], now: float, *, empty: str = NO_VOLUMES) -> Group:
    """The whole screen, as of `now` (Unix time in seconds); `empty` stands where no volume does."""
    parts: list[RenderableType] = [_head(cluster, now)]
    if volumes:
        parts.append(_replicas(volumes, now))
        parts.append(_newest(volumes, now))
    else:
        parts.append(Text(empty))
    found = [*node_troubles(cluster.nodes), *troubles(volumes)]
    if found:
        parts.append(Text(count(len(found), "PROBLEM", "PROBLEMS"), style="bold"))
        parts.append(Advice([(row.where, state(row.what), row.sentence, row.command) for row in found]))
    return Group(*parts)


def _head(cluster: Cluster, now: float) -> Text:
    info = cluster.info
    reachable = sum(node.reachable for node in cluster.nodes)
    store = info.store.kind or "-"
    if info.store.member_count:
        store += f" {info.store.healthy_count}/{info.store.member_count}"
    head = Text("CLUSTER ", style="bold").append(info.cluster or "-", style="not bold")
    rest = f"   leader {info.leader or 'none'} (term {info.term})   store {store}"
    head.append(f"{rest}   agents {reachable}/{len(cluster.nodes)}   {clock(now)}", style="not bold")
    if info.insecure:
        head.append("   INSECURE: plaintext, no access control", style="bold red")
    return head


def _replicas(volumes: Sequence[pb.Volume], now: float) -> RenderableType:
    columns = ("VOLUME", "NODE", "ROLE", "STATE", "CP", "BEHIND", "LIVE COPY", "SEEN")
    rows = table(*columns, wrap=("VOLUME", "NODE", "BEHIND", "LIVE COPY"))
    for volume in volumes:
        name = volume.name
        for replica in volume.replicas:
            rows.add_row(
                Text(name, style="bold"),
                replica.node,
                word(replica, "role").lower() or "-",
                state(word(replica, "state")),
                called(replica.snapshot_name, cp_text(replica.cp)) or "-",
                _behind(replica),
                _live(replica),
                _seen(replica, now),
            )
            name = ""
        if not volume.replicas:
            rows.add_row(Text(name, style="bold"), "-", "-", state(word(volume, "state")), "-", "-", "-", "-")
    return rows


def _behind(replica: pb.Replica) -> str:
    """How far, how long, how much; `own:` where the replica went a way of its own."""
    parts = []
    name = word(replica, "state")
    if name == "DIVERGED":
        own = replica.own_cps if replica.HasField("own_cps") else 0
        parts.append("own: " + (count(own, "CP") if own else _own_writes(replica)))
        if replica.live.HasField("modified_bytes") and replica.live.modified_bytes:
            parts.append(size(replica.live.modified_bytes))
    elif name == "EMPTY":
        parts.append("all of it")
    elif replica.HasField("behind_cps") and replica.behind_cps:
        parts.append(count(replica.behind_cps, "CP"))
        if replica.HasField("behind_duration"):
            parts.append(age(replica.behind_duration.seconds))
        if replica.HasField("out_of_sync_bytes"):
            parts.append(("~" if replica.estimated else "") + size(replica.out_of_sync_bytes))
        elif replica.estimated:
            parts.append("unknown size")
    if replica.resync:
        parts.append("resync runs")
    return "  ".join(parts) or "-"


def _own_writes(replica: pb.Replica) -> str:
    """What is open for writing was not compared, so nobody knows of any."""
    return "maybe live writes" if replica.live.in_use and not replica.live.HasField("modified_bytes") else "live writes"


def _live(replica: pb.Replica) -> str:
    name = word(replica.live, "state").lower() if replica.HasField("live") else ""
    return (name or "-") + (", in use" if replica.live.in_use else "")


def _seen(replica: pb.Replica, now: float) -> str:
    seen = since(replica.report_time, now)
    if replica.reachable:
        return seen
    return "never" if seen == "-" else f"away {seen}"


def _newest(volumes: Sequence[pb.Volume], now: float) -> Text:
    line = Text("NEWEST CP", style="bold")
    for volume in volumes:
        cp = cp_text(volume.newest_cp)
        known = seconds_of(volume.newest_cp_time)
        text = f"{cp}, {age(now - known)} ago" if cp and known else cp or "none yet"
        line.append(f"   {volume.name} {text}", style="not bold")
    if any(cp_text(volume.newest_cp) for volume in volumes):
        line.append("   (writes since then are on the primary alone)", style="not bold dim")
    return line
