"""The frozen view that every decision is made from, and what a decision says.

Facts come from reports (`ReplicaView.report`) and from the store (`VolumeEntry`); nothing else is believed. A view is
built for one volume and one question: whoever builds it sets `fresh` to what the question needs. For an election a
report is fresh if it answers this examine; for a screen, if its node is connected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from resilver.lineage import NO_CP, ConsistencyPoint, Lineage, Snapshot
from resilver.volume import LiveState, Progress, ReplicaReport, ResyncState, VolumeRecord


class ReplicaState(Enum):
    """What a replica is to the primary."""

    IN_SYNC = "IN_SYNC"
    STALE = "STALE"
    DIVERGED = "DIVERGED"
    UNRELATED = "UNRELATED"
    FOREIGN = "FOREIGN"
    EMPTY = "EMPTY"
    LOST = "LOST"
    UNKNOWN = "UNKNOWN"


class Role(Enum):
    """What a node is for a volume; a NEWCOMER becomes a member when its first resync closes."""

    PRIMARY = "PRIMARY"
    SECONDARY = "SECONDARY"
    NEWCOMER = "NEWCOMER"


class VolumeState(Enum):
    """One word for a whole volume."""

    HEALTHY = "HEALTHY"
    DEGRADED = "DEGRADED"
    BLOCKED = "BLOCKED"
    OPENING = "OPENING"
    RECOVERING = "RECOVERING"
    UNINITIALIZED = "UNINITIALIZED"


class PlanAction(Enum):
    """What a replica needs."""

    NONE = "NONE"
    DELTA = "DELTA"
    FULL = "FULL"
    BLOCKED = "BLOCKED"


@dataclass(frozen=True, slots=True)
class Pause:
    """No resync starts while it lasts; `until_ms` None is until resumed."""

    reason: str
    until_ms: int | None
    principal: str


@dataclass(frozen=True, slots=True)
class VolumeEntry:
    """A volume as the store holds it (`volumes/<volume>`).

    `opening`: the epoch is written, its opening CP is not recorded yet. `recovering`: the store knew less than a
    report, so the next election wants every known member. `removed` are tombstones of nodes. `bases` are, for each
    member, the newest snapshot that it was seen to have in common with the primary: pinned also while it is away.
    """

    record: VolumeRecord
    newest_cp_time_ms: int = 0
    opening: bool = False
    recovering: bool = False
    removed: tuple[str, ...] = ()
    pause: Pause | None = None
    bases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as it introduced itself. `duplicate`: two live streams of that name with different boots."""

    name: str
    boot: str = ""
    address: str = ""
    stream_address: str = ""
    version: str = ""
    volumes: tuple[str, ...] = ()
    connected: bool = False
    duplicate: bool = False
    last_heard_ms: int = 0

    @property
    def reachable(self) -> bool:
        return self.connected and not self.duplicate


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """The last that was heard of one replica, and whether this question may rely on it.

    `duplicate`: two agents call themselves by the node's name, and neither is believed. `late`: its agent is there, and
    what was heard of the replica is no answer to this question.
    """

    node: str
    report: ReplicaReport | None = None
    report_time_ms: int = 0
    fresh: bool = False
    duplicate: bool = False
    late: bool = False

    @property
    def lineage(self) -> Lineage:
        return self.report.lineage if self.report is not None else Lineage()

    @property
    def priority(self) -> int:
        return self.report.priority if self.report is not None else 0

    @property
    def live_modified(self) -> bool:
        """Anything but a live copy known to be its tip counts as modified."""
        return self.report is not None and self.report.live.state not in (LiveState.UNMODIFIED, LiveState.ABSENT)


@dataclass(frozen=True, slots=True)
class VolumeView:
    """One volume: what the store says, and every replica that reports or is a member. `entry` None: first sight.

    `compared` is for `status_of` alone: what it has worked out of this view already.
    """

    name: str
    entry: VolumeEntry | None = None
    replicas: Mapping[str, ReplicaView] = field(default_factory=dict)
    compared: dict[str, Status] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def record(self) -> VolumeRecord:
        return self.entry.record if self.entry is not None else VolumeRecord(self.name)

    @property
    def primary(self) -> ReplicaView | None:
        return self.replicas.get(self.record.primary)

    def replica(self, node: str) -> ReplicaView:
        return self.replicas.get(node) or ReplicaView(node)


@dataclass(frozen=True, slots=True)
class Loss:
    """What is given up with a node's data. `unseen_ms` None: never heard of.

    `from_name` and `to_name` stand for the CPs where those are of another tool's snapshots, which have none.
    """

    node: str
    from_cp: ConsistencyPoint | None = None
    to_cp: ConsistencyPoint | None = None
    lost_cps: int | None = None
    live_modified: bool = False
    unseen_ms: int | None = None
    from_name: str = ""
    to_name: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something will not be done: all reasons that hold, and the command to run next."""

    reasons: tuple[str, ...]
    message: str
    missing_nodes: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    losses: tuple[Loss, ...] = ()
    next_command: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica as an election saw it."""

    node: str
    reported: bool
    report_time_ms: int
    cp: ConsistencyPoint
    snapshot: str
    live: LiveState
    state: ReplicaState
    common_cp: ConsistencyPoint
    priority: int
    verdict: str
    snapshot_name: str = ""


