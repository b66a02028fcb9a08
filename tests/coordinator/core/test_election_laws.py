"""What holds of every election, whatever was seen; and a small cluster that lives through outages."""

from __future__ import annotations

import random
import shlex
from collections import Counter
from dataclasses import replace
from typing import Final

from hypothesis import event, given, settings
from hypothesis import strategies as st

from coordinator.core.claims import exceeds, is_foreign
from coordinator.core.cluster import Elected, NotElected, VolumeView
from coordinator.core.election import elect, next_epoch, reconcile
from coordinator.core.status import volume_state
from resilver.volume import LiveState, Presence
from tests.coordinator.core.outages import THREE, Cluster
from tests.coordinator.core.worlds import NODES, NOW_MS, views

LIVES: Final = 300
STEPS: Final = 120
LAW = settings(max_examples=150, deadline=None)
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
    now, before = (raised.record.epoch, raised.record.newest_cp), (old.epoch, old.newest_cp)
    if seen.entry is not None and now == before:
        assert seen.entry == replace(raised, record=old)
        assert {*raised.record.members} > {*old.members}
    else:
        assert now > before or seen.entry is None
    assert reconcile(replace(seen, entry=raised)) is None
    assert volume_state(replace(seen, entry=raised))
    assert next_epoch(seen) > raised.record.epoch


# ------------------------------------------------------------ a cluster that lives through outages

# Weighted so that a volume mostly works: else hardly anything is ever acknowledged that could be lost.
EVENTS: Final = {
    "write": 3.0,
    "stop": 3.0,
    "start": 5.0,
    "take_point": 6.0,
    "report": 6.0,
    "resync": 8.0,
    "open_epoch": 6.0,
    "elect": 4.0,
    "new_coordinator": 1.0,
    "empty_store": 1.0,
    "back_up_store": 1.0,
    "restore_store": 0.3,
    "roll_back_disk": 0.3,
    "clone_disk": 0.3,
}


def live(cluster: Cluster, chance: random.Random) -> None:
    """One thing happens."""
    (name,) = chance.choices([*EVENTS], [*EVENTS.values()])
    node, other = chance.choice(THREE), chance.choice(THREE)
    match name:
        case "new_coordinator" | "empty_store" | "back_up_store" | "restore_store":
            getattr(cluster, name)()
        case "open_epoch":
            cluster.open_epoch(set(chance.sample(THREE, chance.randint(0, 3))))
        case "elect":
            cluster.elect(chance.choice(["", "", "", *THREE]))
        case "clone_disk":
            cluster.clone_disk(node, other)
        case _:
            getattr(cluster, name)(node)


def test_through_all_outages_nothing_acknowledged_is_given_up_unnamed() -> None:
    """The promise is checked inside the model, at each election; the seed is in the message."""
    told: Counter[str] = Counter()
    for seed in range(LIVES):
        chance, cluster = random.Random(seed), Cluster()
        for step in range(STEPS):
            try:
                live(cluster, chance)
            except AssertionError as broken:
                raise AssertionError(f"seed {seed}, step {step}: {broken}") from broken
        told += cluster.told
    assert min(told[one] for one in ("stays", "refused", "elected, accepted 0", "elected, accepted 2")) > LIVES, told
