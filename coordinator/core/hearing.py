"""What the coordinator makes of what agents say: who is there, what each replica is, which CPs count.

A report is the only thing that changes what is believed of a replica. What it makes possible (an acknowledgement, the
end of a resync, an opening that goes on, a prune, a blocked commit) follows at once.
"""

from __future__ import annotations

from dataclasses import fields, replace
from operator import attrgetter
from typing import Final

from coordinator.core import bases, decide, ending, prepare, pruning, retrying
from coordinator.core.claims import Problem, reconcile
from coordinator.core.cluster import NodeView, Resync
from coordinator.core.context import RECORDS_AT_ONCE_MAX, Context
from coordinator.core.events import (
    AgentConnected,
    AgentHeard,
    Event,
    Forgotten,
    ProgressReported,
    RaiseTerm,
    RefuseAgent,
    ReplicaReported,
    SendExamine,
    SendRecord,
    Volume,
)
from coordinator.core.history import TERM_MAX
from coordinator.core.known import Heard, RefusedAgent
from coordinator.core.status import status_of
from coordinator.core.tasks import Flow
from resilver.errors import ResilverError
from resilver.lineage import Origin
from resilver.volume import Grant, Progress, ReplicaReport, ResyncState

OPENING_AGAIN_MS: Final = 5_000
REFUSED_MAX: Final = 100
REFUSED_SHOWN_MS: Final = 30_000

_LASTING: Final = attrgetter(
    *(one.name for one in fields(ReplicaReport) if one.name not in ("examine_time_ms", "free_bytes"))
)
"""What makes a report another one than the last."""


# ------------------------------------------------------------ agents come and go


def connected(context: Context, event: AgentConnected) -> None:
    node = event.node
    problem = _mismatch(context, event)
    if problem is not None:
        _refuse(context, event, problem)
        return
    context.refused.pop(node.name, None)
    mine = context.identity
    same = event.highest_term == mine.term and event.highest_leader_id not in ("", mine.leader_id)
    if event.highest_term > mine.term or same:
        _store_forgot(context, event)
        context.emit(RaiseTerm(event.highest_term))
    context.open_stream(event.stream, node)
    context.allow(node.name, event.limits)
    boots = {one.boot for one in context.streams.of(node.name).values()}
    known = context.nodes.get(node.name)
    if len(boots) > 1:
        duplicate = replace(known or node, connected=True, duplicate=True, last_heard_ms=context.now_ms)
        context.put_node(duplicate)
        message = f"two agents call themselves {node.name}: {(known or node).address} and {node.address}"
        context.tell_once("DUPLICATE_NODE", message, node=node.name, reason="DUPLICATE_NODE")
    else:
        _introduce(context, known, node)
    context.tasks.touch(f"node:{node.name}")
    for volume in node.volumes:
        context.changed(volume)


def _mismatch(context: Context, event: AgentConnected) -> Problem | None:
    """Why this coordinator is not the agent's."""
    mine, name = context.identity, event.node.name
    if event.cluster != mine.cluster:
        message = (
            f"this is cluster {mine.cluster!r}, and the agent of node {name} belongs to {event.cluster!r}: correct "
            "`cluster` or `coordinators` in its configuration"
        )
        return Problem("CLUSTER_MISMATCH", message)
    if event.store_id and event.store_id != mine.store_id:
        adopt = f"resilver store adopt {mine.store_id}"
        message = (
            f"node {name} belongs to another store, {event.store_id}; if that one was replaced on purpose, have the "
            "agents adopt this one"
        )
        return Problem("WRONG_STORE", message, adopt)
    if event.highest_term > max(mine.term, TERM_MAX):
        message = (
            f"node {name} says that it has obeyed term {event.highest_term}, and above {mine.term} no more than "
            f"{TERM_MAX} is believed: look at its state_dir"
        )
        return Problem("INVALID_FIELD", message)
    return None


def not_taken(context: Context, event: Event, error: ResilverError) -> None:
    """What an agent says cannot be stored: a hello is refused, of anything else the operator is told."""
    if isinstance(event, AgentConnected):
        disconnected(context, event.stream)
        _refuse(context, event, Problem(error.reason, error.message))
        return
    volume = event.report.volume if isinstance(event, ReplicaReported) else ""
    node = context.speaker(event.stream).name if isinstance(event, ReplicaReported) else ""
    context.tell_once("NOT_STORED", error.message, volume=volume, node=node, reason=error.reason)


