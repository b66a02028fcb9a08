"""Why this primary, why this state, why this action: in words that an operator can act on."""

from __future__ import annotations

from dataclasses import replace

from coordinator.core.cluster import Candidate, ElectionRecord, Refusal, ReplicaState
from coordinator.explain import explain
from resilver.lineage import ConsistencyPoint, Lineage, Origin, Snapshot
from resilver.volume import LiveState, Presence
from tests.coordinator.known import NOW_MS, Known, entry, granted, report

DB1 = entry("db1", "a", "abc", "5-18")
CP = ConsistencyPoint(4, 9)
HISTORY = "4-8 4-9 " + " ".join(f"5-{sequence}" for sequence in range(10, 19))


def candidate(node: str, verdict: str, **changes) -> Candidate:
    made = Candidate(
        node, True, NOW_MS - 10**8, CP, "s4-9", LiveState.UNMODIFIED, ReplicaState.IN_SYNC, CP, 10, verdict
    )
    return replace(made, **changes)


ELECTED = ElectionRecord(
    "db1",
    NOW_MS - 10**8,
    5,
    "eid5",
    "a",
    "b",
    CP,
    "equal CP, then priority (a 10, c 0)",
    (
        candidate("a", "won"),
        candidate(
            "b",
            "does not answer; what only it has was accepted as lost: --accept-loss b",
            reported=False,
            live=LiveState.MODIFIED,
            state=ReplicaState.UNKNOWN,
        ),
        candidate("c", "in sync with a"),
    ),
    None,
    ("b",),
    "ops@jump1",
    11,
)


def three(*elections: ElectionRecord) -> Known:
    """a is primary at 5-18 and c with it; b has 4-10, 4-11 and live writes of its own."""
    known = Known([DB1], elections)
    known.hear("a", report("db1", HISTORY, LiveState.MODIFIED, **granted(DB1)))
    known.hear("b", report("db1", "4-8 4-9 4-10 4-11", LiveState.MODIFIED))
    known.hear("c", report("db1", HISTORY))
    return known


def said(known: Known, node: str = "", volume: str = "db1"):
    return explain(known.engine, known.engine.view(volume), node, NOW_MS)


def test_a_diverged_replica_is_explained_from_its_election_to_the_command_that_keeps_it():
    explained = said(three(ELECTED), "b")
    lines = explained.text.splitlines()
    assert lines[0] == (
        "db1 on b is DIVERGED. Primary is a since 2027-01-14 04:13:20Z: epoch 5, by term 11, asked by ops@jump1."
    )
    assert lines[1] == "WHY a     rule: equal CP, then priority (a 10, c 0)"
    assert [line.split()[0] for line in lines[2:6]] == ["NODE", "a", "b", "c"]
    assert "no, last report 2027-01-14 04:13:20Z" in lines[4]
    assert lines[4].count("--accept-loss b") == 1
    assert lines[6] == (
        "WHY b IS DIVERGED   common 4-9 (intact on a, b, c); a went on 5-10 .. 5-18; "
        "b went on 4-10, 4-11 and live writes"
    )
    assert lines[7].startswith("WHAT RESYNC WOULD DO   a takes 5-19 first; then delta from 4-9, from a")
    assert "preserved first" in lines[7]
    assert lines[8] == (
        "TO KEEP b's DATA INSTEAD   resilver elect db1 --choose b --accept-loss a --accept-loss c"
        "   (5-10 .. 5-18 would be preserved on a and c)"
    )
    assert explained.decided == ELECTED
    assert (explained.would_be.winner, explained.would_be.epoch) == ("a", 5)


def test_without_a_node_every_replica_but_the_primary_is_explained():
    text = said(three(ELECTED)).text
    assert text.startswith("db1: primary is a since")
    assert "WHY b IS DIVERGED" in text
    assert "WHY c IS IN_SYNC   its newest CP is the primary's, 5-18" in text
    assert "WHY a IS" not in text


