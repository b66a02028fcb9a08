"""What happened, as it is kept: numbered over all reigns, each event naming the one before it, the oldest let go.

The rules:

* A number is the term and a count, so a later reign's are higher, and nobody needs to be asked for the next one. Terms
  beyond 2^31 - 1 have no upper half of their own: their numbers go on after the last.
* Each event names the one before it. What a reader has seen last and what is still kept tell whether anything between
  them is gone; nothing has to be written for that when the oldest are let go.
* What is found again and again (an opening that is tried every few seconds) is said once, and again after an hour: else
  it would write without end, and push out everything else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from coordinator.core.cluster import ClusterEvent
from coordinator.core.events import Forgotten

EVENTS_MAX: Final = 10_000
TERM_MAX: Final = 2**31 - 1
"""The highest term that is the upper half of a number, and the highest that an agent can tell of."""
FORGOTTEN_AT_ONCE_MAX: Final = 8
SAID_AGAIN_MS: Final = 3600 * 1000
MESSAGE_CHARS_MAX: Final = 2048
FIELD_CHARS_MAX: Final = 253


class History:
    """The events of one cluster, oldest first."""

    def __init__(self, term: int, events: Iterable[ClusterEvent]) -> None:
        self._events = deque(events)
        self._last = self._events[-1].sequence if self._events else 0
        self._next = first_number(term, self._last)
        self._said = {_subject(event): event for event in self._events}

    def __iter__(self) -> Iterator[ClusterEvent]:
        return iter(self._events)

    def add(self, now_ms: int, kind: str, message: str, **about: str) -> tuple[ClusterEvent, tuple[Forgotten, ...]]:
        """A new event, and those that are let go for it; texts are cut at their bounds."""
        named = {field: _cut(value, FIELD_CHARS_MAX) for field, value in about.items()}
        event = ClusterEvent(
            self._next, now_ms, kind, message=_cut(message, MESSAGE_CHARS_MAX), previous=self._last, **named
        )
        self._next, self._last = event.sequence + 1, event.sequence
        self._events.append(event)
        self._said[_subject(event)] = event
        gone = [self._events.popleft() for _ in range(min(len(self._events) - EVENTS_MAX, FORGOTTEN_AT_ONCE_MAX))]
        for old in gone:
            if self._said.get(_subject(old)) is old:
                del self._said[_subject(old)]
        return event, tuple(map(Forgotten, gone))

    def says(self, now_ms: int, kind: str, message: str, **about: str) -> bool:
        """Whether that was the last word on its subject, within the hour."""
        asked = ClusterEvent(0, now_ms, kind, message=_cut(message, MESSAGE_CHARS_MAX), previous=0, **about)
        last = self._said.get(_subject(asked))
        if last is None or not 0 <= now_ms - last.create_time_ms < SAID_AGAIN_MS:
            return False
        return (last.reason, last.message) == (asked.reason, asked.message)


def first_number(term: int, last: int) -> int:
    """The first number that a reign gives, above the last one that the store has."""
    return max(min(term, TERM_MAX) << 32, last) + 1


def _subject(event: ClusterEvent) -> tuple[str, str, str]:
    return event.type, event.volume, event.node


def _cut(text: str, chars_max: int) -> str:
    return text if len(text) <= chars_max else f"{text[: chars_max - 1]}…"
