"""What the reading calls answer: each takes what the engine knows now and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from coordinator import views
from coordinator.core.cluster import ClusterEvent, ElectionRecord, Resync
from coordinator.core.words import nearest
from coordinator.explain import explain
from coordinator.office import Engine, Office
from coordinator.paging import page, page_of
from coordinator.requests import Names, check_origins
from coordinator.shown import Shown
from coordinator.wire import (
    election_to_proto,
    event_to_proto,
    node_to_proto,
    replica_plan_to_proto,
    resync_to_proto,
)
from resilver.errors import NotFound, Unavailable
from resilver.fields import check_id, check_name
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import volume_pb2

T = TypeVar("T")


async def get_cluster(office: Office) -> api.GetClusterResponse:
    """The cluster, its leader (whoever answers this) and its store, which may be out of reach at the moment."""
    identity = office.engine().identity
    store = api.StoreInfo()
    try:
        health = await office.store_health()
    except Unavailable:
        pass
    else:
        store = api.StoreInfo(kind=health.kind, healthy_count=health.healthy_count, member_count=health.member_count)
    myself = api.CoordinatorInfo(name=office.name, address=office.address, version=office.version, leading=True)
    return api.GetClusterResponse(
        cluster=identity.cluster,
        store_id=identity.store_id,
        leader=identity.name or office.name,
        term=identity.term,
        coordinators=[myself],
        store=store,
        insecure=office.insecure,
    )


# Nodes and volumes.


def _node(engine: Engine, name: str, now_ms: int) -> volume_pb2.Node:
    """A node that is known, or an agent that was turned away and says so by its problem."""
    nodes, refused = engine.nodes(), engine.refused().get(check_name(name, "node"))
    known = nodes.get(name) or (refused.node if refused is not None else None)
    if known is None:
        raise NotFound("NODE_NOT_FOUND", f"no node is named {name!r}{nearest(name, nodes)}", node=name)
    problems = views.problems_of_node(known, now_ms) if name in nodes else ()
    if refused is not None:
        problems = (refused.problem, *problems)
    return node_to_proto(known, views.problems_to_proto(problems), engine.limits(name))


def get_node(engine: Engine, request: api.GetNodeRequest, now_ms: int) -> api.GetNodeResponse:
    return api.GetNodeResponse(node=_node(engine, request.node, now_ms))


def list_nodes(engine: Engine, request: api.ListNodesRequest, now_ms: int) -> api.ListNodesResponse:
    names = {*engine.nodes(), *engine.refused()}
    found = page(request, names, str, lambda name: _node(engine, name, now_ms))
    return api.ListNodesResponse(nodes=found.messages, next_page_token=found.next_page_token)


def volume(engine: Engine, name: str, now_ms: int, *, full: bool = False) -> volume_pb2.Volume:
    return views.volume_to_proto(engine, engine.view(name), now_ms, full=full)


def get_volume(engine: Engine, request: api.GetVolumeRequest, now_ms: int) -> api.GetVolumeResponse:
    name = check_name(request.volume, "volume")
    return api.GetVolumeResponse(volume=volume(engine, name, now_ms, full=_full(request.view)))


def list_volumes(engine: Engine, shown: Shown, request: api.ListVolumesRequest, now_ms: int) -> api.ListVolumesResponse:
    wanted = Names.of(engine).some_volumes(request.volumes) if request.volumes else engine.volume_names()

    def encoded(name: str) -> bytes:
        if not _full(request.view):
            return shown.encoded(engine, name, now_ms)
        return api.ListVolumesResponse(volumes=[volume(engine, name, now_ms, full=True)]).SerializeToString()

    found = page_of(request, wanted, str, encoded, len)
    response = api.ListVolumesResponse.FromString(b"".join(found.messages))
    response.next_page_token = found.next_page_token
    return response


def _full(view: int) -> bool:
    return view == api.VOLUME_VIEW_FULL


# Snapshots and preserved copies.


def _wanted(engine: Engine, volume_name: str, node: str) -> Iterable[str]:
    """The volume named, or all; both names are checked."""
    if not volume_name and not node:
        return engine.volume_names()
    names = Names.of(engine)
    if node:
        names.node(node)
    return (names.volume(volume_name),) if volume_name else engine.volume_names()


def list_snapshots(engine: Engine, request: api.ListSnapshotsRequest) -> api.ListSnapshotsResponse:
    origins = check_origins(request.origins)
    held = [
        one
        for name in _wanted(engine, request.volume, request.node)
        for one in views.held_snapshots(engine.view(name), request.node)
        if not origins or one.snapshot.origin in origins
    ]
    found = page(request, held, lambda one: one.key, lambda one: views.snapshot_to_view(engine, one))
    return api.ListSnapshotsResponse(snapshots=found.messages, next_page_token=found.next_page_token)


def list_preserved(engine: Engine, request: api.ListPreservedRequest) -> api.ListPreservedResponse:
    copies = [
        one
        for name in _wanted(engine, request.volume, request.node)
        for one in views.preserved_copies(engine.view(name), request.node)
    ]
    found = page(request, copies, lambda one: one.key, lambda one: one.to_proto())
    return api.ListPreservedResponse(preserved=found.messages, next_page_token=found.next_page_token)


# Decisions.


def list_elections(engine: Engine, request: api.ListElectionsRequest) -> api.ListElectionsResponse:
    name = Names.of(engine).volume(request.volume)
    found = page(request, engine.elections(name), _election_key, election_to_proto)
    return api.ListElectionsResponse(elections=found.messages, next_page_token=found.next_page_token)


def _election_key(election: ElectionRecord) -> str:
    return f"{views.descending(election.create_time_ms)}{election.epoch_id}"


def explain_volume(engine: Engine, request: api.ExplainVolumeRequest, now_ms: int) -> api.ExplainVolumeResponse:
    view = engine.view(check_name(request.volume, "volume"))
    if request.node and check_name(request.node, "node") not in view.replicas:
        message = f"{view.name} has no replica on {request.node!r}{nearest(request.node, view.replicas)}"
        raise NotFound("NODE_NOT_FOUND", message, node=request.node)
    explained = explain(engine, view, request.node, now_ms)
    rows = [row for row in explained.plan.replicas if not request.node or row.node == request.node]
    return api.ExplainVolumeResponse(
        election=None if explained.decided is None else election_to_proto(explained.decided),
        would_be=election_to_proto(explained.would_be),
        replicas=[replica_plan_to_proto(row) for row in rows],
        text=explained.text,
    )


# Resyncs and events.


def resync(engine: Engine, resync_id: str) -> Resync:
    """Raises `NotFound("RESYNC_NOT_FOUND")`."""
    return found_in(engine.resyncs(), check_id(resync_id, "id"))


def found_in(resyncs: Mapping[str, Resync], resync_id: str) -> Resync:
    one = resyncs.get(resync_id)
    if one is None:
        begun = [known for known in resyncs if known.startswith(resync_id)]
        hint = f"; did you mean {begun[0]!r}?" if len(begun) == 1 else ""
        raise NotFound("RESYNC_NOT_FOUND", f"no resync has the id {resync_id!r}{hint}", resync=resync_id)
    return one


def list_resyncs(engine: Engine, request: api.ListResyncsRequest) -> api.ListResyncsResponse:
    _wanted(engine, request.volume, request.node)
    wanted = [
        one
        for one in engine.resyncs().values()
        if (not request.volume or one.volume == request.volume)
        and (not request.node or one.node == request.node)
        and not (request.active_only and one.state.final)
    ]
    found = page(request, wanted, _resync_key, resync_to_proto)
    return api.ListResyncsResponse(resyncs=found.messages, next_page_token=found.next_page_token)


def _resync_key(one: Resync) -> str:
    return f"{views.descending(one.create_time_ms)}{one.volume}\0{one.node}\0{one.id}"


def about(volume_name: str, node: str) -> Callable[[ClusterEvent], bool]:
    """Whether an event is of that volume and that node; empty for any."""
    return lambda event: (not volume_name or event.volume == volume_name) and (not node or event.node == node)


def list_events(office: Office, request: api.ListEventsRequest) -> api.ListEventsResponse:
    """Newest first."""
    _wanted(office.engine(), request.volume, request.node)
    events = filter(about(request.volume, request.node), office.events_after(0))
    found = page(request, events, lambda event: views.descending(event.sequence), event_to_proto)
    newest = office.events_span().newest
    return api.ListEventsResponse(events=found.messages, next_page_token=found.next_page_token, newest_sequence=newest)


def size_on(engine: Engine, snapshot_id: str, node: str) -> int:
    """The size of a snapshot or preserved copy on a node. Raises `NotFound("SNAPSHOT_NOT_FOUND")`."""
    elsewhere: set[str] = set()
    for name in engine.volume_names():
        view = engine.view(name)
        for held in views.held_snapshots(view):
            if held.snapshot.id == snapshot_id:
                elsewhere.update(held.nodes)
                if node in held.nodes:
                    return held.snapshot.size_bytes
        for preserved in views.preserved_copies(view):
            if preserved.copy.id == snapshot_id:
                elsewhere.add(preserved.node)
                if preserved.node == node:
                    return preserved.copy.size_bytes
    where = f", but on {', '.join(sorted(elsewhere))}" if elsewhere else nearest(snapshot_id, ())
    raise NotFound("SNAPSHOT_NOT_FOUND", f"{snapshot_id} is not on {node}{where}", snapshot=snapshot_id)
