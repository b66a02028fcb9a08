"""Runs a scenario: a text of what happened in, a text of what the engine did out.

One event a line; every line of output that follows it is indented. Ids are minted as `i1`, `i2`, … in order, so a
scenario may name them. A line that starts with `#` is kept as it is.

    given vm1 3 E3 a a,b 3-2:s2 s1     what the store held: volume, epoch, epoch_id, primary, members, newest, bases of
                                       the other members; `opening` may follow
    known b vm1                        a node that the store held, with what it offered
    connect a vm1                      an agent's stream opens (its boot is `a1`, after a reconnect `a2`);
                                       `cluster=X`, `store=X`: to which it says that it belongs
    disconnect a
    report a vm1 empty                 what a node says of its replica: empty | lost, or
    report a vm1 1-2:s2 1-1:s1 modified    its lineage tip first as CP:id, then the live copy's state;
                                       `+grant` and `+record`: it has what the store has; `!x`: answers examine x;
                                       `knows=V1,5,E5,b`: its record is of that volume_id, epoch, epoch_id, primary;
                                       `-s1` for a record whose data is pruned; `epoch=ID` of the tip;
                                       `0-0:g5`: another tool's, called `auto-g5`; `~g7`: one beside the lineage;
                                       `backend=KIND`; `group=db`
    progress a i7 transferring 10/20
    answer i5 taken s3 1-3 ID          an order came back: taken | together s3:1-3 r2:1-2 |
                                       same | done | size BYTES RANGES | refused REASON |
                                       progress RESYNC STATE DONE/TOTAL
    ask r1 resync vm1 [key=value …]    an operator's request: resync | plan | elect | snapshot
    tick SECONDS                       time passes
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from coordinator.core import events as e
from coordinator.core.cluster import ClusterEvent, ElectionRecord, NodeView, Resync, Size, VolumeEntry
from coordinator.core.context import Identity, Settings
from coordinator.core.engine import Engine
from coordinator.core.orders import (
    AnyOrder,
    Done,
    OpenEpoch,
    OrderResult,
    PrepareSend,
    Receive,
    Taken,
    TakenTogether,
    TakeSnapshot,
    TakeSnapshots,
)
from coordinator.core.requests import (
    ElectRequest,
    Planned,
    PlanRequest,
    Request,
    ResyncRequest,
    ResyncsStarted,
    SnapshotRequest,
    SnapshotsTaken,
    VolumeRefusal,
)
from resilver.errors import ResilverError, error_for
from resilver.lineage import ConsistencyPoint, Lineage, Origin, Snapshot
from resilver.volume import Grant, LiveCopy, LiveState, Presence, Progress, ReplicaReport, ResyncState, VolumeRecord

START_MS = 1_700_000_000_000


class Scenario:
    """One engine and the names that the text gives to streams."""

    def __init__(self, loaded: e.Loaded) -> None:
        numbers = itertools.count(1)
        self.now_ms = START_MS
        self.new_id = lambda: f"i{next(numbers)}"
        self.engine = Engine(
            Identity("demo", "store-1", 1, "leader-1", "c1"),
            Settings(),
            loaded,
            self.now_ms,
            self.new_id,
            new_ticket=lambda: "ticket",
        )
        self.boots: dict[str, int] = {}
        self.seqs = itertools.count(1)

    @classmethod
    def play(cls, text: str) -> str:
        """The whole output: each event line with what the engine did indented below it."""
        volumes = dict(given(line.split()[1:]) for line in text.splitlines() if line.startswith("given "))
        known = [line.split()[1:] for line in text.splitlines() if line.startswith("known ")]
        nodes = {name: NodeView(name, volumes=tuple(offers)) for name, *offers in known}
        return cls(e.Loaded(volumes, {}, {}, nodes)).run(text)

    def run(self, text: str) -> str:
        lines: list[str] = []
        for line in text.splitlines():
            if line.startswith("    "):
                continue
            lines.append(line)
            if not line.strip() or line.startswith(("#", "given ", "known ")):
                continue
            for event in self.events(line.split()):
                for action in self.engine.step(event, self.now_ms):
                    lines.extend(f"    {row}" for row in describe(action))
        return "\n".join(lines) + "\n"

    def events(self, words: list[str]) -> list[e.Event]:
        verb, rest = words[0], words[1:]
        return getattr(self, f"on_{verb}")(*rest)

    def on_connect(self, node: str, *words: str) -> list[e.Event]:
        self.boots[node] = self.boots.get(node, 0) + 1
        boot = f"{node}{self.boots[node]}"
        volumes = tuple(word for word in words if "=" not in word)
        said = dict(word.split("=") for word in words if "=" in word)
        view = NodeView(node, boot, f"{node}:1", f"{node}:2", "1", volumes)
        return [e.AgentConnected(boot, view, said.get("cluster", "demo"), said.get("store", ""), 0)]

    def on_disconnect(self, node: str) -> list[e.Event]:
        return [e.AgentDisconnected(f"{node}{self.boots[node]}")]

    def on_report(self, node: str, volume: str, *words: str) -> list[e.Event]:
        report = ReplicaReport(volume, Presence.PRESENT, backend="image", priority=10 if node == "a" else 0)
        records: list[tuple[str, str, bool]] = []
        examine, epoch_id = "", ""
        state = LiveState.MODIFIED
        entry = self.engine.view(volume).entry
        for word in words:
            if word in ("empty", "lost"):
                report = replace(report, presence=Presence(word))
                state = LiveState.ABSENT
            elif word in {one.value for one in LiveState}:
                state = LiveState(word)
            elif word == "+record" and entry is not None:
                report = replace(report, record=entry.record, volume_id=entry.record.volume_id)
            elif word == "+grant" and entry is not None:
                grant = Grant(entry.record.volume_id, entry.record.epoch, entry.record.epoch_id)
                report = replace(report, grant=grant)
            elif word.startswith("!"):
                examine = word[1:]
            elif word.startswith("knows="):
                volume_id, epoch, told_id, primary = word[6:].split(",")
                told = VolumeRecord(volume, volume_id, int(epoch), told_id, primary, (primary,))
                report = replace(report, record=told, volume_id=volume_id)
            elif word.startswith("epoch="):
                epoch_id = word[6:]
            elif word.startswith(("backend=", "group=", "~")):
                report = beside(report, word)
            else:
                cp, _, name = word.lstrip("-").partition(":")
                records.append((cp, name, not word.startswith("-")))
        report = replace(
            report,
            lineage=lineage(records, epoch_id),
            live=LiveCopy(state, in_use=False, based_on=records[0][1] if records else ""),
        )
        return [e.ReplicaReported(f"{node}{self.boots[node]}", next(self.seqs), report, examine)]

    def on_progress(self, node: str, resync: str, state: str, done: str = "0/0", reason: str = "") -> list[e.Event]:
        done_bytes, total = done.split("/")
        volume = self.engine.resyncs()[resync].volume
        progress = Progress(resync, volume, ResyncState(state), int(total), 1, int(done_bytes), reason=reason)
        return [e.ProgressReported(f"{node}{self.boots[node]}", progress)]

    def on_answer(self, order: str, kind: str, *words: str) -> list[e.Event]:
        answer: OrderResult | ResilverError
        if kind in ("taken", "same"):
            snapshot = Snapshot(words[0], ConsistencyPoint.parse(words[1]), epoch_id=words[2] if words[2:] else "")
            answer = Taken(snapshot, kind == "taken")
        elif kind == "together":
            rows = [word.split(":") for word in words]
            answer = TakenTogether(tuple(Taken(Snapshot(i, ConsistencyPoint.parse(cp)), True) for i, cp in rows))
        elif kind == "size":
            answer = Size(int(words[0]), int(words[1]), 1 << 30)
        elif kind == "progress":
            resync, state, done = words
            done_bytes, total = (int(part) for part in done.split("/"))
            volume = self.engine.resyncs()[resync].volume
            answer = Progress(resync, volume, ResyncState(state), total, 1, done_bytes)
        elif kind == "refused":
            answer = error_for(words[0], " ".join(words[1:]) or f"refused as {words[0]}")
        else:
            answer = Done()
        return [e.OrderAnswered(order, answer)]

    def on_tick(self, seconds: str) -> list[e.Event]:
        self.now_ms += int(float(seconds) * 1000)
        return [e.Ticked()]

    def on_ask(self, key: str, what: str, *words: str) -> list[e.Event]:
        options = dict(word.split("=", 1) for word in words if "=" in word)
        volumes = tuple(word for word in words if "=" not in word)

        def nodes(name: str) -> frozenset[str]:
            return frozenset(filter(None, options.get(name, "").split(",")))

        request: Request
        if what == "resync":
            request = ResyncRequest(volumes, nodes("to"), replace=nodes("replace"), full="full" in options)
        elif what == "plan":
            request = PlanRequest(volumes, nodes("to"), take_snapshot="snapshot" in options)
        elif what == "elect":
            request = ElectRequest(volumes[0], options.get("choose", ""), nodes("accept"))
        else:
            request = SnapshotRequest(volumes)
        return [e.Requested(key, request)]


def given(words: list[str]) -> tuple[str, VolumeEntry]:
    """A volume as an earlier reign left it."""
    volume, epoch, epoch_id, primary, members, newest, *rest = words
    cp, _, newest_id = newest.partition(":")
    flags = [word for word in rest if word == "opening"]
    others = [member for member in members.split(",") if member != primary]
    record = VolumeRecord(
        volume, "V1", int(epoch), epoch_id, primary, tuple(members.split(",")), ConsistencyPoint.parse(cp), newest_id
    )
    bases = dict(zip(others, [word for word in rest if word not in flags], strict=False))
    return volume, VolumeEntry(record, opening="opening" in flags, bases=bases)


def lineage(records: list[tuple[str, str, bool]], epoch_id: str = "") -> Lineage:
    """Records tip first; the epoch id is the tip's."""
    parents = [name for _, name, _ in records][1:] + ["" for _ in records[:1]]
    return Lineage(
        tuple(
            replace(adopted(name), parent=parent, present=present)
            if cp == "0-0"
            else Snapshot(name, ConsistencyPoint.parse(cp), parent, present, epoch_id if index == 0 else "", START_MS)
            for index, ((cp, name, present), parent) in enumerate(zip(records, parents, strict=True))
        )
    )


