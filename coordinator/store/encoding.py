"""What the adapters have in common: records as JSON, the bounds of a commit, the sentences of the errors."""

from __future__ import annotations

import importlib.metadata
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.store.base import COMMIT_BYTES_MAX, RECORD_BYTES_MAX, WRITES_MAX, Json, Leader, Write
from resilver.errors import Conflict, Damaged, Exhausted

STORE_ID: Final = "store_id"
TERM: Final = "term"
LEADER: Final = "leader"
RESERVED: Final = frozenset({STORE_ID, TERM, LEADER})


@dataclass(frozen=True, slots=True)
class Encoded:
    """A write with its value as it is stored; None deletes."""

    key: str
    value: bytes | None
    expected: int


def encode(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def decode(key: str, value: bytes) -> Json:
    """Raises `Damaged("IO_ERROR")` that names the record."""
    try:
        decoded = json.loads(value)
        # Half a character and an infinite number can be read, but never be written again, nor told to anybody.
        encode(decoded)
    except (TypeError, ValueError, RecursionError):
        decoded = None
    if not isinstance(decoded, dict):
        raise Damaged("IO_ERROR", f"the store's record {key} is no JSON object; somebody else has written it", key=key)
    return decoded


def encode_all(writes: Sequence[Write]) -> tuple[Encoded, ...]:
    """The writes of one commit; raises `Exhausted("TOO_LARGE")` beyond the bounds of base.py."""
    if len(writes) > WRITES_MAX:
        raise Exhausted("TOO_LARGE", f"{len(writes)} records in one commit; at most {WRITES_MAX}")
    encoded = []
    total = 0
    for write in writes:
        value = None if write.value is None else encode(write.value)
        size = len(write.key.encode()) + len(value or b"")
        if size > RECORD_BYTES_MAX:
            raise Exhausted(
                "TOO_LARGE", f"record {write.key} has {size} bytes; at most {RECORD_BYTES_MAX}", key=write.key
            )
        total += size
        encoded.append(Encoded(write.key, value, write.expected))
    if total > COMMIT_BYTES_MAX:
        raise Exhausted("TOO_LARGE", f"{total} bytes in one commit; at most {COMMIT_BYTES_MAX}")
    keys = {write.key for write in encoded}
    assert len(keys) == len(encoded), "a commit writes each record once"
    assert not keys & RESERVED, "the store's own records are not for the caller to write"
    return tuple(encoded)


def new_store_id() -> Json:
    return {"store_id": str(uuid.uuid4()), "create_time_ms": time.time_ns() // 1_000_000}


def new_leader(name: str, address: str, term: int) -> Leader:
    return Leader(name, address, term, str(uuid.uuid4()), importlib.metadata.version("resilver"))


def encode_leader(leader: Leader) -> bytes:
    """The same bytes each time: they are compared with what is stored."""
    return encode({field: getattr(leader, field) for field in Leader.__slots__})


def decode_leader(value: bytes) -> Leader:
    fields = decode(LEADER, value)
    try:
        return Leader(
            name=str(fields["name"]),
            address=str(fields["address"]),
            term=int(fields["term"]),
            leader_id=str(fields["leader_id"]),
            version=str(fields.get("version", "")),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Damaged("IO_ERROR", f"the store's leader record cannot be read: {error!r}", key=LEADER) from error


def decode_term(value: bytes | None) -> int:
    if value is None:
        return 0
    term = decode(TERM, value).get("term")
    if not isinstance(term, int) or term < 0:
        raise Damaged("IO_ERROR", "the store's term record cannot be read", key=TERM)
    return term


def decode_store_id(value: bytes) -> str:
    store_id = decode(STORE_ID, value).get("store_id")
    if not isinstance(store_id, str) or not store_id:
        raise Damaged("IO_ERROR", "the store's own id cannot be read", key=STORE_ID)
    return store_id


def lost(now: Leader | None) -> Conflict:
    """A reign that another one has followed, or that was ended."""
    by = f"{now.name} leads now, in term {now.term}" if now is not None else "nobody leads now"
    return Conflict("LEADERSHIP_LOST", f"this reign has ended: {by}")


def changed(key: str, expected: int, found: int) -> Conflict:
    """A record that somebody else has written."""
    told = "absent" if found == 0 else f"at revision {found}"
    wanted = "absent" if expected == 0 else f"at revision {expected}"
    return Conflict(
        "LEADERSHIP_LOST", f"record {key} is {told} and was expected {wanted}: somebody else has written it", key=key
    )


def boottime_s() -> float:
    """A clock that also counts while the machine sleeps, because leases do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