def _refuse(context: Context, event: AgentConnected, problem: Problem) -> None:
    """Tells the agent, which will ask again every few seconds, and once the operator."""
    name = event.node.name
    # Logs and events have no field of their own for the command.
    said = f"{problem.message}: {problem.next_command}" if problem.next_command else problem.message
    context.emit(
        RefuseAgent(
            event.stream,
            problem.reason,
            said,
            adopt=problem.reason == "WRONG_STORE" and context.adopting,
        )
    )
    known = context.refused.get(name)
    if known is None or known.problem != problem:
        context.tell_once("AGENT_REFUSED", said, node=name, reason=problem.reason)
    if known is not None or len(context.refused) < REFUSED_MAX:
        context.refused[name] = RefusedAgent(replace(event.node, connected=False), problem, context.now_ms)


def _store_forgot(context: Context, event: AgentConnected) -> None:
    """Terms are stored before anybody hears of them: a store that does not know this one is an older copy of itself."""
    said = f"{event.node.name} has obeyed term {event.highest_term}, which the store has never given"
    for volume, entry in list(context.entries.items()):
        if entry.record.epoch and not entry.recovering:
            gap = replace(entry, recovering=True)
            gap = reconcile(replace(context.view(volume), entry=gap)) or gap
            context.persist(Volume(volume, gap))
            context.tell("RECOVERING", f"{said}; the next election of {volume} wants every known member", volume=volume)


def _introduce(context: Context, known: NodeView | None, node: NodeView) -> None:
    made = replace(node, connected=True, duplicate=False, last_heard_ms=context.now_ms)
    lasting = replace(made, boot="", last_heard_ms=0, connected=False)
    if known is None or replace(known, boot="", last_heard_ms=0, connected=False, duplicate=False) != lasting:
        context.persist(lasting)
    context.put_node(made)
    for volume in node.volumes:
        entry = context.entries.get(volume)
        if entry is not None and node.name in entry.removed:
            removed = tuple(one for one in entry.removed if one != node.name)
            context.persist(Volume(volume, replace(entry, removed=removed)))


def disconnected(context: Context, stream: str) -> None:
    gone = context.close_stream(stream)
    name = gone.name if gone is not None else ""
    known = context.nodes.get(name)
    if known is None:
        return
    left = {one.boot: one for one in context.streams.of(name).values()}
    if not left and not known.duplicate:
        _last_words(context, stream, known)
    context.put_node(replace(known, connected=bool(left), duplicate=len(left) > 1))
    if len(left) == 1 and known.duplicate:
        # The one that is left was not believed while there were two: it is itself again, and asked anew.
        last = next(iter(left.values()))
        _introduce(context, context.nodes[name], last)
        context.emit(SendExamine(context.stream_of(name), context.new_id(), last.volumes))
    for volume, examine in context.examines.items():
        if examine.answered.get(name) not in left:
            examine.answered.pop(name, None)  # the next start of the agent may find something else
        if name in examine.waiting and not left:
            examine.waiting.discard(name)
            context.tasks.touch(f"examine:{volume}")
    context.tasks.touch(f"node:{name}")
    for volume in known.volumes:
        context.changed(volume)


def _last_words(context: Context, stream: str, node: NodeView) -> None:
    """A heartbeat says that nothing has changed since the report: what was reported was last heard with it."""
    for volume in node.volumes:
        of_volume = context.heard.get(volume, {})
        heard = of_volume.get(node.name)
        if heard is not None and heard.stream == stream and heard.time_ms < node.last_heard_ms:
            of_volume[node.name] = replace(heard, time_ms=node.last_heard_ms)


def heartbeat(context: Context, event: AgentHeard) -> None:
    heard_from(context, event.stream)
    name = context.speaker(event.stream).name
    if name and event.limits is not None:
        context.allow(name, event.limits)


def heard_from(context: Context, stream: str) -> None:
    known = context.nodes.get(context.speaker(stream).name)
    if known is not None and known.last_heard_ms != context.now_ms:
        context.nodes.put(replace(known, last_heard_ms=context.now_ms))


# ------------------------------------------------------------ reports


