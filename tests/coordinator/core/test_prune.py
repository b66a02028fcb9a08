"""Letting snapshots go: what is pinned stays, what is gone is told, and the last copy is nobody's to drop."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from coordinator.core import events as e
from coordinator.core.audited import Asked, AuditResult
from coordinator.core.context import Settings
from coordinator.core.orders import Dropped, DropSnapshot
from coordinator.core.requests import DropRequest, Pruned, PruneRequest
from resilver.errors import NotFound, Refused
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
    refused = let_go(scenario, name, "a", [("a", ADOPTED)])
    assert isinstance(refused, Refused)
    assert refused.reason == "PINNED"
    assert refused.message == f"auto-{name} on a was made by another tool: let it go with that one"


def let_go(scenario: Scenario, name: str, node: str, answering: list[tuple[str, str]]) -> object:
    """Asks for it, has the nodes say what they have, carries out the order, and gives the answer."""
    answers = list(ask(scenario, name, node))
    said = [action.examine_id for action in answers if isinstance(action, e.SendExamine)]
    for _, report in answering:
        answers += acted(scenario, f"{report} !{said[0]}")
    for order in [action for action in answers if isinstance(action, e.GiveOrder)]:
        answers += scenario.engine.step(e.OrderAnswered(order.order_id, Dropped(1)), scenario.now_ms)
    return next(action.answer for action in answers if isinstance(action, e.Answer))


def ask(scenario: Scenario, name: str, node: str) -> tuple[object, ...]:
    return tuple(scenario.engine.step(e.Requested(node, DropRequest(name, frozenset({node}))), scenario.now_ms))


def acted(scenario: Scenario, line: str) -> list[object]:
    """What one line of a scenario has the engine do."""
    return [
        action for event in scenario.events(line.split()) for action in scenario.engine.step(event, scenario.now_ms)
    ]


LINE = "1-4:s4 1-3:s3 1-2:s2 1-1:s1 unmodified +record"
ON_A, ON_B = f"report a vm1 {LINE} +grant", f"report b vm1 {LINE}"


def pair() -> Scenario:
    volume = given(["vm1", "1", "E1", "a", "a,b", "1-4:s4", "s4"])
    scenario = Scenario(e.Loaded(dict([volume]), {}, {}, {}))
    scenario.run(f"connect a vm1\nconnect b vm1\n{ON_A}\n{ON_B}\n")
    return scenario


def test_of_two_drops_at_once_only_one_finds_another_copy():
    scenario = pair()
    without = ON_A.replace("1-2:s2", "-1-2:s2")
    first, second = ask(scenario, "s2", "a"), ask(scenario, "s2", "b")
    (examine,) = [action.examine_id for action in (*first, *second) if isinstance(action, e.SendExamine)][:1]
    actions = acted(scenario, f"{ON_A} !{examine}") + acted(scenario, f"{ON_B} !{examine}")
    (order,) = [action for action in actions if isinstance(action, e.GiveOrder)]
    assert isinstance(order.order, DropSnapshot)
    assert order.node == "a"
    actions = list(scenario.engine.step(e.OrderAnswered(order.order_id, Dropped(1)), scenario.now_ms))
    again = [action.examine_id for action in actions if isinstance(action, e.SendExamine)]
    actions += acted(scenario, f"{without} !{again[0]}") + acted(scenario, f"{ON_B} !{again[0]}")
    answered = {action.key: action.answer for action in actions if isinstance(action, e.Answer)}
    assert answered["a"] == Dropped(1)
    assert isinstance(answered["b"], Refused)
    assert answered["b"].reason == "LAST_COPY"
    assert not any(isinstance(action, e.GiveOrder) for action in actions)


@pytest.mark.parametrize(("name", "gone"), [("g2", "-0-0:g2"), ("s1", "-1-1:s1")])
def test_what_was_let_go_before_the_volumes_turn_is_not_ordered(name, gone):
    """Whoever let it go may put it back, which no order for the one before may meet."""
    scenario = adopted()
    scenario.run(f"connect b vm1\n{ADOPTED}\n{ADOPTED.replace('report a', 'report b').replace(' +grant', '')}\n")
    without = ADOPTED.replace(gone[1:], gone)
    refused = let_go(scenario, name, "a", [("a", without), ("b", ADOPTED.replace("report a", "report b"))])
    assert isinstance(refused, NotFound)
    assert refused.reason == "SNAPSHOT_NOT_FOUND"
    assert refused.message == f"node a has let snapshot {name!r} go meanwhile"


def test_a_copy_on_a_node_that_is_away_does_not_count():
    scenario = pair()
    scenario.run("disconnect b\n")
    refused = let_go(scenario, "s2", "a", [("a", ON_A)])
    assert isinstance(refused, Refused)
    assert refused.reason == "LAST_COPY"


def test_a_snapshot_that_another_node_has_goes():
    assert let_go(pair(), "s2", "a", [("a", ON_A), ("b", ON_B)]) == Dropped(1)


def dropped(scenario: Scenario, report: str, times: int) -> list[str]:
    """What the node that reports is told to let go, while it reports what it still has, again and again."""
    gone: list[str] = []
    for _ in range(times):
        scenario.run("tick 10\n")
        told = acted(scenario, re.sub(r"\S+:(\w+)", lambda one: "-" * (one[1] in gone) + one[0], report))
        while orders := [one for one in told if isinstance(one, e.GiveOrder) and isinstance(one.order, DropSnapshot)]:
            gone.append(orders[0].order.snapshot_id)
            told = list(scenario.engine.step(e.OrderAnswered(orders[0].order_id, Dropped(1)), scenario.now_ms))
    return gone


def line(epoch: int, letter: str, newest: int, oldest: int) -> str:
    return " ".join(f"{epoch}-{number}:{letter}{number}" for number in range(newest, oldest - 1, -1))


def test_what_the_primary_before_was_followed_up_to_is_kept_for_it():
    """Also if its base of the time before it was primary is still written down."""
    volume, entry = given(["vm1", "2", "E2", "a", "a,b", "2-20:t20", "t20"])
    entry = replace(entry, bases={**entry.bases, "a": "s1"})
    scenario = Scenario(e.Loaded({volume: entry}, {}, {}, {}))
    old = f"{line(2, 't', 20, 2)} 1-1:s1"
    scenario.run(f"connect b vm1\nreport b vm1 {old} unmodified +record\nask r elect vm1 accept=a\n")
    scenario.run(f"report b vm1 {old} unmodified +record !i1\n")
    opened = scenario.engine.view("vm1").entry
    assert opened is not None
    assert opened.record.primary == "b"
    assert dict(opened.bases) == {"a": "t20"}
    # Another leader, which has never heard of a's replica.
    scenario = Scenario(e.Loaded({volume: replace(opened, opening=False)}, {}, {}, {}))
    scenario.run("connect b vm1\n")
    grant = f"unmodified +record +grant epoch={opened.record.epoch_id}"
    gone = dropped(scenario, f"report b vm1 {line(3, 'u', 41, 21)} {old} {grant}", 12)
    assert "t19" in gone
    assert "t20" not in gone


def test_against_a_primary_that_came_back_from_an_old_image_nothing_is_noted_or_pruned():
    volume = given(["vm1", "1", "E1", "a", "a,b,c", "1-40:s40", "s40", "s10"])
    scenario = Scenario(e.Loaded(dict([volume]), {}, {}, {}))
    on_b = f"report b vm1 {line(1, 's', 40, 1)} unmodified +record"
    scenario.run("connect a vm1\nconnect b vm1\nconnect c vm1\n")
    scenario.run(f"{on_b}\nreport c vm1 {line(1, 's', 10, 1)} unmodified +record\n")
    scenario.run(f"report a vm1 {line(1, 's', 5, 1)} unmodified +record +grant\n")
    entry = scenario.engine.view("vm1").entry
    assert entry is not None
    assert dict(entry.bases) == {"b": "s40", "c": "s10"}
    assert dropped(scenario, on_b, 4) == []


def test_by_hand_nothing_goes_that_may_be_the_base_of_a_member_that_is_away():
    volume = given(["vm1", "3", "E3", "b", "a,b", "3-22:u22"])
    scenario = Scenario(e.Loaded(dict([volume]), {}, {}, {}))
    scenario.run("connect b vm1\nreport b vm1 3-22:u22 3-21:u21 2-20:t20 2-19:t19 unmodified +record +grant\n")
    (answer,) = scenario.engine.step(e.Requested("q", PruneRequest("vm1", keep_last=2)), scenario.now_ms)
    assert isinstance(answer, e.Answer)
    assert isinstance(answer.answer, Pruned)
    assert answer.answer.dropped == ()
    kept = {name: why for _, name, why in answer.answer.kept}
    assert kept["t20"] == kept["t19"] == ("the base of a is not known",)
    assert kept["u21"] == ("among the last 2",)


@pytest.mark.parametrize("asked", [DropRequest("s2", frozenset({"b"})), PruneRequest("vm1", keep_last=1)])
def test_another_operation_that_does_not_end_is_told(asked):
    scenario = pair()
    scenario.engine._context.locks.add("vm1")
    scenario.engine.step(e.Requested("q", asked), scenario.now_ms)
    waited = acted(scenario, f"tick {Settings().lock_timeout_ms // 1000 + 1}")
    answered = {action.key: action.answer for action in waited if isinstance(action, e.Answer)}
    assert isinstance(answered["q"], Refused)
    assert answered["q"].reason == "OPENING"


def test_a_drop_that_one_of_two_nodes_refuses_says_who_did_it():
    volume = given(["vm1", "1", "E1", "a", "a,b,c", "1-4:s4", "s4", "s4"])
    scenario = Scenario(e.Loaded(dict([volume]), {}, {}, {}))
    scenario.run(f"connect a vm1\nconnect b vm1\nconnect c vm1\n{ON_A}\n{ON_B}\n{ON_B.replace(' b ', ' c ')}\n")
    request = DropRequest("s2", frozenset({"a", "c"}))
    asked = Asked("DeleteSnapshot", "resilver://demo/operator/jo", "10.0.0.1")
    actions = list(scenario.engine.step(e.Requested("q", request, asked), scenario.now_ms))
    (examine,) = {action.examine_id for action in actions if isinstance(action, e.SendExamine)}
    for report in (ON_A, ON_B, ON_B.replace(" b ", " c ")):
        actions += acted(scenario, f"{report} !{examine}")
    answers = {"a": Refused("PINNED", "needed by a transfer"), "c": Dropped(7)}
    for order in [action for action in actions if isinstance(action, e.GiveOrder)]:
        actions += scenario.engine.step(e.OrderAnswered(order.order_id, answers[order.node]), scenario.now_ms)
    (answer,) = [action.answer for action in actions if isinstance(action, e.Answer)]
    assert isinstance(answer, Refused)
    assert (answer.message, answer.metadata["done"]) == ("needed by a transfer; it is gone from c", "c")
    told = [action.event.message for action in actions if isinstance(action, e.Tell) and action.event.type == "DROPPED"]
    assert told == ["s2 on c"]
    (entry,) = scenario.engine.audit()
    assert (entry.result, entry.reason) == (AuditResult.PARTLY, "PINNED")