def test_a_reign_of_this_coordinator_is_named():
    text = said(three(replace(ELECTED, term=12))).text
    assert "by coordinator c1 (term 12)" in text


def test_the_primary_is_explained_by_the_election_that_opened_the_epoch_and_the_last_refusal_is_told():
    refusal = Refusal(("PRIMARY_AWAY",), "a did not answer", next_command="resilver elect db1 --accept-loss a")
    asked_again = ElectionRecord("db1", NOW_MS - 1000, refusal=refusal)
    confirmed = replace(ELECTED, create_time_ms=NOW_MS - 2000, principal="somebody else")
    explained = said(three(asked_again, confirmed, ELECTED))
    assert explained.decided == ELECTED
    assert "LAST ASKED 2027-01-15 07:59:59Z   refused: PRIMARY_AWAY" in explained.text
    assert "  next: resilver elect db1 --accept-loss a" in explained.text
    assert "somebody else" not in explained.text


def test_an_absent_primary_says_what_an_election_would_say():
    known = three(ELECTED)
    known.disconnect("a")
    explained = said(known, "c")
    assert "IF ASKED NOW   refused: PRIMARY_AWAY" in explained.text
    assert "--accept-loss a" in explained.text
    assert "WHAT RESYNC WOULD DO   nothing" in explained.text
    assert explained.would_be.refusal is not None
    assert explained.plan.refusal is not None


def test_a_decision_that_is_no_longer_kept_is_said_to_be_so():
    assert "the decision is no longer kept" in said(three()).text


def test_a_first_sight_says_what_the_first_resync_would_do():
    known = Known()
    known.hear("a", report("new", "", LiveState.MODIFIED))
    known.hear("b", report("new", "", LiveState.ABSENT, presence=Presence.EMPTY))
    text = said(known, volume="new").text
    assert "new has no primary yet" in text
    assert "IF ASKED NOW   a would be elected" in text
    assert "  next: resilver resync new" in text
    assert "WHY b IS EMPTY" in text


def test_what_another_tool_has_mirrored_is_told_before_anything_moves():
    known = Known()
    first, second = (Snapshot(f"{at}", parent=f"{at - 1}", origin=Origin.ADOPTED, note=f"daily-{at}") for at in (1, 2))
    mine, theirs = Lineage((second, first)), Lineage((first,))
    known.hear("a", replace(report("new", "", LiveState.MODIFIED), lineage=mine, backend="btrfs"))
    known.hear("b", replace(report("new", "", LiveState.ABSENT), lineage=theirs, backend="btrfs"))
    lines = said(known, volume="new").text.splitlines()
    at = lines.index("WHAT RESYNC WOULD DO   make a the primary, which takes 1-1; then")
    assert lines[at + 1 : at + 3] == [
        "  b: delta from daily-1, from a (daily-1 is the newest snapshot in common)",
        "  next: resilver resync new",
    ]
    assert "WHY b IS UNKNOWN   there is no primary yet to compare it with; its newest snapshot: daily-1" in lines


def test_each_state_is_explained():
    known = three(ELECTED)
    known.hear("d", report("db1", "", LiveState.ABSENT, presence=Presence.LOST))
    known.hear("e", report("db1", "", LiveState.MODIFIED, volume_id="other"))
    known.hear("f", report("db1", "1-1 1-2", volume_id="vid"))
    unread = report("db1", "", LiveState.ABSENT, presence=Presence.LOST)
    known.hear("g", replace(unread, problems=("IO_ERROR: of its disk",)))
    known.disconnect("c")
    text = said(known).text
    assert "WHY g IS LOST   it cannot be looked at: IO_ERROR: of its disk" in text
    assert "WHY c IS UNKNOWN   its newest CP was 5-18" in text
    assert "it is not connected" in text
    assert "WHY d IS LOST   it had data, and its disk is not there" in text
    assert "WHY e IS FOREIGN   its data is of another volume (other)" in text
    assert "WHY f IS UNRELATED   it has data, and no snapshot in common with the primary" in text
