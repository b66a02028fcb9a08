"""Events are numbered over all reigns, chained, bounded, and not said without end."""

from __future__ import annotations

from coordinator.core.context import RECORDS_AT_ONCE_MAX, Context, Identity, Settings
from coordinator.core.events import Forgotten, Persist, Tell, Volume
from coordinator.core.history import (
    EVENTS_MAX,
    FIELD_CHARS_MAX,
    FORGOTTEN_AT_ONCE_MAX,
    MESSAGE_CHARS_MAX,
    SAID_AGAIN_MS,
    History,
)


def told(history: History, count: int, **about: str) -> None:
    for number in range(count):
        history.add(number, "TOLD", f"number {number}", **about)


def test_numbers_grow_over_reigns_and_each_names_the_one_before() -> None:
    first = History(3, ())
    told(first, 3)
    second = History(4, tuple(first))
    told(second, 2)
    numbers = [event.sequence for event in second]
    assert numbers == [(3 << 32) + 1, (3 << 32) + 2, (3 << 32) + 3, (4 << 32) + 1, (4 << 32) + 2]
    assert [event.previous for event in second] == [0, *numbers[:-1]]


def test_numbers_grow_even_if_the_term_does_not() -> None:
    first = History(9, ())
    told(first, 1)
    event, _ = History(2, tuple(first)).add(0, "TOLD", "later")
    assert event.sequence > max(one.sequence for one in first)


def test_the_oldest_are_let_go_and_it_can_be_told() -> None:
    history = History(1, ())
    told(history, EVENTS_MAX)
    oldest = next(iter(history))
    event, gone = history.add(0, "TOLD", "one more")
    assert gone == (Forgotten(oldest),)
    assert len(list(history)) == EVENTS_MAX
    assert next(iter(history)).previous == oldest.sequence
    assert event.sequence == (1 << 32) + EVENTS_MAX + 1


def test_a_larger_history_than_is_kept_now_shrinks_in_bounded_steps() -> None:
    before = History(1, ())
    told(before, EVENTS_MAX)
    history = History(2, (*before, *(before.add(0, "TOLD", "more")[0] for _ in range(2 * FORGOTTEN_AT_ONCE_MAX))))
    assert [len(history.add(0, "TOLD", "x")[1]) for _ in range(4)] == [FORGOTTEN_AT_ONCE_MAX] * 2 + [3, 1]


def test_texts_are_cut() -> None:
    event, _ = History(1, ()).add(0, "TOLD", "m" * 9999, principal="p" * 9999)
    assert len(event.message) == MESSAGE_CHARS_MAX
    assert len(event.principal) == FIELD_CHARS_MAX


def test_what_is_found_again_and_again_is_said_once_an_hour() -> None:
    context = Context(Identity("demo", "s", 1, "l"), Settings(), str, str, History(1, ()))

    def said(now_ms: int, message: str, volume: str = "vm1") -> bool:
        context.now_ms, context.actions = now_ms, []
        context.tell_once("OPENING", message, volume=volume, reason="OPENING")
        return bool(context.actions)

    assert said(0, "no")
    assert not said(1, "no")
    assert said(2, "no", volume="vm2")
    assert said(3, "another reason")
    assert said(4, "no"), "it is news again"
    assert not said(4 + SAID_AGAIN_MS - 1, "no")
    assert said(4 + SAID_AGAIN_MS, "no")
    assert said(5, "no"), "a clock that was put back"
    again = Context(Identity("demo", "s", 2, "l"), Settings(), str, str, History(2, tuple(context.history)), 6)
    again.tell_once("OPENING", "no", volume="vm1", reason="OPENING")
    assert not again.actions, "the next leader does not say it again"


def test_an_event_is_stored_with_what_was_stored_last() -> None:
    context = Context(Identity("demo", "s", 1, "l"), Settings(), str, str, History(1, ()))
    context.persist(Volume("vm1", None))
    context.persist(Volume("vm2", None))
    context.tell("REMOVED", "vm2", volume="vm2")
    first, second, shown = (one for one in context.actions if isinstance(one, Persist | Tell))
    assert isinstance(first, Persist)
    assert isinstance(second, Persist)
    assert isinstance(shown, Tell)
    assert first.records == (Volume("vm1", None),)
    assert second.records == (Volume("vm2", None), shown.event)


def test_a_transaction_takes_so_many_events_and_then_there_is_another() -> None:
    context = Context(Identity("demo", "s", 1, "l"), Settings(), str, str, History(1, ()))
    for number in range(2 * RECORDS_AT_ONCE_MAX + 1):
        context.tell("TOLD", str(number))
    stored = [one.records for one in context.actions if isinstance(one, Persist)]
    assert list(map(len, stored)) == [RECORDS_AT_ONCE_MAX, RECORDS_AT_ONCE_MAX, 1]
    assert [event for records in stored for event in records] == list(context.history)
    before = set()
    for action in context.actions:
        before |= set(action.records) if isinstance(action, Persist) else set()
        assert not isinstance(action, Tell) or action.event in before
