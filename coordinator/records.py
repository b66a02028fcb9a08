"""What the leader remembers, as the store keeps it: keys and JSON.

The rules:

* Keys are readable (`volumes/vm1`, `elections/vm1/001795401600000`, `resyncs/vm1/<id>`, `nodes/a`,
  `events/00000000012884901889`, `audit/00000000012884901890`); the decisions about a volume sort by their time, events
  and audit entries by their number.
* Values are the frozen classes field by field, a CP as `"3-42"`; a field that a newer version added is passed over.
* A record that is of no known kind, or cannot be read whole, stops the take-over with its key: a leader that passed
  over a record would forget what it was told to remember.
* What could not be read again is not written: `check` refuses it, and `to_json` with it.
* A decision stays under 64 KiB: its evidence is shortened first, then its list of candidates, and a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import lru_cache
from typing import Any, Final, TypeVar

import msgspec

from coordinator.core.audited import AuditEntry
from coordinator.core.cluster import Candidate, ClusterEvent, ElectionRecord, NodeView, Resync, VolumeEntry
from coordinator.core.events import DeletedNode, Forgotten, Kept, Loaded, Volume
from coordinator.store.base import RECORD_BYTES_MAX as STORED_BYTES_MAX
from coordinator.store.base import Json, Stored
from resilver.errors import Damaged, Exhausted
from resilver.fields import CP_NUMBER_MAX, NUMBER_MAX
from resilver.lineage import ConsistencyPoint

RECORD_BYTES_MAX: Final = 64 << 10
EVIDENCE_RECORDS_MAX: Final = 32
TEXT_CHARS_MAX: Final = 2048
NOTE_KEY: Final = "(note)"
"""Where the evidence says what was left out: no node can have this name."""

_TIME_DIGITS: Final = 15
_SEQUENCE_DIGITS: Final = 20
_NEEDED: Final = frozenset(
    one.name for kind in (ClusterEvent, AuditEntry) for one in fields(kind) if one.default is MISSING
)
"""What an event or an audit entry cannot be read without, empty or not."""

_FREE_FORM: Final = frozenset({"bases", "evidence"})
"""Fields whose keys are names of nodes, and not of fields."""

_SIGNED: Final = frozenset({"priority"})

T = TypeVar("T")


def key_of(kept: Kept) -> str:
    """Where a record stands in the store."""
    match kept:
        case Volume(name=name):
            return f"volumes/{name}"
        case ElectionRecord(volume=volume, create_time_ms=time_ms):
            return f"elections/{volume}/{time_ms:0{_TIME_DIGITS}d}"
        case Resync(volume=volume, id=resync_id):
            return f"resyncs/{volume}/{resync_id}"
        case NodeView(name=name) | DeletedNode(name=name):
            return f"nodes/{name}"
        case ClusterEvent(sequence=sequence) | AuditEntry(sequence=sequence):
            kind = "events" if isinstance(kept, ClusterEvent) else "audit"
            return f"{kind}/{sequence:0{_SEQUENCE_DIGITS}d}"
        case Forgotten(record=record):
            return key_of(record)


def to_json(kept: Kept) -> Json | None:
    """What stands there; None for what is to be deleted. Raises TOO_LARGE for a number that `load` would refuse."""
    match kept:
        case DeletedNode() | Forgotten():
            return None
        case Volume(entry=entry):
            return None if entry is None else _plain(entry)
        case ElectionRecord():
            return _plain(bounded_election(kept))
        case Resync():
            return _plain(bounded_resync(kept))
        case NodeView():
            return _plain(kept)
        case ClusterEvent() | AuditEntry():
            return {name: value for name, value in _plain(kept).items() if value != "" or name in _NEEDED}


def check(kept: Kept) -> None:
    """Raises `Exhausted("TOO_LARGE")` for what the store would not take, or `load` not read again."""
    value = to_json(kept)
    if value is None:
        return
    size = len(key_of(kept)) + len(msgspec.json.encode(value))
    if size > STORED_BYTES_MAX:
        message = f"the record {key_of(kept)} would have {size} bytes; at most {STORED_BYTES_MAX} are stored"
        raise Exhausted("TOO_LARGE", message, key=key_of(kept))


def without_secrets(key: str, value: Json) -> Json:
    """A record for somebody else's eyes: a resync without its ticket, in place of which a leader makes a new one."""
    return {name: one for name, one in value.items() if name != "ticket"} if key.startswith("resyncs/") else value


