"""A source and a target whose stage is filled, for every way in which a commit can find a target.

=============  ==================================================================================================
``newcomer``   there is nothing
``stale``      at the base, unmodified
``written``    at the base, and the live copy has been written to
``diverged``   two consistency points of its own upon the base, and live writes upon those
``back``       the goal is the base itself, which it has: two consistency points and live writes are to go
``unrelated``  a consistency point and live writes of a volume that shares nothing
``cleaned``    at the goal already, but the live copy has been written to
=============  ==================================================================================================

A case knows what must never be lost (`own`: by the snapshot's id, or ``live``), and looks at what is left from outside.
"""

from __future__ import annotations

from typing import Any

from resilver.lineage import Lineage
from resilver.volume import LiveState, PreservedCopy
from tests.agent.backends.adapter import Place
from tests.agent.backends.transfer import open_stage, transfer

SCENARIOS = ("newcomer", "stale", "written", "diverged", "back", "unrelated", "cleaned")


class Case:
    """One source, one target; `name` is the volume's, so that many cases have room in one place."""

    def __init__(self, place: Place, scenario: str, name: str = "vm1") -> None:
        self.scenario = scenario
        self.source, self.target = place.replica("a", name), place.replica("b", name)
        self.own: dict[str, str] = {}
        self.source.create()
        self.base = self.source.snapshot().id
        getattr(self, f"_{scenario}")()
        if scenario not in {"back", "cleaned"}:
            self.source.change(50)
            self.source.snapshot(epoch=2)
        self.goal: Lineage = self.source.lineage
        if scenario in {"newcomer", "unrelated"}:
            self.base = ""
        self.old = self.target.contents()
        self.new = self.source.contents(self.goal.tip_id)
        self.before = self.target.lineage
        self.snapshots = {record.id: self.target.contents(record.id) for record in self.before}
        self.fill()

    # What the target is found as.

    def _newcomer(self) -> None:
        pass

    def _stale(self) -> None:
        self.target.receive(self.source)

    def _written(self) -> None:
        self.target.receive(self.source)
        self.target.edit(3)
        self.own["live"] = self.target.contents()

    def _diverged(self) -> None:
        self.target.receive(self.source)
        self._goes_on()

    def _back(self) -> None:
        self._diverged()

    def _unrelated(self) -> None:
        self.target.create(99)
        self._goes_on(turns=1)

    def _cleaned(self) -> None:
        self._written()

    def _goes_on(self, turns: int = 2) -> None:
        for turn in range(turns):
            self.target.edit(turn)
            taken = self.target.snapshot()
            self.own[taken.id] = self.target.contents()
        self.target.edit(3)
        self.own["live"] = self.target.contents()

    # What the agent does.

    @property
    def restores(self) -> bool:
        """Nothing is to be received: the target has the goal."""
        return self.base == self.goal.tip_id

    def fill(self, replica: Any = None) -> None:
        """A whole stage, and nobody who has it open."""
        replica = replica or self.target
        stage = open_stage(replica, self.source, self.base, self.goal.tip)
        if not self.restores and replica.lineage.tip_id != self.goal.tip_id:
            transfer(self.source, replica, stage)
        stage.close()

    def commit(self, step: Any = None, **options: Any) -> tuple[PreservedCopy, ...]:
        """By an agent that was started since the stage was filled, or since it was killed."""
        return self.commit_by(self.target.again(**({} if step is None else {"step": step})), **options)

    def commit_by(self, replica: Any, **options: Any) -> tuple[PreservedCopy, ...]:
        """By an agent that may have lived through something."""
        stage = open_stage(replica, self.source, self.base, self.goal.tip)
        try:
            if not self.restores and replica.lineage.tip_id != self.goal.tip_id:
                assert stage.resumed, "whatever happened to the commit, nothing needs to be sent again"
                if replica.kind.shape == "stream":
                    assert stage.complete
            return replica.backend.commit(stage, self.order(replica, **options))
        finally:
            stage.close()

    def order(self, replica: Any, **options: Any) -> Any:
        options = {
            "expected_tip": self.before.tip_id,
            "replace_own_data": self.scenario in {"diverged", "back"},
            "replace_unrelated": self.scenario == "unrelated",
            **options,
        }
        return replica.order(self.goal, **options)

    # Looking at it.

    def check_one_whole(self) -> bool:
        """The path shows one whole live copy, before anybody recovers; whether it is the new one."""
        shown = self.target.contents()
        allowed = {self.old, self.new, None} if self.target.kind.may_be_absent else {self.old, self.new}
        assert shown in allowed, "the live copy is neither the old nor the new one"
        if not self.target.kind.may_be_absent:
            tip = self.target.again().lineage.tip_id
            assert tip == (self.goal.tip_id if shown == self.new else self.before.tip_id), "the records say otherwise"
        return shown == self.new

    def recover(self) -> bool:
        """The agent starts again: the target is as it was, or at its goal, and nothing is lost. Whether at its goal."""
        again = self.target.again()
        again.backend.recover()
        shown = again.contents()
        found = again.backend.examine()
        came = shown == self.new and found.lineage.ids() == self.goal.ids()
        if self.scenario == "cleaned":
            came = shown == self.new
        if not came:
            assert shown == self.old
            assert found.preserved == ()
            assert found.lineage.ids() == self.before.ids()
            assert found.lineage.tip_id == self.before.tip_id
            assert {record.id: again.contents(record.id) for record in found.lineage} == self.snapshots
        else:
            self.check_done()
        return came

    def check_done(self) -> None:
        """The target is at its goal, and all that was its own is kept."""
        again = self.target.again()
        assert again.contents() == self.new
        assert again.contents(self.goal.tip_id) == self.new
        found = again.backend.examine()
        assert found.live.state is LiveState.UNMODIFIED
        assert [record.id for record in found.lineage] == [record.id for record in self.goal]
        for record in found.lineage:
            there = again.contents(record.id)
            assert record.present == (there is not None)
            assert there == self.snapshots.get(record.id, there), "a snapshot that stayed is what it was"
        kept = {("live" if copy.live else copy.based_on): again.contents(copy) for copy in found.preserved}
        assert kept == self.own
        assert again.debris() == []