def beside(report: ReplicaReport, word: str) -> ReplicaReport:
    """The report with what its kind or its group is, or with one more snapshot beside the lineage."""
    if word.startswith("group="):
        return replace(report, group=word.removeprefix("group="))
    if word.startswith("~"):
        return replace(report, others=(*report.others, adopted(word[1:])))
    return replace(report, backend=word.removeprefix("backend="))


def adopted(name: str) -> Snapshot:
    """A snapshot that another tool made."""
    return Snapshot(name, create_time_ms=START_MS, origin=Origin.ADOPTED, note=f"auto-{name}")


def describe(action: e.Action) -> list[str]:
    """One action as a line, or none for what only wakes watchers."""
    match action:
        case e.Changed():
            return []
        case e.Persist():
            records = enumerate(action.records)
            # What is told of is stored with it, in one transaction.
            return [f"{'with' if at and isinstance(one, ClusterEvent) else 'store'} {kept(one)}" for at, one in records]
        case e.SendExamine():
            return [f"examine {action.stream} {action.examine_id} {' '.join(action.volumes)}"]
        case e.SendRecord():
            return [f"record {action.stream} {record_words(action.record)}"]
        case e.RefuseAgent():
            return [f"refuse {action.stream} {action.reason}"]
        case e.GiveOrder():
            return [f"order {action.order_id} {action.node} {order(action.order)}"]
        case e.Answer():
            return [f"answer {action.key} {row}" for row in answer(action.answer)]
        case e.Tell():
            return [f"tell {action.event.type}: {action.event.message}"]
        case e.RaiseTerm():
            return [f"raise term above {action.above}"]


