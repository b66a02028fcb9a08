"""What holds of every election, whatever was seen; and a small cluster that lives through outages."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import dataclass, field, replace

from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordinator.core.cluster import Elected, NotElected, ReplicaView, VolumeEntry, VolumeView
from coordinator.core.election import elect, next_epoch, reconcile
from coordinator.core.reign import exceeds, is_foreign
from coordinator.core.status import volume_state
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.volume import Grant, LiveCopy, LiveState, Presence, ReplicaReport, VolumeRecord
from tests.coordinator.core.worlds import NODES, NOW_MS, views

LAW = settings(max_examples=300, deadline=None)
CHOICES = st.sampled_from(["", "", *NODES])


def decide(seen: VolumeView, choose: str = "", accept: frozenset[str] = frozenset()) -> Elected | NotElected:
    return elect(seen, accept_loss=accept, choose=choose, now_ms=NOW_MS)


def settle(seen: VolumeView, choose: str) -> Elected | None:
    """Elects, with whatever acceptance is asked for."""
    found = decide(seen, choose)
    if isinstance(found, NotElected):
        found = decide(seen, choose, frozenset(loss.node for loss in found.refusal.losses))
    return found if isinstance(found, Elected) else None


def as_known(seen: VolumeView) -> VolumeView:
    raised = reconcile(seen)
    return seen if raised is None else replace(seen, entry=raised)


@LAW
@given(views(), CHOICES)
def test_a_winner_is_here_with_data_of_this_volume_and_a_live_copy(seen: VolumeView, choose: str) -> None:
    found = settle(seen, choose)
    if found is None:
        return
    event("elected" if found.new_epoch else "stays")
    winner = seen.replicas[found.winner]
    assert winner.fresh
    assert winner.report is not None
    assert winner.report.presence is Presence.PRESENT
    assert winner.report.live.state is not LiveState.ABSENT
    assert not is_foreign(as_known(seen), winner)
    assert found.fork == winner.lineage.tip
    assert choose in ("", found.winner)


@LAW
@given(views(), CHOICES)
def test_no_winner_is_contained_and_exceeded_by_another_unless_that_was_accepted(seen: VolumeView, choose: str) -> None:
    found = settle(seen, choose)
    known = as_known(seen)
    if found is None or (known.entry is not None and known.entry.opening and not found.new_epoch):
        return
    removed = known.entry.removed if known.entry is not None else ()
    winner = seen.replicas[found.winner]
    for node, other in seen.replicas.items():
        if other.fresh and not is_foreign(known, other) and exceeds(other.lineage, winner.lineage):
            assert node in found.accepted or node in removed


@LAW
@given(views(), CHOICES)
def test_nothing_acknowledged_is_lost_without_naming_who_has_it(seen: VolumeView, choose: str) -> None:
    found = settle(seen, choose)
    known = as_known(seen)
    newest = known.record.newest_id
    if found is None or not newest or seen.replicas[found.winner].lineage.find(newest) is not None:
        return
    event("given up")
    assert found.new_epoch
    holders = {
        node
        for node, one in seen.replicas.items()
        if one.lineage.find(newest) is not None and not is_foreign(known, one)
    }
    assert found.accepted
    assert holders <= {*found.accepted}


@LAW
@given(views(), CHOICES)
def test_a_primary_that_may_have_more_is_never_passed_over_unnamed(seen: VolumeView, choose: str) -> None:
    found = settle(seen, choose)
    known = as_known(seen)
    primary = known.record.primary
    if found is None or not known.record.epoch or primary in ("", found.winner):
        return
    one = known.replica(primary)
    harmless = one.fresh and not one.live_modified and seen.replicas[found.winner].lineage.contains(one.lineage)
    assert harmless or primary in found.accepted


@LAW
@given(views(), CHOICES, st.sets(st.sampled_from([*NODES, "x"])))
def test_acceptance_must_be_exact(seen: VolumeView, choose: str, accept: set[str]) -> None:
    plain = decide(seen, choose)
    asked = frozenset(loss.node for loss in plain.refusal.losses) if isinstance(plain, NotElected) else frozenset()
    found = decide(seen, choose, frozenset(accept))
    if isinstance(found, Elected):
        assert accept == asked
        assert set(found.accepted) == asked
        assert isinstance(plain, Elected) or plain.would_win == found.winner
    elif isinstance(plain, NotElected):
        assert found.refusal.losses == plain.refusal.losses
        assert set(plain.refusal.reasons) <= {*found.refusal.reasons, "LOSS_NOT_NAMED"}


@LAW
@given(views(), CHOICES)
def test_the_next_command_of_a_refusal_leads_on(seen: VolumeView, choose: str) -> None:
    found = decide(seen, choose)
    if isinstance(found, Elected):
        return
    assert found.refusal.reasons
    assert found.refusal.message
    words = shlex.split(found.refusal.next_command)
    assert words[:1] + words[2:3] == ["resilver", "vm1"]
    if words[1] != "elect" or "NODE" in words:
        assert not found.would_win
        return
    pairs = list(zip(words[3::2], words[4::2], strict=True))
    accept = frozenset(node for option, node in pairs if option == "--accept-loss")
    chosen = next((node for option, node in pairs if option == "--choose"), "")
    after = decide(seen, chosen, accept)
    assert isinstance(after, Elected)
    assert found.would_win in ("", after.winner)


@LAW
@given(views(), CHOICES, st.permutations(NODES))
def test_the_order_of_reports_changes_nothing(seen: VolumeView, choose: str, order: list[str]) -> None:
    other = replace(seen, replicas={node: seen.replicas[node] for node in order if node in seen.replicas})
    assert decide(other, choose) == decide(seen, choose)
    assert reconcile(other) == reconcile(seen)


@LAW
@given(views())
def test_what_reports_know_is_learnt_once_and_only_ever_raises(seen: VolumeView) -> None:
    raised = reconcile(seen)
    if raised is None:
        return
    old = seen.record
    assert raised.recovering
    assert (raised.record.epoch, raised.record.newest_cp) > (old.epoch, old.newest_cp) or seen.entry is None
    assert reconcile(replace(seen, entry=raised)) is None
    assert volume_state(replace(seen, entry=raised))
    assert next_epoch(seen) > raised.record.epoch


# ------------------------------------------------------------ a cluster that lives through outages

THREE = ("a", "b", "c")


@dataclass
class Disk:
    """What stands on one node's disk, and whether the node is up."""

    chain: list[Snapshot] = field(default_factory=list)
    modified: bool = False
    up: bool = True
    record: VolumeRecord | None = None
    grant: Grant | None = None

    @property
    def lineage(self) -> Lineage:
        return Lineage(tuple(reversed(self.chain)))

    def has(self, snapshot_id: str) -> bool:
        return any(one.id == snapshot_id for one in self.chain)


