"""Random histories of three replicas: writes, consistency points, transfers either way, kills, restarts and pruning.

Whatever happens: equal ids are equal contents, a delta from any base in common gives exactly the target, and what was
once written on a replica that was then replaced is in a snapshot or a preserved copy. Hypothesis chooses, in the same
way each time.
"""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from resilver.lineage import Snapshot, newest_in_common
from resilver.volume import LiveState
from tests.agent.backends.adapter import Place, Replica
from tests.agent.backends.crash import At, killed
from tests.agent.backends.transfer import close_stages, open_stage, transfer

pytestmark = pytest.mark.timeout(900)  # many replicas in one test
NODES = ("a", "b", "c")
node = st.sampled_from(NODES)


class History(RuleBasedStateMachine):
    """Three replicas, and what is known of every snapshot and of everything that was ever replaced."""

    place: Place
    names = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        name = f"vm{next(self.names)}"
        self.replicas: dict[str, Replica] = {
            each: self.place.replica(each, name, preserved_max_count=1000) for each in NODES
        }
        self.contents_of: dict[str, str] = {}
        self.replaced: dict[str, set[str]] = {each: set() for each in NODES}

    @initialize()
    def begin(self) -> None:
        self.replicas["a"].create()
        self.took("a")

    def took(self, at: str) -> None:
        replica = self.replicas[at]
        taken = replica.snapshot(epoch=NODES.index(at) + 1)
        self.contents_of[taken.id] = replica.contents()

    @rule(at=node, seed=st.integers(0, 1000), small=st.booleans())
    def write(self, at: str, seed: int, small: bool) -> None:
        replica = self.replicas[at]
        if replica.lineage.records:
            (replica.edit if small else replica.change)(seed)

    @rule(at=node)
    def snapshot(self, at: str) -> None:
        if self.replicas[at].lineage.records:
            self.took(at)

    @rule(at=node, keep=st.integers(1, 3))
    def prune(self, at: str, keep: int) -> None:
        self.replicas[at].backend.prune(keep, frozenset())

    @rule(at=node)
    def restart(self, at: str) -> None:
        self.replicas[at] = self.replicas[at].again(preserved_max_count=1000)
        self.replicas[at].backend.recover()

    @rule(source=node, to=node, moment=st.integers(0, 30))
    def send(self, source: str, to: str, moment: int) -> None:
        """Brings the target to the source's tip; killed at some step first, where there is one of that number."""
        if source == to or not self.replicas[source].lineage.records:
            return
        lineage = self.replicas[source].lineage
        found = self.replicas[to].backend.examine()
        if found.lineage.tip_id == lineage.tip_id and found.live.state is LiveState.UNMODIFIED:
            return
        if found.live.state is LiveState.MODIFIED:
            self.replaced[to].add(self.replicas[to].contents())
        common = newest_in_common(found.lineage, lineage)
        base = common.id if isinstance(common, Snapshot) else ""
        steps = [step for step in self.place.kind.steps if step.startswith("commit.")]
        if moment < len(steps):
            self.fill(source, to, base)
            killed(lambda step: self.commit(source, to, base, found.lineage.tip_id, step=step), At(steps[moment]))
            self.restart(to)
            self.check()
        if self.replicas[to].lineage.tip_id != lineage.tip_id or base == lineage.tip_id:
            self.fill(source, to, base)
            self.commit(source, to, base, found.lineage.tip_id)
        self.replicas[to].backend.discard_stage()
        assert self.replicas[to].contents() == self.contents_of[lineage.tip_id]
        assert self.replicas[to].state is LiveState.UNMODIFIED
        assert self.replicas[to].lineage.ids() >= lineage.ids()
        assert self.replicas[to].debris() == []

    def fill(self, source: str, target: str, base: str) -> None:
        tip = self.replicas[source].tip
        stage = open_stage(self.replicas[target], self.replicas[source], base, tip)
        if base != tip.id:
            transfer(self.replicas[source], self.replicas[target], stage)
        stage.close()

    def commit(self, source: str, target: str, base: str, expected: str, **options: Any) -> None:
        lineage = self.replicas[source].lineage
        replica = self.replicas[target].again(preserved_max_count=1000, **options)
        stage = open_stage(replica, self.replicas[source], base, lineage.tip)
        if base != lineage.tip_id and replica.kind.shape == "stream":
            assert stage.complete
        order = replica.order(lineage, expected_tip=expected, replace_own_data=True, replace_unrelated=True)
        replica.backend.commit(stage, order)
        stage.close()

    @invariant()
    @precondition(lambda self: self.contents_of)
    def check(self) -> None:
        for at, replica in self.replicas.items():
            for record in replica.lineage:
                if record.present:
                    assert replica.contents(record.id) == self.contents_of[record.id]
            kept = {replica.contents(copy) for copy in replica.preserved} | {replica.contents()}
            assert self.replaced[at] <= kept | set(self.contents_of.values())

    def teardown(self) -> None:
        close_stages()


def test_random_histories(place, kind):
    class Here(History):
        pass

    Here.place = place
    run_state_machine_as_test(
        Here,
        settings=hypothesis.settings(
            max_examples=1 if kind.slow else 3,
            stateful_step_count=25,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