def record_words(record) -> str:
    members = ",".join(record.members)
    return (
        f"{record.volume} epoch {record.epoch} ({record.epoch_id}) primary {record.primary} of {members} "
        f"newest {record.newest_cp} {record.newest_id}".rstrip()
    )


def kept(record: e.Kept) -> str:
    match record:
        case e.Volume(name, None):
            return f"volume {name} deleted"
        case e.Volume(_, entry):
            flags = [name for name in ("opening", "recovering") if getattr(entry, name)]
            bases = [f"base {node}={base}" for node, base in sorted(entry.bases.items())]
            return " ".join(["volume", record_words(entry.record), *flags, *bases])
        case ElectionRecord():
            if record.refusal is not None:
                return f"refusal {record.volume} {','.join(record.refusal.reasons)}: {record.refusal.message}"
            return f"election {record.volume} epoch {record.epoch} winner {record.winner}: {record.rule}"
        case Resync():
            return f"resync {record.id} {record.volume} {record.node} {record.state.value} {record.plan.action.value}"
        case NodeView():
            return f"node {record.name}"
        case ClusterEvent():
            return f"event {record.type}"
        case e.DeletedNode():
            return f"node {record.name} deleted"
        case e.Forgotten():
            return "forgotten"


def order(one: AnyOrder) -> str:
    header = one.order
    tip = "" if header.expected_tip is None else f" if tip {header.expected_tip or 'none'}"
    right = f"(epoch {header.epoch}{tip})"
    match one:
        case OpenEpoch():
            return f"open epoch {one.record.epoch}{' with the grant' if one.grant else ''} {right}"
        case TakeSnapshot():
            how = "opening" if one.opening else ("if modified" if one.only_if_modified else "now")
            return f"take snapshot {how} {right}"
        case TakeSnapshots():
            how = "if modified" if one.orders[0].only_if_modified else "now"
            tips = ", ".join(f"{each.order.volume} if tip {each.order.expected_tip or 'none'}" for each in one.orders)
            return f"take snapshots {how} as {one.group_id}: {tips}"
        case PrepareSend():
            what = "size of" if one.size_only else f"send for {one.resync_id} to {one.target_node}"
            return f"{what} {one.base or 'nothing'}..{one.target} {right}"
        case Receive():
            sources = ",".join(source.node for source in one.sources) or "nobody"
            own = " replacing own data" if one.replace_own_data else ""
            unrelated = " replacing unrelated data" if one.replace_unrelated else ""
            return (
                f"receive {one.resync_id} {one.base or 'nothing'}..{one.target} from {sources}{own}{unrelated} {right}"
            )
        case _:
            return f"{type(one).__name__} {right}"