@dataclass(frozen=True, slots=True)
class Elected:
    """Who is to be primary. `new_epoch` False: the primary stays and nothing is written.

    `fork` is the winner's tip: what the newest known CP becomes. `accepted` are the nodes whose loss was accepted.
    """

    winner: str
    fork: Snapshot | None
    rule: str
    new_epoch: bool
    candidates: tuple[Candidate, ...]
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NotElected:
    """Why nobody is. `would_win` is who would be, if the losses named were accepted; empty if that needs --choose."""

    refusal: Refusal
    candidates: tuple[Candidate, ...]
    would_win: str = ""


@dataclass(frozen=True, slots=True)
class ElectionRecord:
    """A decision as the store keeps it (`elections/<volume>/<unix_ms>`), a refusal too: epoch 0, no winner.

    `evidence` is at most 32 records of each lineage, tip first, as `cp id`.
    """

    volume: str
    create_time_ms: int
    epoch: int = 0
    epoch_id: str = ""
    winner: str = ""
    previous_primary: str = ""
    cp: ConsistencyPoint = NO_CP
    rule: str = ""
    candidates: tuple[Candidate, ...] = ()
    refusal: Refusal | None = None
    accepted: tuple[str, ...] = ()
    principal: str = ""
    term: int = 0
    evidence: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Status:
    """What a replica is to the primary, with the figures behind the word.

    `common` is the newest snapshot whose data both have; `fork` the newest record in both. `behind_cps` counts the
    primary's CPs after the fork, `own_cps` the replica's.
    """

    state: ReplicaState
    common: Snapshot | None = None
    fork: Snapshot | None = None
    behind_cps: int | None = None
    own_cps: int | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """What a delta costs, as a source worked it out.

    A file system that sends its own stream tells no ranges, and about how long it will be; `bytes` None: it cannot say.
    """

    bytes: int | None
    range_count: int | None
    capacity_bytes: int

    @property
    def estimated(self) -> bool:
        return self.range_count is None


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """One row of a plan. `base` empty with FULL: everything that is allocated is copied; `base_name` is its CP or name.

    `size` is filled in by whoever asked a source; not `exact` while the target CP is still to be taken, and a lower
    bound then. `own_base` is where the replica's own data begins (for what preserving it costs).
    """

    node: str
    state: ReplicaState
    action: PlanAction
    why: str
    base: str = ""
    base_cp: ConsistencyPoint = NO_CP
    base_name: str = ""
    target: str = ""
    target_cp: ConsistencyPoint = NO_CP
    expected_tip: str = ""
    sources: tuple[str, ...] = ()
    size: Size | None = None
    exact: bool = False
    preserve: tuple[str, ...] = ()
    preserve_bytes: int | None = None
    replace_own_data: bool = False
    replace_unrelated: bool = False
    free_bytes: int = 0
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class VolumePlan:
    """What a resync of one volume would do; `refusal` set: nothing."""

    volume: str
    primary: str
    target_cp: ConsistencyPoint
    takes_snapshot: bool
    replicas: tuple[ReplicaPlan, ...]
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Cancelling:
    """Who wants a resync to end, and whether what was copied is to go too."""

    principal: str = ""
    discard_stage: bool = False


@dataclass(frozen=True, slots=True)
class Resync:
    """Bringing one replica to one snapshot, as the store keeps it (`resyncs/<volume>/<id>`).

    Only `state`, the times, the counts, the order of the sources and `cancelling` change after it is made. The goal was
    in the replica's lineage from the start if `held_before` (only its live copy is to be set right). The higher
    `priority` begins first. `ticket` is what the target shows to its sources: a secret of these nodes and the
    coordinators, so no screen and no answer has it, and the same under the next leader, because a run that is under way
    goes on with it. `cancelling`: under this leader and the next nothing is ordered any more but that its target stops.
    """

    id: str
    volume: str
    node: str
    plan: ReplicaPlan
    epoch: int
    principal: str
    term: int
    create_time_ms: int
    state: ResyncState = ResyncState.QUEUED
    start_time_ms: int = 0
    end_time_ms: int = 0
    attempt_count: int = 0
    progress: Progress | None = None
    refusal: Refusal | None = None
    held_before: bool = False
    priority: int = 0
    ticket: str = ""
    cancelling: Cancelling | None = None

    @property
    def senders(self) -> frozenset[str]:
        """Who sends, as the target tells; before it does, whoever it was to ask first."""
        shares = self.progress.sources if self.progress is not None else ()
        sending = frozenset(share.node for share in shares if share.bytes_per_second)
        return sending or frozenset(self.plan.sources[:1])


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """Something that an operator may want to know happened.

    `sequence` only grows, over all reigns: the term is its upper half. `previous` is the sequence of the event before
    it, 0 for the first one ever: so whoever knows that one has missed nothing, and a list tells what it no longer has.
    """

    sequence: int
    create_time_ms: int
    type: str
    volume: str = ""
    node: str = ""
    resync: str = ""
    reason: str = ""
    message: str = ""
    principal: str = ""
    previous: int = 0
