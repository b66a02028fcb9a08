"""The Coordinator service of a real coordinator: every call, its refusals, and what it streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import aio

from resilver.status_details import to_error
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import volume_pb2 as pb
from resilver.volume import LiveState
from tests.coordinator.running import WITHIN_S, client, eventually
from tests.coordinator.small_agent import DELTA_BYTES, SmallAgent, empty, written


@contextlib.asynccontextmanager
async def mirrored(coordinator, *, nodes="abc"):
    """A client, and agents: a has data of vm1, the others are empty."""
    async with client(coordinator) as stub, contextlib.AsyncExitStack() as stack:
        world: dict[str, SmallAgent] = {}
        for node in nodes:
            replica = written("vm1") if node == "a" else empty("vm1")
            agent = SmallAgent(node, world, replicas={"vm1": replica})
            await stack.enter_async_context(agent.running(coordinator))
        await eventually(
            lambda: get(stub), lambda one: len(one.replicas) == len(nodes) and all(r.backend for r in one.replicas)
        )
        yield stub, world


async def get(stub, name="vm1", view=api.VOLUME_VIEW_BASIC) -> pb.Volume:
    return (await stub.GetVolume(api.GetVolumeRequest(volume=name, view=view))).volume


async def refused(call):
    """The error that a call ends with."""
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return to_error(caught.value)


async def start(stub, **fields) -> api.StartResyncResponse:
    fields = fields or {"volumes": ["vm1"]}
    return await stub.StartResync(api.StartResyncRequest(request_id=str(uuid.uuid4()), **fields))


async def brought(stub, world) -> list[pb.Resync]:
    """Resyncs vm1 to the end."""
    for agent in world.values():
        agent.receiving.set()
    started = await start(stub)
    assert not started.refusals
    last: dict[str, pb.Resync] = {}
    async with asyncio.timeout(WITHIN_S):
        async for answer in stub.WatchResyncs(api.WatchResyncsRequest(ids=[one.id for one in started.resyncs])):
            last |= {one.id: one for one in answer.resyncs}
    return list(last.values())


async def test_from_first_sight_to_in_sync(coordinator):
    async with mirrored(coordinator) as (stub, world):
        assert (await get(stub)).state == pb.VOLUME_STATE_UNINITIALIZED
        plan = (await stub.PlanResync(api.PlanResyncRequest(volumes=["vm1"]))).plan
        assert plan.etag
        assert (plan.volumes[0].primary, plan.volumes[0].takes_snapshot) == ("a", True)
        assert {row.node: row.action for row in plan.volumes[0].replicas} == {
            "b": pb.PLAN_ACTION_FULL,
            "c": pb.PLAN_ACTION_FULL,
        }
        ended = await brought(stub, world)
        assert sorted(one.node for one in ended) == ["b", "c"]
        for one in ended:
            assert one.state == pb.RESYNC_STATE_SUCCEEDED
            assert (one.done_bytes, one.total_bytes) == (DELTA_BYTES, DELTA_BYTES)
            assert one.principal == "127.0.0.1"
            assert one.plan.target_cp.text == "1-1"
        volume = await eventually(lambda: get(stub), lambda one: one.state == pb.VOLUME_STATE_HEALTHY)
        assert (volume.epoch, volume.primary, volume.newest_cp.text) == (1, "a", "1-1")
        assert all(one.member and one.state == pb.REPLICA_STATE_IN_SYNC for one in volume.replicas)
        full = await get(stub, view=api.VOLUME_VIEW_FULL)
        assert [record.cp.text for record in full.replicas[1].lineage] == ["1-1"]


async def test_a_resync_is_watched_from_half_to_whole_and_the_watch_ends(coordinator):
    async with mirrored(coordinator, nodes="ab") as (stub, world):
        started = await start(stub)
        (resync,) = started.resyncs
        watch = stub.WatchResyncs(api.WatchResyncsRequest(volumes=["vm1"]))
        seen: list[pb.Resync] = []
        async with asyncio.timeout(WITHIN_S):
            async for answer in watch:
                seen += answer.resyncs
                assert answer.now_time.seconds
                if seen[-1].done_bytes == DELTA_BYTES // 2:
                    assert seen[-1].HasField("remaining_duration")
                    assert [(one.node, one.wire_bytes) for one in seen[-1].sources] == [("a", DELTA_BYTES // 2)]
                    assert (await get(stub)).replicas[1].resync == resync.id
                    world["b"].receiving.set()
        assert await watch.code() is grpc.StatusCode.OK
        assert seen[-1].state == pb.RESYNC_STATE_SUCCEEDED
        done = [one.done_bytes for one in seen]
        assert done == sorted(done)
        assert (await stub.GetResync(api.GetResyncRequest(id=resync.id))).resync == seen[-1]
        listed = (await stub.ListResyncs(api.ListResyncsRequest(node="b"))).resyncs
        assert [one.id for one in listed] == [resync.id]
        assert not (await stub.ListResyncs(api.ListResyncsRequest(active_only=True))).resyncs


async def test_a_watch_of_nothing_that_runs_ends_at_once(coordinator):
    async with mirrored(coordinator, nodes="a") as (stub, _):
        async with asyncio.timeout(WITHIN_S):
            answers = [answer async for answer in stub.WatchResyncs(api.WatchResyncsRequest(volumes=["vm1"]))]
        assert len(answers) == 1
        assert not answers[0].resyncs


async def test_a_resync_is_cancelled(coordinator):
    async with mirrored(coordinator, nodes="ab") as (stub, _):
        (resync,) = (await start(stub)).resyncs
        kept = await stub.CancelResync(api.CancelResyncRequest(id=resync.id, validate_only=True))
        assert kept.resync.state != pb.RESYNC_STATE_CANCELLED
        cancelled = (await stub.CancelResync(api.CancelResyncRequest(id=resync.id))).resync
        assert cancelled.state == pb.RESYNC_STATE_CANCELLED
        assert cancelled.refusal.message
        error = await refused(stub.CancelResync(api.CancelResyncRequest(id=resync.id[:8])))
        assert error.reason == "RESYNC_NOT_FOUND"
        assert resync.id in error.message


async def test_the_same_request_is_carried_out_once(coordinator):
    async with mirrored(coordinator) as (stub, world):
        await brought(stub, world)
        request = api.CreateSnapshotRequest(request_id=str(uuid.uuid4()), volumes=["vm1"], note="before the upgrade")
        first, second = await asyncio.gather(stub.CreateSnapshot(request), stub.CreateSnapshot(request))
        assert first == second == await stub.CreateSnapshot(request)
        assert [(one.cp.text, one.note) for one in first.snapshots] == [("1-2", "before the upgrade")]
        request.note = "another"
        assert (await refused(stub.CreateSnapshot(request))).reason == "REQUEST_ID_REUSED"
        volume = await eventually(lambda: get(stub), lambda one: one.newest_cp.text == "1-2")
        assert volume.newest_cp_time.seconds


async def test_a_stale_replica_is_planned_and_an_old_plan_is_refused(coordinator):
    async with mirrored(coordinator) as (stub, world):
        await brought(stub, world)
        await stub.CreateSnapshot(api.CreateSnapshotRequest(volumes=["vm1"]))
        volume = await eventually(lambda: get(stub), lambda one: one.replicas[1].HasField("out_of_sync_bytes"))
        assert (volume.state, volume.replicas[1].behind_cps) == (pb.VOLUME_STATE_DEGRADED, 1)
        assert volume.replicas[1].out_of_sync_bytes == DELTA_BYTES
        assert volume.replicas[1].behind_duration.seconds < 60
        plan = (await stub.PlanResync(api.PlanResyncRequest(volumes=["vm1"], nodes=["b"]))).plan
        (row,) = plan.volumes[0].replicas
        assert (row.node, row.action, row.base_cp.text, row.target_cp.text, row.exact) == (
            ("b", pb.PLAN_ACTION_DELTA, "1-1", "1-2", True)
        )
        assert row.copy_bytes == DELTA_BYTES
        error = await refused(start(stub, volumes=["vm1"], plan_etag="00000000"))
        assert (error.reason, error.exit_code) == ("PLAN_CHANGED", 3)
        assert error.next_command == "resilver plan vm1"
        dry = await start(stub, volumes=["vm1"], validate_only=True)
        assert not dry.resyncs
        started = await start(stub, volumes=["vm1"], nodes=["b"], plan_etag=plan.etag)
        assert [one.node for one in started.resyncs] == ["b"]


async def test_an_election_is_refused_and_then_taken(coordinator):
    async with mirrored(coordinator, nodes="bc") as (stub, world), contextlib.AsyncExitStack() as stack:
        first = SmallAgent("a", world, replicas={"vm1": written("vm1")})
        await stack.enter_async_context(first.running(coordinator))
        await eventually(lambda: get(stub), lambda one: any(r.backend and r.node == "a" for r in one.replicas))
        await brought(stub, world)
        first.now("vm1", live=first.replicas["vm1"].live.__class__(LiveState.MODIFIED))
        await eventually(lambda: get(stub), lambda one: one.replicas[0].live.state == pb.LIVE_STATE_MODIFIED)
        before = await get(stub)
        await stack.aclose()
        await eventually(lambda: get(stub), lambda one: not one.replicas[0].reachable)

        error = await refused(stub.ElectPrimary(api.ElectPrimaryRequest(volume="vm1", etag=before.etag)))
        assert (error.reason, error.exit_code) == ("ETAG_MISMATCH", 3)
        election = (await stub.ElectPrimary(api.ElectPrimaryRequest(volume="vm1"))).election
        assert election.refusal.reasons == ["PRIMARY_AWAY"]
        assert [one.node for one in election.refusal.losses] == ["a"]
        started = await start(stub)
        assert not started.resyncs
        assert started.refusals[0].refusal.reasons == ["PRIMARY_AWAY"]

        request = api.ElectPrimaryRequest(volume="vm1", accept_loss_nodes=["a"], validate_only=True)
        would = (await stub.ElectPrimary(request)).election
        assert would.winner in ("b", "c")
        assert (await get(stub)).primary == "a"
        request.validate_only = False
        request.etag = (await get(stub)).etag
        election = (await stub.ElectPrimary(request)).election
        assert (election.epoch, election.winner, election.previous_primary) == (2, would.winner, "a")
        assert election.accepted_losses == ["a"]
        volume = await eventually(lambda: get(stub), lambda one: one.newest_cp.text == "2-2")
        assert (volume.epoch, volume.primary) == (2, would.winner)

        history = (await stub.ListElections(api.ListElectionsRequest(volume="vm1"))).elections
        assert (history[0].epoch, history[-1].epoch) == (2, 1)
        assert any(one.refusal.reasons == ["PRIMARY_AWAY"] for one in history)
        explained = await stub.ExplainVolume(api.ExplainVolumeRequest(volume="vm1", node="a"))
        assert explained.election.epoch == 2
        assert f"Primary is {would.winner} since" in explained.text
        assert "WHY a IS UNKNOWN" in explained.text
        assert explained.would_be.winner == would.winner


async def test_snapshots_are_listed_pinned_dropped_and_exported(coordinator):
    async with mirrored(coordinator) as (stub, world):
        await brought(stub, world)
        for _ in range(3):
            await stub.CreateSnapshot(api.CreateSnapshotRequest(all=True))
        await eventually(lambda: get(stub), lambda one: one.newest_cp.text == "1-4")
        pages, token = [], ""
        while True:
            request = api.ListSnapshotsRequest(volume="vm1", page_size=3, page_token=token)
            answer = await stub.ListSnapshots(request)
            pages.append([one.cp.text for one in answer.snapshots])
            token = answer.next_page_token
            if not token:
                break
        assert pages == [["1-4", "1-3", "1-2"], ["1-1"]]
        listed = (await stub.ListSnapshots(api.ListSnapshotsRequest(node="a", origins=[pb.ORIGIN_RESILVER]))).snapshots
        newest, oldest = listed[0], listed[-1]
        assert [copy.node for copy in oldest.copies] == ["a", "b", "c"]
        assert "tip" in newest.copies[0].pinned_by
        error = await refused(stub.DeleteSnapshot(api.DeleteSnapshotRequest(id=newest.id, nodes=["a"])))
        assert error.reason in ("PINNED", "LAST_COPY")

        pruned = await stub.PruneSnapshots(api.PruneSnapshotsRequest(volume="vm1", keep_last=1, validate_only=True))
        assert {one.node for one in pruned.kept} == {"a", "b", "c"}
        pruned = await stub.PruneSnapshots(api.PruneSnapshotsRequest(volume="vm1", keep_last=1))
        assert {one.id for one in pruned.dropped} == {listed[1].id, listed[2].id}
        left = (await stub.ListSnapshots(api.ListSnapshotsRequest(volume="vm1"))).snapshots
        assert [one.cp.text for one in left] == ["1-4", "1-1"]

        export = api.ExportSnapshotRequest(id=newest.id, node="a", path="/srv/x.img")
        assert (await stub.ExportSnapshot(export)).path == "/srv/x.img"
        export.validate_only = True
        assert (await stub.ExportSnapshot(export)).size_bytes == 1 << 20
        export.node = "b"
        error = await refused(stub.ExportSnapshot(export))
        assert (error.reason, "but on a" in error.message) == ("SNAPSHOT_NOT_FOUND", True)
        assert not (await stub.ListPreserved(api.ListPreservedRequest())).preserved


async def test_a_pause_keeps_resyncs_from_starting(coordinator):
    async with mirrored(coordinator, nodes="ab") as (stub, world):
        pause = api.PauseVolumeRequest(volumes=["vm1"], reason="backup", pause_duration=Duration(seconds=3600))
        assert (await refused(stub.PauseVolume(pause))).reason == "OPENING"
        assert not (await stub.PauseVolume(api.PauseVolumeRequest(all=True, reason="backup"))).volumes
        await brought(stub, world)
        pause.validate_only = True
        assert not (await stub.PauseVolume(pause)).volumes[0].HasField("pause")
        pause.validate_only = False
        (volume,) = (await stub.PauseVolume(pause)).volumes
        assert (volume.pause.reason, volume.pause.principal) == ("backup", "127.0.0.1")
        assert (await start(stub)).refusals[0].refusal.reasons == ["PAUSED"]
        (volume,) = (await stub.ResumeVolume(api.ResumeVolumeRequest(all=True))).volumes
        assert not volume.HasField("pause")


async def test_members_are_removed_once_they_are_gone(coordinator):
    async with mirrored(coordinator, nodes="ab") as (stub, world), contextlib.AsyncExitStack() as stack:
        third = SmallAgent("c", world, replicas={"vm1": empty("vm1")})
        await stack.enter_async_context(third.running(coordinator))
        await eventually(lambda: get(stub), lambda one: len(one.replicas) == 3 and one.replicas[2].backend)
        await brought(stub, world)
        await eventually(lambda: get(stub), lambda one: all(r.member for r in one.replicas))
        remove = api.RemoveReplicaRequest(volume="vm1", node="c")
        assert (await refused(stub.RemoveReplica(remove))).reason == "NODE_STILL_REPORTS"
        await stack.aclose()
        await eventually(lambda: get(stub), lambda one: not one.replicas[2].reachable)
        remove.etag = "not-this"
        assert (await refused(stub.RemoveReplica(remove))).reason == "ETAG_MISMATCH"
        remove.etag = (await get(stub)).etag
        (volume,) = (await stub.RemoveReplica(remove)).volumes
        assert [one.node for one in volume.replicas] == ["a", "b"]
        await stub.RemoveNode(api.RemoveNodeRequest(node="c"))
        assert [one.name for one in (await stub.ListNodes(api.ListNodesRequest())).nodes] == ["a", "b"]
        assert (await refused(stub.RemoveNode(api.RemoveNodeRequest(node="a")))).reason in (
            ("NODE_STILL_REPORTS", "PRIMARY_AWAY")
        )


async def test_volumes_are_watched(coordinator):
    async with mirrored(coordinator, nodes="ab") as (stub, world):
        watch = stub.WatchVolumes(api.WatchVolumesRequest())
        async with asyncio.timeout(WITHIN_S):
            first = await watch.read()
            assert [one.name for one in first.volumes] == ["vm1"]
            assert first.now_time.seconds
            world["a"].receiving.set()
            world["b"].receiving.set()
            await start(stub)
            while True:
                answer = await watch.read()
                if answer.volumes and answer.volumes[0].state == pb.VOLUME_STATE_HEALTHY:
                    break
            world["z"] = other = SmallAgent("z", world, replicas={"db1": written("db1")})
            async with other.running(coordinator):
                while "db1" not in [one.name for one in (await watch.read()).volumes]:
                    pass
            while True:
                # Without its node, and without a record, there is no such volume any more.
                await eventually(lambda: stub.ListVolumes(api.ListVolumesRequest()))
                with contextlib.suppress(aio.AioRpcError):
                    await stub.RemoveVolume(api.RemoveVolumeRequest(volume="db1"))
                if "db1" in (await watch.read()).removed:
                    break
        watch.cancel()


async def test_events_are_listed_and_followed(coordinator):
    async with mirrored(coordinator, nodes="ab") as (stub, world):
        watch = stub.WatchEvents(api.WatchEventsRequest(volume="vm1"))
        await asyncio.sleep(0)
        reading = asyncio.create_task(watch.read())
        await eventually(lambda: stub.GetCluster(api.GetClusterRequest()))
        await brought(stub, world)
        async with asyncio.timeout(WITHIN_S):
            assert not (await reading).events, "from now on"
            first = await watch.read()
        assert first.events
        listed = (await stub.ListEvents(api.ListEventsRequest())).events
        sequences = [one.sequence for one in listed]
        assert sequences == sorted(sequences, reverse=True)
        assert {"ELECTED", "CONSISTENCY_POINT", "RESYNC_STARTED"} <= {one.type for one in listed}
        assert not (await stub.ListEvents(api.ListEventsRequest(node="a", volume="vm1", page_size=1))).events[1:]
        again = stub.WatchEvents(api.WatchEventsRequest(after_sequence=sequences[-1]))
        async with asyncio.timeout(WITHIN_S):
            follow = await again.read()
        assert [one.sequence for one in follow.events] == sorted(sequences)[1:]
        lost = stub.WatchEvents(api.WatchEventsRequest(after_sequence=sequences[0] + 1000))
        with pytest.raises(aio.AioRpcError) as caught:
            await lost.read()
        assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE


async def test_the_cluster_and_its_store(coordinator):
    async with mirrored(coordinator, nodes="ab") as (stub, world):
        await brought(stub, world)
        cluster = await stub.GetCluster(api.GetClusterRequest())
        assert (cluster.cluster, cluster.leader, cluster.term) == ("test", "c1", 1)
        assert (cluster.store.kind, cluster.store.healthy_count) == ("sqlite", 1)
        assert [(one.name, one.leading) for one in cluster.coordinators] == [("c1", True)]
        whole = b"".join([part.chunk async for part in stub.ExportStore(api.ExportStoreRequest())])
        keys = {json.loads(line)["key"] for line in whole.splitlines()}
        assert {"volumes/vm1", "nodes/a", "nodes/b"} <= keys
        adopt = api.AdoptStoreRequest(store_id=cluster.store_id, validate_only=True)
        assert (await stub.AdoptStore(adopt)).store_id == cluster.store_id
        error = await refused(stub.AdoptStore(api.AdoptStoreRequest(store_id="another")))
        assert (error.reason, error.metadata["field"]) == ("INVALID_FIELD", "store_id")


async def test_what_is_wrong_is_said_and_changes_nothing(coordinator):
    async with mirrored(coordinator, nodes="ab") as (stub, _):
        before = await get(stub)
        for call, reason, said in (
            (stub.GetVolume(api.GetVolumeRequest(volume="vm2")), "VOLUME_NOT_FOUND", "'vm1'"),
            (stub.GetVolume(api.GetVolumeRequest(volume="")), "INVALID_FIELD", "volume"),
            (stub.GetNode(api.GetNodeRequest(node="aa")), "NODE_NOT_FOUND", "no node"),
            (stub.GetResync(api.GetResyncRequest(id="r1")), "RESYNC_NOT_FOUND", "r1"),
            (stub.StartResync(api.StartResyncRequest()), "INVALID_FIELD", "all"),
            (stub.StartResync(api.StartResyncRequest(volumes=["vm1"], all=True)), "INVALID_FIELD", "all"),
            (stub.StartResync(api.StartResyncRequest(request_id="1", all=True)), "INVALID_FIELD", "UUID"),
            (stub.PlanResync(api.PlanResyncRequest(volumes=["vm1"], nodes=["x"])), "NODE_NOT_FOUND", "x"),
            (stub.ListNodes(api.ListNodesRequest(page_token="x")), "PAGE_TOKEN_INVALID", "page_token"),
            (stub.ListVolumes(api.ListVolumesRequest(volumes=["v"])), "VOLUME_NOT_FOUND", "v"),
            (stub.ExplainVolume(api.ExplainVolumeRequest(volume="vm1", node="q")), "NODE_NOT_FOUND", "q"),
            (stub.DeleteSnapshot(api.DeleteSnapshotRequest(id="s9")), "SNAPSHOT_NOT_FOUND", "s9"),
        ):
            error = await refused(call)
            assert (error.reason, error.exit_code) == (reason, 2)
            assert said in error.message
        assert (await get(stub)).etag == before.etag
