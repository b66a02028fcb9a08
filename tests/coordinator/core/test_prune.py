"""Pruning says of every snapshot what became of it."""

from __future__ import annotations

import pytest

from coordinator.core import events as e
from coordinator.core.orders import Dropped, DropSnapshot
from coordinator.core.requests import DropRequest, Pruned, PruneRequest
from resilver.errors import Refused
from tests.coordinator.core.scenario import Scenario, given

REPORT = "report a vm1 1-3:s3 1-2:s2 1-1:s1 unmodified +record +grant"


def test_what_a_node_would_not_drop_is_told_with_its_reason():
    volume = given(["vm1", "1", "E1", "a", "a", "1-3:s3"])
    scenario = Scenario(e.Loaded(dict([volume]), {}, {}, {}))
    scenario.run(f"connect a vm1\n{REPORT}\n")
    actions = scenario.engine.step(e.Requested("q", PruneRequest("vm1", keep_last=1)), scenario.now_ms)
    answers = [Refused("PINNED", "snapshot 1-2 is needed", pinned_by="needed by a transfer"), Dropped(4096)]
    for answer in answers:
        (order,) = [action for action in actions if isinstance(action, e.GiveOrder)]
        actions = scenario.engine.step(e.OrderAnswered(order.order_id, answer), scenario.now_ms)
    (pruned,) = [action.answer for action in actions if isinstance(action, e.Answer)]
    assert isinstance(pruned, Pruned)
    dropped = {name for _, name, _ in pruned.dropped}
    kept = {name: why for _, name, why in pruned.kept}
    assert {*dropped, *kept} == {"s1", "s2", "s3"}
    assert len(dropped) == 1
    assert ("needed by a transfer",) in kept.values()


ADOPTED = "report a vm1 1-2:s2 1-1:s1 0-0:g3 0-0:g2 0-0:g1 ~g7 unmodified +record +grant"


def adopted() -> Scenario:
    volume = given(["vm1", "1", "E1", "a", "a", "1-2:s2"])
    scenario = Scenario(e.Loaded(dict([volume]), {}, {}, {}))
    scenario.run("connect a vm1\n")
    return scenario


def test_what_another_tool_made_is_never_pruned_and_does_not_count():
    scenario = adopted()
    said = scenario.run(f"{ADOPTED}\n")
    assert "DropSnapshot" not in said
    actions = scenario.engine.step(e.Requested("q", PruneRequest("vm1", keep_last=1)), scenario.now_ms)
    (order,) = [action for action in actions if isinstance(action, e.GiveOrder)]
    assert isinstance(order.order, DropSnapshot)
    assert order.order.snapshot_id == "s1"
    actions = scenario.engine.step(e.OrderAnswered(order.order_id, Dropped(1)), scenario.now_ms)
    (pruned,) = [action.answer for action in actions if isinstance(action, e.Answer)]
    assert isinstance(pruned, Pruned)
    assert [name for _, name, _ in pruned.dropped] == ["s1"]
    assert {name for _, name, why in pruned.kept if "another tool's" in why} == {"g1", "g2", "g3"}


@pytest.mark.parametrize("name", ["g2", "g7"])
def test_what_another_tool_made_is_not_dropped_by_order(name):
    scenario = adopted()
    scenario.run(f"{ADOPTED}\n")
    request = DropRequest(name, frozenset({"a"}))
    (answer,) = scenario.engine.step(e.Requested("q", request), scenario.now_ms)
    assert isinstance(answer, e.Answer)
    assert isinstance(answer.answer, Refused)
    assert answer.answer.reason == "PINNED"
    assert answer.answer.message == f"auto-{name} on a was made by another tool: let it go with that one"
