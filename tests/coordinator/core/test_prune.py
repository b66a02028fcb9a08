"""Pruning says of every snapshot what became of it."""

from __future__ import annotations

from coordinator.core import events as e
from resilver.errors import Refused
from tests.coordinator.core.scenario import Scenario, given

REPORT = "report a vm1 1-3:s3 1-2:s2 1-1:s1 unmodified +record +grant"


def test_what_a_node_would_not_drop_is_told_with_its_reason():
    volume = given(["vm1", "1", "E1", "a", "a", "1-3:s3"])
    scenario = Scenario(e.Loaded(dict([volume]), {}, {}, {}))
    scenario.run(f"connect a vm1\n{REPORT}\n")
    actions = scenario.engine.step(e.Requested("q", e.PruneRequest("vm1", keep_last=1)), scenario.now_ms)
    answers = [Refused("PINNED", "snapshot 1-2 is needed", pinned_by="needed by a transfer"), e.Dropped(4096)]
    for answer in answers:
        (order,) = [action for action in actions if isinstance(action, e.GiveOrder)]
        actions = scenario.engine.step(e.OrderAnswered(order.order_id, answer), scenario.now_ms)
    (pruned,) = [action.answer for action in actions if isinstance(action, e.Answer)]
    assert isinstance(pruned, e.Pruned)
    dropped = {name for _, name, _ in pruned.dropped}
    kept = {name: why for _, name, why in pruned.kept}
    assert {*dropped, *kept} == {"s1", "s2", "s3"}
    assert len(dropped) == 1
    assert ("needed by a transfer",) in kept.values()