def load(stored: Mapping[str, Stored]) -> Loaded:
    """Everything that the store held. Raises `Damaged("IO_ERROR")` that names the first key that cannot be read."""
    volumes: dict[str, VolumeEntry] = {}
    elections: dict[str, list[ElectionRecord]] = {}
    resyncs: dict[str, Resync] = {}
    nodes: dict[str, NodeView] = {}
    events: list[ClusterEvent] = []
    audit: list[AuditEntry] = []
    for key in sorted(stored):
        value = stored[key].value
        match key.split("/"):
            case ["volumes", _]:
                entry = _typed(key, value, VolumeEntry)
                _agrees(key, Volume(entry.record.volume, entry))
                volumes[entry.record.volume] = entry
            case ["elections", volume, _]:
                election = _typed(key, value, ElectionRecord)
                _agrees(key, election)
                elections.setdefault(volume, []).append(election)
            case ["resyncs", _, resync_id]:
                resync = _typed(key, value, Resync)
                _agrees(key, resync)
                resyncs[resync_id] = resync
            case ["nodes", name]:
                node = _typed(key, value, NodeView)
                _agrees(key, node)
                # Nobody is connected to a coordinator that has just begun.
                nodes[name] = replace(node, connected=False, duplicate=False)
            case ["events", _]:
                event = _typed(key, value, ClusterEvent)
                _agrees(key, event)
                events.append(event)
            case ["audit", _]:
                entry_of_audit = _typed(key, value, AuditEntry)
                _agrees(key, entry_of_audit)
                audit.append(entry_of_audit)
            case _:
                raise _unreadable(key, "it is no kind of record that this version knows")
    newest_first = {volume: tuple(reversed(records)) for volume, records in elections.items()}
    return Loaded(volumes, newest_first, resyncs, nodes, tuple(events), tuple(audit))