def reported(context: Context, event: ReplicaReported) -> None:
    heard_from(context, event.stream)
    speaker = context.speaker(event.stream)
    name = speaker.name
    if not name:
        return
    volume = event.report.volume
    old = context.heard.get(volume, {}).get(name)
    if old is not None and old.boot == speaker.boot and event.seq <= old.seq:
        return  # also from a stream that was left for a newer one, and is read to its end only now
    changed = old is None or not _same(old.report, event.report)
    heard = Heard(event.report, event.stream, speaker.boot, event.seq, context.now_ms)
    context.hear(volume, name, heard, changed=changed or old is None or old.stream != event.stream)
    examine = context.examines.get(volume)
    if examine is not None and event.examine_id == examine.id and context.reachable(name):
        examine.answered[name] = speaker.boot
        examine.waiting.discard(name)
        context.tasks.touch(f"examine:{volume}")
    if not context.reachable(name):
        return
    if changed:
        context.changed(volume)
    known = context.entries.get(volume)
    _learn(context, volume, event.report)
    _acknowledge(context, volume, name, event.report)
    if context.entries.get(volume) is known:
        _tell_record(context, volume, name, event)
    _close(context, volume, name, event.report)
    bases.note(context, volume, name)
    _go_on(context, volume, name, event.report)


def _learn(context: Context, volume: str, report: ReplicaReport) -> None:
    """A record that is higher than the store's, or names more members of a store that has forgotten some, is taken on
    at once; see `decide.learn`.
    """
    entry = context.entries.get(volume)
    if report.record is None or (entry is not None and report.record == entry.record):
        return
    if reconcile(context.view(volume)) is not None:
        decide.learn(context, volume, None)


def _acknowledge(context: Context, volume: str, node: str, report: ReplicaReport) -> None:
    """A CP of the present epoch, on the primary that holds the grant, becomes the newest known one."""
    entry = context.entries.get(volume)
    tip = report.lineage.tip
    if entry is None or tip is None or entry.record.primary != node or tip.id == entry.record.newest_id:
        return
    record = entry.record
    if report.grant != Grant(record.volume_id, record.epoch, record.epoch_id) or tip.epoch_id != record.epoch_id:
        return
    if record.newest_id and report.lineage.find(record.newest_id) is None:
        return
    raised = replace(record, newest_cp=tip.cp, newest_id=tip.id)
    context.put_record(volume, raised, newest_cp_time_ms=tip.create_time_ms, opening=False)
    context.tell("CONSISTENCY_POINT", f"{volume} is at {tip.cp} on {node}", volume=volume, node=node)


def _tell_record(context: Context, volume: str, node: str, event: ReplicaReported) -> None:
    """A member that knows an older record is told the present one; a stranger's data is left alone."""
    entry = context.entries.get(volume)
    if entry is None or node not in entry.record.members or event.report.record == entry.record:
        return
    if event.report.volume_id in ("", entry.record.volume_id):
        context.emit(SendRecord(event.stream, entry.record))


def _close(context: Context, volume: str, node: str, report: ReplicaReport) -> None:
    """The report that shows the goal in the replica's lineage ends its resync, and makes the replica a member."""
    joined = _taken_in(context, volume, node, report)
    also = (joined,) if joined is not None else ()
    resync = context.active_resync(volume, node)
    if resync is not None and _has_goal(resync, report):
        progress = resync.progress or Progress(resync.id, volume, ResyncState.SUCCEEDED)
        done = progress.done_bytes if progress.total_bytes is None else progress.total_bytes
        ended = replace(resync, progress=replace(progress, state=ResyncState.SUCCEEDED, done_bytes=done))
        ending.finish(context, ended, ResyncState.SUCCEEDED, None, *also)
    elif also:
        context.persist(*also)
    if joined is not None and joined.entry is not None:
        context.send_record(joined.entry.record)


def _taken_in(context: Context, volume: str, node: str, report: ReplicaReport) -> Volume | None:
    """The volume with the replica as a member, if that is new. One that has the goal of one of its resyncs of this
    epoch is a mirror, however that resync ended here: given up as silent, or cancelled when its commit had begun. Left
    out, it would have no base pinned, no election would ask for it, and no other resync would take it in, because it
    needs none. To have one member more only makes elections ask for more. What has succeeded took it in when it ended:
    it does not undo `remove`.
    """
    entry = context.entries.get(volume)
    if entry is None or node in entry.record.members:
        return None
    epoch = entry.record.epoch
    ours = (one for one in context.resyncs.of(volume) if one.node == node and one.epoch == epoch)
    if not any(one.state is not ResyncState.SUCCEEDED and _has_goal(one, report) for one in ours):
        return None
    members = tuple(sorted({*entry.record.members, node}))
    return Volume(volume, replace(entry, record=replace(entry.record, members=members)))


