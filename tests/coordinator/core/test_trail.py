"""The audit trail: entered before what is done, answered with it, bounded whoever asks how often."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.core import trail as trails
from coordinator.core.audited import Asked, AuditEntry, AuditResult
from coordinator.core.cluster import Pause
from coordinator.core.events import Answer, Attempted, Forgotten, Loaded, Persist, Recorded, Requested, Ticked, Volume
from coordinator.core.orders import Dropped
from coordinator.core.requests import ElectRequest, PauseRequest, ResyncRequest
from coordinator.core.trail import Trail, outcome
from coordinator.records import key_of, load, to_json
from coordinator.reign import COMMIT_CHARS_MAX, in_commits
from coordinator.store.base import WRITES_MAX, Stored
from resilver.errors import Forbidden, Invalid, Refused
from tests.coordinator.core.scenario import Scenario
from tests.coordinator.core.scenario import given as kept

ASKED = Asked("ElectPrimary", "resilver://prod/operator/jo", "10.0.0.5", ("vm1",), "", '{"volume":"vm1"}')
NO = Forbidden("ROLE_NOT_ALLOWED", "a viewer may not")


def entered(actions):
    """The results that each commit of a step stores of the audit trail, in order."""
    return [
        {key: value and value["result"] for key, value in together.items() if key.startswith("audit/")}
        for together in in_commits(action for action in actions if isinstance(action, Persist))
    ]


def with_vm1():
    return Scenario(Loaded(dict([kept(["vm1", "3", "E3", "a", "a,b", "3-2:s2", "s1"])]), {}, {}, {}))


def test_a_change_and_its_entry_are_one_commit():
    scenario = with_vm1()
    asked = replace(ASKED, method="PauseVolume")
    request = PauseRequest(("vm1",), Pause("why", None, "jo"), "jo")
    actions = scenario.engine.step(Requested("k", request, asked), scenario.now_ms)
    commits = list(in_commits(action for action in actions if isinstance(action, Persist)))
    assert len(commits) == 1
    (entry,) = scenario.engine.audit()
    assert commits[0][key_of(entry)]["result"] == "DONE"
    assert "volumes/vm1" in commits[0]
    kinds = [type(action) for action in actions]
    assert kinds.index(Recorded) < kinds.index(Answer)
    assert max(at for at, kind in enumerate(kinds) if kind is Persist) < kinds.index(Answer)


def test_an_order_is_entered_before_anything_that_it_does_and_answered_before_its_caller_hears_it():
    scenario = with_vm1()
    engine = scenario.engine
    for line in ("connect a vm1", "connect b vm1"):
        for event in scenario.events(line.split()):
            engine.step(event, scenario.now_ms)
    actions = engine.step(Requested("k", ElectRequest("vm1"), ASKED), scenario.now_ms)
    assert isinstance(actions[0], Persist), "before the examine is sent"
    assert entered(actions) == [{key_of(engine.audit()[0]): "UNKNOWN"}]
    scenario.now_ms += 60_000
    actions = engine.step(Ticked(), scenario.now_ms)
    (entry,) = engine.audit()
    assert entry.result is AuditResult.REFUSED
    assert entered(actions)[-1] == {key_of(entry): "REFUSED"}
    answer = next(at for at, action in enumerate(actions) if isinstance(action, Answer))
    assert not any(isinstance(action, Persist) for action in actions[answer:])
    assert entry.reason in actions[answer].answer.refusal.reasons


def test_what_changes_nothing_is_not_entered():
    scenario = with_vm1()
    scenario.engine.step(Requested("k", ResyncRequest(("nobody",))), scenario.now_ms)
    assert scenario.engine.audit() == ()


def test_the_same_refusal_again_is_counted_and_leaves_no_second_record():
    scenario = with_vm1()
    store: dict[str, object] = {}
    for _ in range(50):
        scenario.now_ms += 1000
        actions = scenario.engine.step(Requested("k", ResyncRequest(("gone",)), ASKED), scenario.now_ms)
        for together in in_commits(action for action in actions if isinstance(action, Persist)):
            store.update(together)
    (entry,) = scenario.engine.audit()
    assert (entry.count, entry.reason) == (50, "VOLUME_NOT_FOUND")
    assert [key for key, value in store.items() if value is not None] == [key_of(entry)]
    assert store[key_of(entry)]["count"] == 50
    assert entry.last_time_ms - entry.create_time_ms == 49_000
    scenario.now_ms += trails.SAME_MS
    scenario.engine.step(Requested("k", ResyncRequest(("gone",)), ASKED), scenario.now_ms)
    assert [one.count for one in scenario.engine.audit()] == [50, 1], "after an hour it is news again"


def test_a_flood_of_attempts_is_a_few_records_and_no_commit_that_a_store_refuses():
    scenario = with_vm1()
    engine = scenario.engine
    writes = 0
    for second in range(120):
        for number in range(200):
            asked = replace(ASKED, method=f"M{number % 100}", address=f"10.0.{second}.{number}", request="x" * 5000)
            assert engine.step(Attempted(asked, NO), scenario.now_ms) == []
        scenario.now_ms += 1000
        actions = engine.step(Ticked(), scenario.now_ms)
        for together in in_commits(action for action in actions if isinstance(action, Persist)):
            assert len(together) <= WRITES_MAX
            assert len(repr(together)) < COMMIT_CHARS_MAX
            writes += len(together)
    assert writes < 120 * 3 * trails.FLUSHED_AT_ONCE_MAX
    entries = engine.audit()
    assert len(entries) <= trails.REFUSALS_MAX
    assert "several" in {one.method for one in entries}
    counted = sum(one.count for one in entries)
    waiting = sum(one.count for one in engine._context.trail._pending.values())
    assert counted + waiting == 120 * 200, "each is counted once"


def test_one_kind_without_end_is_written_every_ten_seconds():
    scenario = with_vm1()
    wrote = []
    for _ in range(60):
        for _ in range(10):
            scenario.engine.step(Attempted(ASKED, NO), scenario.now_ms)
        scenario.now_ms += 1000
        wrote.append(bool(entered(scenario.engine.step(Ticked(), scenario.now_ms))))
    assert 5 <= sum(wrote) <= 7
    (entry,) = scenario.engine.audit()
    assert entry.count > 500


def test_refusals_push_out_no_order():
    trail = Trail(1)
    begun, _ = trail.begin(0, ASKED)
    trail.end(0, begun, Dropped(5))
    gone = []
    for number in range(trails.REFUSALS_MAX + 100):
        entry, _ = trail.begin(number, replace(ASKED, volumes=(f"v{number}",)))
        gone += trail.end(number, entry, Refused("PAUSED", "no"))[1]
    assert len(list(trail)) == trails.REFUSALS_MAX + 1
    assert next(iter(trail)).result is AuditResult.DONE
    assert sum(isinstance(one, Forgotten) for one in gone) == 100


def test_the_oldest_orders_are_let_go(monkeypatch):
    monkeypatch.setattr(trails, "ORDERS_MAX", 20)
    trail = Trail(1)
    first, _ = trail.begin(0, ASKED)
    stored = {}
    for number in range(100):
        entry, kept_now = trail.begin(number, ASKED)
        ended = trail.end(number, entry, Dropped(number))[1]
        for one in (*kept_now, *ended):
            stored[key_of(one)] = to_json(one)
    assert len(list(trail)) == 20
    assert {key for key, value in stored.items() if value is not None} == {key_of(one) for one in trail}
    assert trail.end(101, first, Dropped(0))[1] == (), "an answer to what was let go leaves nothing behind"
    later = Trail(2, (*trail, *(replace(first, sequence=number) for number in range(1, 30))))
    assert len(later.begin(0, ASKED)[1]) == 1 + trails.ORDERS_FORGOTTEN_AT_ONCE_MAX


def test_numbers_grow_over_reigns_and_entries_are_read_as_they_were_written():
    trail = Trail(3)
    begun, _ = trail.begin(5, ASKED)
    refused, _ = trail.begin(6, ASKED)
    trail.end(7, refused, Invalid("INVALID_FIELD", "etag is another"))
    rows = {key_of(one): Stored(to_json(one), 1) for one in trail}
    loaded = load(rows)
    assert loaded.audit == tuple(trail)
    assert [one.result for one in loaded.audit] == [AuditResult.UNKNOWN, AuditResult.REFUSED]
    again, _ = Trail(4, loaded.audit).begin(8, ASKED)
    assert begun.sequence == (3 << 32) + 1
    assert again.sequence == (4 << 32) + 1


def test_the_longest_entry_is_small():
    long = "\U0001f4be" * 9999
    entry, _ = Trail(1).begin(0, Asked(long, long, long, (long,) * 999, long, long))
    ended = Trail(1, (entry,)).end(0, entry, Refused("PAUSED", long))[0]
    assert len(repr(to_json(ended))) < 16 << 10


@pytest.mark.parametrize("answer", [None, Dropped(3), NO])
def test_every_answer_has_an_outcome(answer):
    result, reason, message = outcome(answer)
    assert isinstance(result, AuditResult)
    assert (reason != "") == (result is AuditResult.REFUSED)
    assert isinstance(message, str)


def test_a_damaged_entry_stops_the_take_over():
    entry = AuditEntry(1, 2, "M", "p", "a")
    value = {**to_json(entry), "result": "MAYBE"}
    with pytest.raises(Exception, match="audit/"):
        load({key_of(entry): Stored(value, 1)})


def test_a_step_that_pauses_a_volume_without_an_asker_stores_as_before():
    scenario = with_vm1()
    request = PauseRequest(("vm1",), Pause("why", None, "jo"), "jo")
    actions = scenario.engine.step(Requested("k", request), scenario.now_ms)
    assert any(isinstance(one, Volume) for one in next(a for a in actions if isinstance(a, Persist)).records)
    assert entered(actions) == [{}]
