"""The cluster of the manual: vm1 with a stale replica, db1 with a diverged one."""

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import error_pb2
from resilver.v1 import volume_pb2 as pb

NOW = 1_795_357_867  # 2026-11-22 14:31:07Z
MIB = 1 << 20
GIB = 1 << 30


def at(seconds_ago):
    return Timestamp(seconds=int(NOW - seconds_ago))


def cp(text):
    epoch, sequence = text.split("-")
    return pb.ConsistencyPoint(epoch=int(epoch), sequence=int(sequence), text=text)


def snapshot_id(volume, text):
    return f"{volume}-{text}".ljust(23, "0") + "-0000-000000"


def replica(volume, node, role, state, text, *, live="UNMODIFIED", in_use=False, seen=1, **more):
    return pb.Replica(
        volume=volume,
        node=node,
        role=pb.ReplicaRole.Value(f"REPLICA_ROLE_{role}"),
        state=pb.ReplicaState.Value(f"REPLICA_STATE_{state}"),
        reachable=True,
        report_time=at(seen),
        cp=cp(text),
        snapshot=snapshot_id(volume, text),
        live=pb.LiveCopy(
            state=pb.LiveState.Value(f"LIVE_STATE_{live}"),
            in_use=in_use,
            size_bytes=20 * GIB,
            modified_bytes=int(61.2 * MIB) if live == "MODIFIED" and role == "SECONDARY" else None,
        ),
        backend="image",
        **more,
    )


def cluster():
    return api.GetClusterResponse(
        cluster="prod",
        store_id="5e6f",
        leader="c1",
        term=12,
        coordinators=[api.CoordinatorInfo(name="c1", address="c1:7400", version="0.1.0", leading=True)],
        store=api.StoreInfo(kind="etcd", healthy_count=3, member_count=3),
    )


def nodes():
    return [
        pb.Node(name=name, reachable=True, address=f"{name}:7401", stream_address=f"{name}:7402", version="0.1.0",
                report_time=at(1), volume_count=2, limits=limits(name))
        for name in "abc"
    ]  # fmt: skip


def limits(node):
    """The file caps what b receives, and an operator what it sends for another hour."""
    found = pb.NodeLimits(receive=pb.Cap(), send=pb.Cap(), receive_max_count=2, send_max_count=4)
    if node == "b":
        found.receive.bytes_per_second = 52_428_800
        found.send.CopyFrom(pb.Cap(bytes_per_second=800_000, until_time=at(-3600)))
    return found


def vm1():
    stale = pb.Problem(
        reason="STALE",
        message="47m behind; common snapshot 3-39 is intact, a delta is possible.",
        next_command="resilver resync vm1",
    )
    return pb.Volume(
        name="vm1",
        volume_id="v1",
        state=pb.VOLUME_STATE_DEGRADED,
        epoch=3,
        primary="a",
        newest_cp=cp("3-42"),
        newest_cp_time=at(252),
        replicas=[
            replica("vm1", "a", "PRIMARY", "IN_SYNC", "3-42", live="MODIFIED", in_use=True),
            replica("vm1", "b", "SECONDARY", "IN_SYNC", "3-42"),
            replica(
                "vm1", "c", "SECONDARY", "STALE", "3-39", seen=2, behind_cps=3,
                behind_duration=Duration(seconds=47 * 60), out_of_sync_bytes=int(234.9 * MIB), problems=[stale],
            ),
        ],
    )  # fmt: skip


def db1():
    diverged = pb.Problem(
        reason="DIVERGED",
        message="split at 4-9; 2 CPs and live writes are only on b. Nothing replaces them until you say so.",
        next_command="resilver explain db1 b",
    )
    return pb.Volume(
        name="db1",
        volume_id="v2",
        state=pb.VOLUME_STATE_DEGRADED,
        epoch=5,
        primary="a",
        newest_cp=cp("5-18"),
        newest_cp_time=at(580),
        replicas=[
            replica("db1", "a", "PRIMARY", "IN_SYNC", "5-18", live="MODIFIED", in_use=True),
            replica("db1", "b", "SECONDARY", "DIVERGED", "4-11", live="MODIFIED", own_cps=2, problems=[diverged]),
            replica("db1", "c", "SECONDARY", "IN_SYNC", "5-18", seen=2),
        ],
    )