def bounded_election(election: ElectionRecord) -> ElectionRecord:
    """The decision in less than 64 KiB."""
    kept, records = election, EVIDENCE_RECORDS_MAX
    kept = _with_evidence(election, records)
    while _bytes(kept) > RECORD_BYTES_MAX and records > 1:
        records //= 2
        kept = _with_evidence(election, records)
    candidates = election.candidates
    while _bytes(kept) > RECORD_BYTES_MAX and candidates:
        candidates = _first_to_keep(election, len(candidates) // 2)
        kept = _without_candidates(election, candidates)
    return kept


def bounded_resync(resync: Resync) -> Resync:
    """The resync in less than 64 KiB: long lists in what the target told are cut at their end."""
    progress = resync.progress
    if progress is None or _bytes(resync) <= RECORD_BYTES_MAX:
        return resync
    shorter = replace(
        progress,
        message=progress.message[:TEXT_CHARS_MAX],
        preserved=progress.preserved[:64],
        sources=progress.sources[:16],
    )
    return replace(resync, progress=shorter)


def _with_evidence(election: ElectionRecord, records_max: int) -> ElectionRecord:
    shorter = {node: _shortened(lines, records_max) for node, lines in election.evidence.items()}
    return replace(election, evidence=shorter)


def _shortened(lines: tuple[str, ...], records_max: int) -> tuple[str, ...]:
    if len(lines) <= records_max:
        return lines
    return (*lines[:records_max], f"and {len(lines) - records_max} older ones")


def _first_to_keep(election: ElectionRecord, count: int) -> tuple[Candidate, ...]:
    """The winner and the previous primary before all others, in the order that they were listed."""
    first = {election.winner, election.previous_primary}
    ranked = sorted(election.candidates, key=lambda candidate: candidate.node not in first)
    chosen = {candidate.node for candidate in ranked[:count]}
    return tuple(candidate for candidate in election.candidates if candidate.node in chosen)


def _without_candidates(election: ElectionRecord, candidates: tuple[Candidate, ...]) -> ElectionRecord:
    named = {candidate.node for candidate in candidates}
    evidence = {node: lines[:1] for node, lines in election.evidence.items() if node in named}
    left_out = len(election.candidates) - len(candidates)
    evidence[NOTE_KEY] = (f"{left_out} of {len(election.candidates)} candidates are left out: the record has a bound",)
    return replace(election, candidates=candidates, evidence=evidence)


def _bytes(record: ElectionRecord | Resync) -> int:
    return len(msgspec.json.encode(_plain(record)))


def _plain(record: VolumeEntry | ElectionRecord | Resync | NodeView | ClusterEvent | AuditEntry) -> Json:
    plain = msgspec.to_builtins(record, enc_hook=_plain_mapping)
    _write(plain, type(record).__name__)
    return dict(plain)


def _in_range(number: float, field: str, most: int) -> bool:
    return (-most if field in _SIGNED else 0) <= number <= (CP_NUMBER_MAX if field == "epoch" else most)


def _plain_mapping(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a record holds {value!r}, which has no form in the store")


def _typed(key: str, value: Json, kind: type[T]) -> T:
    try:
        return msgspec.convert(_read_cps(value), kind)
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise _unreadable(key, str(error)) from error


def _agrees(key: str, kept: Kept) -> None:
    if key_of(kept) != key:
        raise _unreadable(key, f"what stands there belongs at {key_of(kept)}")


def _unreadable(key: str, why: str) -> Damaged:
    return Damaged("IO_ERROR", f"the store's record {key} cannot be read: {why}", key=key)


@lru_cache(maxsize=256)
def _is_cp(field: str) -> bool:
    return field == "cp" or field.endswith("_cp")


def _write(node: dict[str, Any], what: str) -> None:
    """Turns `{"epoch": 3, "sequence": 42}` to `"3-42"`, in place.

    Raises `Exhausted("TOO_LARGE")` for a number that `_read_cps` would refuse. Every commit walks through its records
    here, so types are told by what they are exactly: `to_builtins` makes no others.
    """
    for field, value in node.items():
        kind = type(value)
        if kind is dict:
            if _is_cp(field):
                for number in value.values():
                    _check_number(number, field, CP_NUMBER_MAX, what)
                node[field] = str(ConsistencyPoint(value["epoch"], value["sequence"]))
            elif field not in _FREE_FORM:
                _write(value, what)
        elif kind is int or kind is float:
            _check_number(value, field, NUMBER_MAX, what)
        elif kind is list or kind is tuple:
            _write_list(value, field, what)


def _write_list(values: Sequence[Any], field: str, what: str) -> None:
    for one in values:
        if type(one) is dict:
            _write(one, what)
        elif type(one) is int:
            _check_number(one, field, NUMBER_MAX, what)


def _check_number(number: float, field: str, most: int, what: str) -> None:
    if not _in_range(number, field, most):
        raise Exhausted("TOO_LARGE", f"a record of kind {what} is not stored with {field} {number}", field=field)


def _read_cps(node: Any, field: str = "") -> Any:
    """The reverse, into a new value. Raises ValueError for a text that is no CP, and a number that is beyond all."""
    if field in _FREE_FORM:
        return node
    if isinstance(node, int | float) and not _in_range(node, field, NUMBER_MAX):
        raise ValueError(f"{field} is {node}")
    if isinstance(node, dict):
        return {name: _read_cps(value, name) for name, value in node.items()}
    if isinstance(node, list):
        return [_read_cps(value) for value in node]
    if _is_cp(field) and isinstance(node, str):
        cp = ConsistencyPoint.parse(node)
        if max(cp.epoch, cp.sequence) > CP_NUMBER_MAX:
            raise ValueError(f"{field} is {cp}")
        return {"epoch": cp.epoch, "sequence": cp.sequence}
    return node
