"""A dry run says what an election would decide, and leaves no trace."""

from __future__ import annotations

from coordinator.core import events as e
from coordinator.core.cluster import ElectionRecord
from coordinator.core.requests import ElectRequest
from tests.coordinator.core.scenario import Scenario, given


def test_a_dry_run_names_the_epoch_that_would_be_opened_and_stores_nothing():
    volume = given(["vm1", "1", "E1", "a", "a,b", "1-2:s2", "s2"])
    scenario = Scenario(e.Loaded(dict([volume]), {}, {}, {}))
    scenario.run("connect b vm1\nreport b vm1 1-2:s2 1-1:s1 unmodified +record\n")
    request = ElectRequest("vm1", accept_loss=frozenset({"a"}), dry_run=True)
    actions = scenario.engine.step(e.Requested("q", request), scenario.now_ms)
    (asked,) = [action for action in actions if isinstance(action, e.SendExamine)]
    for event in scenario.events(f"report b vm1 1-2:s2 1-1:s1 unmodified +record !{asked.examine_id}".split()):
        actions += scenario.engine.step(event, scenario.now_ms)
    assert not [action for action in actions if isinstance(action, e.Persist | e.GiveOrder)]
    (answer,) = [action.answer for action in actions if isinstance(action, e.Answer)]
    assert isinstance(answer, ElectionRecord)
    assert (answer.winner, answer.epoch, answer.epoch_id) == ("b", 2, "")
    assert scenario.engine.view("vm1").record.epoch == 1
