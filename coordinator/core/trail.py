"""The audit trail: every order that changes something, refused ones too, within a bound.

The rules:

* An order is entered before anything that it does, in the same commit as the first of that or in one before it, and its
  answer in the same commit as the last, before its caller hears it. An entry without an answer is of an order that is
  being carried out, or whose leader ended meanwhile: then look at what it was about.
* What was refused before it became an order (a role that may not, a field that is wrong) is entered with the next tick:
  however many there are, a second has one commit of them.
* Refusals of one kind within an hour are one entry that counts them, and refusals have a bound of their own: whoever is
  refused again and again neither fills the store nor pushes out what was done.
* The oldest are let go as new ones come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from coordinator.core.audited import Asked, AuditEntry, AuditResult
from coordinator.core.cluster import ElectionRecord, Refusal, Resync
from coordinator.core.events import Forgotten
from coordinator.core.history import first_number
from coordinator.core.orders import Dropped, Exported
from coordinator.core.requests import Planned, Pruned, ResyncsStarted, SnapshotsTaken, VolumeRefusal
from resilver.errors import ResilverError

ORDERS_MAX: Final = 5_000
REFUSALS_MAX: Final = 1_000
ORDERS_FORGOTTEN_AT_ONCE_MAX: Final = 8
REFUSALS_FORGOTTEN_AT_ONCE_MAX: Final = 2
FLUSHED_AT_ONCE_MAX: Final = 8
"""Kinds of refusals that one tick enters: with what is let go for them far less than one commit takes."""
PENDING_MAX: Final = 64
"""Kinds of refusals that wait for a tick; those beyond count as one."""
COUNTED_AGAIN_MS: Final = 10_000
SAME_MS: Final = 3600 * 1000
VOLUMES_MAX: Final = 32
FIELD_CHARS_MAX: Final = 253
TEXT_CHARS_MAX: Final = 1024
OTHERS: Final = Asked("several", "several", "several")
"""Who stands for the refusals of too many kinds."""

Kept = AuditEntry | Forgotten
Subject = tuple[str, ...]


@dataclass(slots=True)
class _Pending:
    """Refusals of one kind since the last tick that took them."""

    asked: Asked
    reason: str
    message: str
    first_ms: int
    last_ms: int
    count: int = 1


class Trail:
    """The entries of one cluster, oldest first."""

    def __init__(self, term: int, entries: Iterable[AuditEntry] = ()) -> None:
        kept = sorted(entries, key=lambda entry: entry.sequence)
        self._orders = {entry.sequence: entry for entry in kept if entry.result != AuditResult.REFUSED}
        self._refusals = {entry.sequence: entry for entry in kept if entry.result == AuditResult.REFUSED}
        self._next = first_number(term, kept[-1].sequence if kept else 0)
        self._last: dict[Subject, AuditEntry] = {}
        self._pending: dict[Subject, _Pending] = {}

    def __iter__(self) -> Iterator[AuditEntry]:
        return iter(sorted([*self._orders.values(), *self._refusals.values()], key=lambda entry: entry.sequence))

    def begin(self, now_ms: int, asked: Asked) -> tuple[AuditEntry, tuple[Kept, ...]]:
        """The entry of an order that is about to be carried out, and what is to be stored."""
        entry = self._entry(now_ms, asked)
        self._orders[entry.sequence] = entry
        return entry, (entry, *_oldest(self._orders, ORDERS_MAX, ORDERS_FORGOTTEN_AT_ONCE_MAX))

    def end(self, now_ms: int, entry: AuditEntry, answer: object) -> tuple[AuditEntry, tuple[Kept, ...]]:
        """The entry with its answer; a refusal as the one before it is counted there, and its own goes."""
        result, reason, message = outcome(answer)
        ended = replace(entry, result=result, reason=reason, message=_cut(message, TEXT_CHARS_MAX), end_time_ms=now_ms)
        if entry.sequence not in self._orders:
            return ended, ()  # let go meanwhile: thousands have come since
        if result != AuditResult.REFUSED:
            self._orders[entry.sequence] = ended
            return ended, (ended,)
        del self._orders[entry.sequence]
        subject = (*_subject(ended), *ended.volumes, ended.node, ended.request)
        before = self._same(now_ms, subject)
        if before is not None:
            return ended, (self._count(now_ms, subject, before, 1), Forgotten(entry))
        return ended, self._refuse(subject, ended)

    def attempt(self, now_ms: int, asked: Asked, error: ResilverError) -> None:
        """Something was refused before it became an order: it is entered with the next tick."""
        subject = (asked.method, asked.principal, asked.address, error.reason)
        pending = self._pending.get(subject)
        if pending is None and len(self._pending) >= PENDING_MAX:
            asked, subject = OTHERS, (OTHERS.method, OTHERS.principal, OTHERS.address, "")
            pending = self._pending.get(subject)
        if pending is None:
            self._pending[subject] = _Pending(asked, error.reason, error.message, now_ms, now_ms)
            return
        pending.count += 1
        pending.last_ms = now_ms

    def flush(self, now_ms: int) -> tuple[tuple[AuditEntry, ...], tuple[Kept, ...]]:
        """What was refused since: the entries to tell of, and what is to be stored.

        A kind that is refused without end is written every ten seconds, not every second.
        """
        told: list[AuditEntry] = []
        kept: list[Kept] = []
        for subject, pending in list(self._pending.items()):
            before = self._same(now_ms, subject)
            if before is not None and 0 <= now_ms - before.end_time_ms < COUNTED_AGAIN_MS:
                continue
            if len(told) == FLUSHED_AT_ONCE_MAX:
                break
            del self._pending[subject]
            if before is not None:
                entry = self._count(now_ms, subject, before, pending.count, pending.last_ms)
                kept.append(entry)
            else:
                entry = replace(
                    self._entry(pending.first_ms, pending.asked),
                    result=AuditResult.REFUSED,
                    reason=pending.reason,
                    message=_cut(pending.message, TEXT_CHARS_MAX),
                    end_time_ms=now_ms,
                    count=pending.count,
                    last_time_ms=pending.last_ms,
                )
                kept += self._refuse(subject, entry)
            told.append(entry)
        return tuple(told), tuple(kept)

    def _entry(self, now_ms: int, asked: Asked) -> AuditEntry:
        entry = AuditEntry(
            self._next,
            now_ms,
            _cut(asked.method, FIELD_CHARS_MAX),
            _cut(asked.principal, FIELD_CHARS_MAX),
            _cut(asked.address, FIELD_CHARS_MAX),
            tuple(_cut(volume, FIELD_CHARS_MAX) for volume in asked.volumes[:VOLUMES_MAX]),
            _cut(asked.node, FIELD_CHARS_MAX),
            _cut(asked.request, TEXT_CHARS_MAX),
            last_time_ms=now_ms,
        )
        self._next += 1
        return entry

    def _same(self, now_ms: int, subject: Subject) -> AuditEntry | None:
        """The refusal of that kind within the hour, if it is still kept."""
        last = self._last.get(subject)
        if last is None or last.sequence not in self._refusals or not 0 <= now_ms - last.create_time_ms < SAME_MS:
            return None
        return last

    def _count(self, now_ms: int, subject: Subject, before: AuditEntry, more: int, last_ms: int = 0) -> AuditEntry:
        entry = replace(before, count=before.count + more, last_time_ms=last_ms or now_ms, end_time_ms=now_ms)
        self._refusals[entry.sequence] = self._last[subject] = entry
        return entry

    def _refuse(self, subject: Subject, entry: AuditEntry) -> tuple[Kept, ...]:
        self._refusals[entry.sequence] = self._last[subject] = entry
        gone = _oldest(self._refusals, REFUSALS_MAX, REFUSALS_FORGOTTEN_AT_ONCE_MAX)
        if len(self._last) > 2 * REFUSALS_MAX:
            self._last = {one: last for one, last in self._last.items() if last.sequence in self._refusals}
        return (entry, *gone)


def outcome(answer: object) -> tuple[AuditResult, str, str]:
    """What became of an order: result, reason and a sentence."""
    match answer:
        case ResilverError():
            part = answer.metadata.get("done")
            return AuditResult.PARTLY if part else AuditResult.REFUSED, answer.reason, answer.message
        case ElectionRecord(refusal=Refusal() as refusal):
            return AuditResult.REFUSED, _first(refusal), refusal.message
        case ResyncsStarted():
            begun = ", ".join(f"{one.volume}/{one.node} {one.id}" for one in answer.resyncs)
            return _several(f"begun: {begun or 'none'}", len(answer.resyncs), answer.refusals)
        case SnapshotsTaken():
            taken = ", ".join(f"{volume} {snapshot.cp}" for volume, snapshot in answer.snapshots)
            return _several(f"taken: {taken or 'none'}", len(answer.snapshots), answer.refusals)
    return AuditResult.DONE, "", _done(answer)


def _done(answer: object) -> str:
    said = ""
    match answer:
        case ElectionRecord():
            said = f"{answer.winner} is primary in epoch {answer.epoch}"
        case Planned():
            said = f"plan {answer.etag}"
        case Resync():
            said = f"{answer.volume}/{answer.node} is {answer.state.name}"
        case Dropped():
            said = f"{answer.freed_bytes} bytes came free"
        case Pruned():
            said = f"{len(answer.dropped)} dropped, {len(answer.kept)} kept"
        case Exported():
            said = f"{answer.path}, {answer.size_bytes} bytes"
    return said


def _several(done: str, count: int, refusals: tuple[VolumeRefusal, ...]) -> tuple[AuditResult, str, str]:
    if not refusals:
        return AuditResult.DONE, "", done
    said = "; ".join(f"{one.volume}{f'/{one.node}' if one.node else ''}: {one.refusal.message}" for one in refusals)
    return AuditResult.PARTLY if count else AuditResult.REFUSED, _first(refusals[0].refusal), f"{done}; refused: {said}"


def _first(refusal: Refusal) -> str:
    return refusal.reasons[0] if refusal.reasons else "REFUSED"


def _subject(entry: AuditEntry) -> Subject:
    return entry.method, entry.principal, entry.address, entry.reason


def _oldest(entries: dict[int, AuditEntry], kept_max: int, at_once_max: int) -> tuple[Forgotten, ...]:
    """Takes out what is beyond the bound, a few at a time."""
    beyond = min(len(entries) - kept_max, at_once_max)
    return tuple(Forgotten(entries.pop(next(iter(entries)))) for _ in range(beyond))


def _cut(text: str, chars_max: int) -> str:
    return text if len(text) <= chars_max else f"{text[: chars_max - 1]}…"