def lost():
    """A volume whose primary is away: blocked, with a name as long as names may be."""
    away = pb.Problem(
        reason="PRIMARY_AWAY",
        message="a has not reported for 12m; its last CP is 1-7.",
        next_command="resilver elect " + "long-name" * 7 + " --accept-loss a",
    )
    gone = replica("long-name" * 7, "a", "PRIMARY", "UNKNOWN", "1-7", live="UNKNOWN", seen=745)
    gone.reachable = False
    never = pb.Replica(node="b", role=pb.REPLICA_ROLE_NEWCOMER, state=pb.REPLICA_STATE_EMPTY, reachable=True)
    return pb.Volume(
        name="long-name" * 7,
        state=pb.VOLUME_STATE_BLOCKED,
        epoch=1,
        primary="a",
        newest_cp=cp("1-7"),
        newest_cp_time=at(800),
        replicas=[gone, never],
        problems=[away],
        pause=pb.Pause(reason="moving racks", until_time=at(-3600), principal="ops@jump1"),
    )


def row(node, state, action, base="", size=None, *, ranges=None, sources=("a",), need=0, free=96, **more):
    return pb.ReplicaPlan(
        node=node,
        state=pb.ReplicaState.Value(f"REPLICA_STATE_{state}"),
        action=pb.PlanAction.Value(f"PLAN_ACTION_{action}"),
        base_cp=cp(base) if base else None,
        copy_bytes=size,
        range_count=ranges,
        sources=sources,
        need_bytes=need,
        free_bytes=free * GIB,
        **more,
    )


def plan():
    return pb.Plan(
        etag="9f2c41",
        create_time=at(-13),
        volumes=[
            pb.VolumePlan(
                volume="vm1", primary="a", target_cp=cp("3-43"), takes_snapshot=True,
                replicas=[
                    row("b", "IN_SYNC", "DELTA", "3-42", free=212, why="at 3-42"),
                    row("c", "STALE", "DELTA", "3-39", int(234.9 * MIB),
                        ranges=10_485, sources=("a", "b"), need=int(0.3 * GIB)),
                ],
            ),
            pb.VolumePlan(
                volume="db1", primary="a", target_cp=cp("5-19"), takes_snapshot=True,
                replicas=[
                    row("b", "DIVERGED", "DELTA", "4-9", int(1.31 * GIB),
                        ranges=20_112, sources=("a", "c"), need=int(1.4 * GIB), free=212,
                        preserve=["4-10", "4-11", "live writes"], preserve_bytes=int(61.2 * MIB)),
                    row("c", "IN_SYNC", "DELTA", "5-18"),
                ],
            ),
        ],
    )  # fmt: skip


ADOPTED = "autosnap_2026-11-21_00:00:01_daily"


def adopted_plan():
    """What another tool has replicated: deltas from its snapshots, which a file system estimates or cannot tell."""
    return pb.Plan(
        etag="5d10be",
        create_time=at(0),
        volumes=[
            pb.VolumePlan(
                volume="home", primary="a", target_cp=cp("1-1"), takes_snapshot=True,
                replicas=[row("b", "STALE", "DELTA", "", int(1.2 * GIB), base_name=ADOPTED, estimated=True,
                              need=int(1.3 * GIB))],
            ),
            pb.VolumePlan(
                volume="mail", primary="a", target_cp=cp("1-1"),
                replicas=[row("b", "DIVERGED", "DELTA", "", base_name="mail.20261120", estimated=True, need=None,
                              preserve=["live writes"], why="mail.20261120 is the newest snapshot in common"),
                          row("c", "STALE", "DELTA", "", 40 * MIB, base_name="mail.20261121", estimated=True,
                              need=104 * MIB)],
            ),
        ],
    )  # fmt: skip