def answer(value: object) -> list[str]:
    match value:
        case ResilverError():
            return [f"{value.reason}: {value.message}"]
        case ResyncsStarted():
            rows = [f"resync {one.id} {one.volume} {one.node}" for one in value.resyncs]
            return [*rows, *(refused(one) for one in value.refusals)] or ["nothing to do"]
        case Planned():
            rows = [
                f"plan {plan.volume} target {plan.target_cp} primary {plan.primary or 'nobody'}"
                for plan in value.volumes
            ]
            for plan in value.volumes:
                if plan.refusal is not None:
                    rows.append(f"  refused {','.join(plan.refusal.reasons)}")
                for row in plan.replicas:
                    cost = f" {row.size.bytes} bytes" if row.size is not None else ""
                    named = f" ({row.base_name})" if row.base and not row.base_cp.sequence else ""
                    rows.append(
                        f"  {row.node} {row.state.value} {row.action.value} {row.base}{named}..{row.target}{cost}"
                    )
            return rows
        case ElectionRecord():
            return [kept(value)]
        case SnapshotsTaken():
            rows = [f"snapshot {volume} {one.cp}" for volume, one in value.snapshots]
            return [*rows, *(refused(one) for one in value.refusals)]
        case _:
            return [type(value).__name__]


def refused(one: VolumeRefusal) -> str:
    where = f"{one.volume}/{one.node}" if one.node else one.volume
    return f"refused {where} {','.join(one.refusal.reasons)}: {one.refusal.message}"