def _has_goal(resync: Resync, report: ReplicaReport) -> bool:
    """Whether the report shows what the resync was to bring."""
    if report.lineage.find(resync.plan.target) is None:
        return False
    said_done = resync.progress is not None and resync.progress.state is ResyncState.SUCCEEDED
    return said_done or not resync.held_before


def _go_on(context: Context, volume: str, node: str, report: ReplicaReport) -> None:
    """What a report makes possible: finishing an opening, a blocked commit, pruning, knowing a delta's size."""
    entry = context.entries.get(volume)
    if entry is None:
        return
    if entry.opening and node == entry.record.primary and volume not in context.locks:
        _spawn_once(context, f"opening {volume}", decide.finish_opening(context, volume))
    lineage = report.lineage.records
    beyond = len(lineage) > report.keep_last and sum(
        record.present and record.origin is not Origin.ADOPTED for record in lineage
    )
    if beyond > report.keep_last and volume not in context.locks:
        _spawn_once(context, f"prune {volume} {node}", pruning.prune_by_itself(context, volume, node))
    retrying.retry_blocked(context, volume, node)
    _size_up(context, volume, node)


def _size_up(context: Context, volume: str, node: str) -> None:
    """Asks the primary, once, what each replica that is behind lacks."""
    view = context.view(volume)
    if view.primary is None or not view.primary.fresh or view.entry is None or view.entry.opening:
        return
    tip = view.primary.lineage.tip_id
    for member in view.replicas if node == view.record.primary else (node,):
        common = status_of(view, member).common
        if member == view.record.primary or common is None or common.id == tip:
            continue
        if (volume, common.id, tip) not in context.sizes:
            flow = _sizing(context, volume, view.record.primary, common.id, tip)
            _spawn_once(context, f"size {volume} {common.id} {tip}", flow)


def _spawn_once(context: Context, name: str, flow: Flow[None]) -> None:
    """Starts a flow unless one of that name was started in the last few seconds."""
    now = context.now_ms
    if now - context.busy.get(name, 0) < OPENING_AGAIN_MS:
        flow.close()
        return
    context.busy[name] = now
    context.tasks.spawn(flow)


def progressed(context: Context, event: ProgressReported) -> None:
    heard_from(context, event.stream)
    name = context.speaker(event.stream).name
    if not name or not context.reachable(name):
        return
    ending.note_progress(context, name, event.progress)
    if event.progress.state is ResyncState.SUCCEEDED:
        context.emit(SendExamine(event.stream, context.new_id(), (event.progress.volume,)))


def _forget_removed(context: Context) -> None:
    """The resyncs of a volume that is removed go with it, those that had just ended then a while later."""
    for volume in [one for one in context.resyncs.volumes() if one not in context.entries]:
        for resync in filter(context.over, context.resyncs.of(volume)[:RECORDS_AT_ONCE_MAX]):
            context.resyncs.drop(resync.id)
            context.persist(Forgotten(resync))


def tick(context: Context) -> None:
    _forget_removed(context)
    context.refused = {
        name: one for name, one in context.refused.items() if context.now_ms - one.time_ms < REFUSED_SHOWN_MS
    }
    context.busy = {name: at for name, at in context.busy.items() if context.now_ms - at < OPENING_AGAIN_MS}
    for name, entry in list(context.entries.items()):
        if entry.pause is not None and entry.pause.until_ms is not None and context.now_ms >= entry.pause.until_ms:
            context.persist(Volume(name, replace(entry, pause=None)))
            context.tell("RESUMED", f"{name}: the pause has run out", volume=name)
        primary = entry.record.primary
        if entry.opening and name not in context.locks and context.reachable(primary):
            _spawn_once(context, f"opening {name}", decide.finish_opening(context, name))


def _sizing(context: Context, volume: str, node: str, base: str, target: str) -> Flow[None]:
    yield from prepare.size_of(context, volume, node, base, target)


def _same(old: ReplicaReport, new: ReplicaReport) -> bool:
    return _LASTING(old) == _LASTING(new)