def home():
    """A replica that another tool has brought to a snapshot of its own, and that has no live copy yet."""
    behind = pb.Problem(
        reason="STALE",
        message=f"26h 02m behind; common snapshot {ADOPTED} is intact, a delta is possible.",
        next_command="resilver resync home",
    )
    held = replica("home", "b", "NEWCOMER", "STALE", "0-0", live="ABSENT", snapshot_name=ADOPTED, common_name=ADOPTED,
                   behind_cps=2, out_of_sync_bytes=int(1.2 * GIB), estimated=True, problems=[behind])  # fmt: skip
    mine = replica("home", "a", "PRIMARY", "IN_SYNC", "1-1", live="MODIFIED", in_use=True, snapshot_name="1-1")
    unknown = replica("home", "c", "NEWCOMER", "STALE", "0-0", snapshot_name="daily.1", behind_cps=1, estimated=True)
    return pb.Volume(
        name="home",
        state=pb.VOLUME_STATE_DEGRADED,
        epoch=1,
        primary="a",
        newest_cp=cp("1-1"),
        newest_cp_time=at(30),
        replicas=[mine, held, unknown],
    )


def refusal(reason="PRIMARY_AWAY", command="resilver elect vm1 --accept-loss a"):
    return error_pb2.Refusal(
        reasons=[reason, "NEWEST_COPY_MISSING"],
        message="a is away since 14:18:42Z with 3-42, which nobody else has",
        missing_nodes=["a"],
        candidates=["b", "c"],
        losses=[error_pb2.Loss(node="a", from_cp="3-40", to_cp="3-42", lost_cps=3, live_modified=True,
                               unseen_seconds=745)],
        next_command=command,
    )  # fmt: skip


def blocked_plan():
    """A full copy and why, a replica that is in the way of itself, a volume without a primary."""
    unrelated = error_pb2.Refusal(
        reasons=["REPLICA_UNRELATED"],
        message="its data shares no snapshot with a's",
        next_command="resilver resync vm1 --replace b",
    )
    return pb.Plan(
        etag="77aa00",
        create_time=at(0),
        volumes=[
            pb.VolumePlan(
                volume="vm1", primary="a", target_cp=cp("3-42"),
                replicas=[
                    row("b", "UNRELATED", "BLOCKED", refusal=unrelated, sources=(), why=unrelated.message),
                    row("c", "STALE", "FULL", "", 20 * GIB, ranges=1, need=21 * GIB, exact=True,
                        why="the newest snapshot in common, 3-12, was pruned on a"),
                ],
            ),
            pb.VolumePlan(volume="db1", refusal=refusal(command="resilver elect db1 --accept-loss a")),
        ],
    )  # fmt: skip


def election(*, refused=False):
    candidates = [
        pb.Candidate(node="a", reported=not refused, report_time=at(745 if refused else 0), cp=cp("3-42"),
                     live=pb.LIVE_STATE_MODIFIED, state=pb.REPLICA_STATE_IN_SYNC,
                     verdict="away; its writes after 3-39 would be lost" if refused else "stays"),
        pb.Candidate(node="b", reported=True, cp=cp("3-39"), live=pb.LIVE_STATE_UNMODIFIED,
                     state=pb.REPLICA_STATE_STALE, verdict="would win"),
    ]  # fmt: skip
    if refused:
        return pb.Election(volume="vm1", create_time=at(0), previous_primary="a", candidates=candidates,
                           refusal=refusal(), principal="ops@jump1", term=12)  # fmt: skip
    return pb.Election(volume="vm1", epoch=4, epoch_id="e4", create_time=at(0), winner="b", previous_primary="a",
                       cp=cp("3-39"), rule="the only one that contains all others", candidates=candidates,
                       accepted_losses=["a"], principal="ops@jump1", term=12)  # fmt: skip


def resync(identity, node, state, done=None, total=None, *, volume="vm1", **more):
    return pb.Resync(
        id=identity,
        volume=volume,
        node=node,
        state=pb.ResyncState.Value(f"RESYNC_STATE_{state}"),
        plan=row(node, "STALE", "DELTA", "3-39", total, sources=("a", "b")),
        total_bytes=total,
        done_bytes=done,
        wire_bytes=None if done is None else done + 1000,
        resent_bytes=None if done is None else 0,
        create_time=at(60),
        **more,
    )


R1, R2 = "11111111-2222-3333-4444-555555555555", "22222222-2222-3333-4444-555555555555"


def refused(volume="vm1", node="", reason="PRIMARY_AWAY"):
    return api.VolumeRefusal(volume=volume, node=node, refusal=refusal(reason))