class Outages(RuleBasedStateMachine):
    """Three nodes and a store, by the protocol's own order of steps, interrupted anywhere.

    The model knows what nobody in the cluster does: which CPs were acknowledged and never given up, and who has them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ids = itertools.count(1)
        self.disks = {node: Disk() for node in THREE}
        self.disks["a"].modified = True
        self.entry: VolumeEntry | None = None
        self.heard: dict[str, ReplicaReport] = {}
        self.acknowledged: set[str] = set()
        self.elect("")

    # What nodes do by themselves.

    @rule(node=st.sampled_from(THREE))
    def write(self, node: str) -> None:
        self.disks[node].modified = True

    @rule(node=st.sampled_from(THREE))
    def stop(self, node: str) -> None:
        self.disks[node].up = False

    @rule(node=st.sampled_from(THREE))
    def start(self, node: str) -> None:
        self.disks[node].up = True
        self.report(node)

    @rule(node=st.sampled_from(THREE))
    def take_point(self, node: str) -> None:
        """Whoever holds a grant takes CPs, also if it has been deposed and does not know it yet."""
        disk = self.disks[node]
        if disk.grant is not None:
            self.snapshot(disk, disk.grant)

    def snapshot(self, disk: Disk, grant: Grant) -> Snapshot:
        sequence = disk.chain[-1].cp.sequence + 1 if disk.chain else 1
        parent = disk.chain[-1].id if disk.chain else ""
        made = Snapshot(f"s{next(self.ids)}", ConsistencyPoint(grant.epoch, sequence), parent, epoch_id=grant.epoch_id)
        disk.chain.append(made)
        disk.modified = False
        return made

    # What the coordinator does.

    @rule(node=st.sampled_from(THREE))
    def report(self, node: str) -> None:
        """A node is heard; a CP of the present epoch by the primary is acknowledged; the node is told the record."""
        disk = self.disks[node]
        if not disk.up:
            return
        report = self.heard[node] = self.report_of(disk)
        raised = reconcile(self.view())
        if raised is not None:
            self.entry = raised
        if self.entry is None:
            return
        record, tip = self.entry.record, report.lineage.tip
        mine = Grant("V", record.epoch, record.epoch_id)
        reigns = record.primary == node and disk.grant == mine
        goes_on = not record.newest_id or disk.has(record.newest_id)
        if reigns and goes_on and tip is not None and tip.epoch_id == record.epoch_id:
            record = replace(record, newest_cp=tip.cp, newest_id=tip.id)
            self.entry = replace(self.entry, record=record, opening=False)
            self.acknowledged.add(tip.id)
        self.tell(disk, record)

    def tell(self, disk: Disk, record: VolumeRecord) -> None:
        known = disk.record
        if known is not None and (known.epoch, known.newest_cp) > (record.epoch, record.newest_cp):
            return
        if known is not None and known.epoch == record.epoch and known.epoch_id != record.epoch_id:
            return
        disk.record = record
        if disk.grant is not None and disk.grant.epoch < record.epoch:
            disk.grant = None

    @rule(node=st.sampled_from(THREE))
    def resync(self, node: str) -> None:
        """One secondary is brought to the newest known CP, from whoever is up and has it."""
        self.report(node)
        if self.entry is None or self.entry.opening or self.entry.recovering or node == self.entry.record.primary:
            return
        newest = self.entry.record.newest_id
        source = next((one for one in self.disks.values() if one.up and one.has(newest)), None)
        disk = self.disks[node]
        if source is not None and disk.up and newest and not (disk.has(newest) and not disk.modified):
            at = [one.id for one in source.chain].index(newest)
            disk.chain, disk.modified = source.chain[: at + 1], False
            self.report(node)

    @precondition(lambda self: self.entry is not None and self.entry.opening)
    @rule(told=st.sets(st.sampled_from(THREE)))
    def open_epoch(self, told: set[str]) -> None:
        """Members are told, the winner gets its grant, takes the opening CP, and may or may not report it."""
        assert self.entry is not None
        record = self.entry.record
        winner = self.disks[record.primary]
        for node in told - {record.primary}:
            if self.disks[node].up:
                self.tell(self.disks[node], record)
        if not winner.up:
            return
        self.tell(winner, record)
        if winner.record is not None and winner.record.epoch_id == record.epoch_id:
            winner.grant = Grant("V", record.epoch, record.epoch_id)
            if not winner.chain or winner.chain[-1].epoch_id != record.epoch_id:
                self.snapshot(winner, winner.grant)
        if record.primary in told:
            self.report(record.primary)

    @rule()
    def new_coordinator(self) -> None:
        """It has heard nobody yet."""
        self.heard.clear()

    @rule()
    def empty_store(self) -> None:
        """The store is gone; what is known is on the nodes' disks. All members know each other from the start."""
        if all(disk.record is not None for disk in self.disks.values()):
            self.entry = None
            self.heard.clear()

    @rule(choose=st.sampled_from(["", "", "", *THREE]))
    def elect(self, choose: str) -> None:
        """Examines who is up and decides; a refusal is answered with what it asks for."""
        for node in THREE:
            self.report(node)
        seen = self.view()
        found = decide(seen, choose)
        if isinstance(found, NotElected):
            found = decide(seen, choose, frozenset(loss.node for loss in found.refusal.losses))
        if isinstance(found, NotElected):
            event("refused: " + found.refusal.reasons[0])
            return
        event(f"elected, accepted {len(found.accepted)}" if found.new_epoch else "stays")
        self.check(found)
        if not found.new_epoch:
            if self.entry is not None:
                self.entry = replace(self.entry, recovering=False)
            return
        old, fork = self.view().record, found.fork
        epoch = next_epoch(seen)
        record = VolumeRecord(
            "vm1",
            "V",
            epoch,
            f"e{epoch}-{next(self.ids)}",
            found.winner,
            THREE,
            fork.cp if fork is not None else old.newest_cp,
            fork.id if fork is not None else "",
        )
        self.entry = VolumeEntry(record, opening=True)

    def check(self, found: Elected) -> None:
        """The one promise: what was acknowledged is there, or who has it was named."""
        winner = self.disks[found.winner]
        for one in sorted(self.acknowledged):
            if winner.has(one):
                continue
            holders = {node for node in THREE if self.disks[node].has(one)}
            assert holders & {*found.accepted}, f"{one} on {holders} is lost; accepted was {found.accepted}"
            self.acknowledged.discard(one)

    @invariant()
    def what_was_acknowledged_is_somewhere(self) -> None:
        for one in self.acknowledged:
            assert any(disk.has(one) for disk in self.disks.values())

    # What is seen.

    def report_of(self, disk: Disk) -> ReplicaReport:
        empty = not disk.chain and not disk.modified
        return ReplicaReport(
            "vm1",
            Presence.EMPTY if empty else Presence.PRESENT,
            volume_id="V" if disk.chain else "",
            lineage=disk.lineage,
            live=LiveCopy(LiveState.ABSENT if empty else LiveState.MODIFIED if disk.modified else LiveState.UNMODIFIED),
            record=disk.record,
            grant=disk.grant,
        )

    def view(self) -> VolumeView:
        replicas = {}
        for node in THREE:
            report = self.heard.get(node)
            replicas[node] = ReplicaView(node, report, NOW_MS, fresh=report is not None and self.disks[node].up)
        return VolumeView("vm1", self.entry, replicas)


TestOutages = Outages.TestCase
TestOutages.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
