"""What the coordinator needs of a store: one leader, guarded writes, everything read at take-over.

Keys are relative to the cluster (`volumes/vm1`); values are JSON objects. The leader is the only writer: every commit
names its reign and fails with `LEADERSHIP_LOST` if another one has begun, and compares the revision of each record.
A commit whose outcome is unknown ends the reign as well: the caller drops its view, campaigns and reads everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

Json = dict[str, Any]

ANY_REVISION: Final = -1
ABSENT: Final = 0

WRITES_MAX: Final = 100
"""Records in one commit: etcd takes 128 operations in a transaction, and some of them are ours."""
RECORD_BYTES_MAX: Final = 768 << 10
"""The largest is a node's, with the names of 10,000 volumes; two of it do not fit one commit."""
COMMIT_BYTES_MAX: Final = 1_400_000
"""Keys and values of one commit: etcd takes 1.5 MiB in a request."""


@dataclass(frozen=True, slots=True)
class Write:
    """One record to write; `value` None deletes it.

    `expected` is the revision that the record must have: ABSENT for create-only, ANY_REVISION for no comparison.
    """

    key: str
    value: Json | None
    expected: int = ANY_REVISION


@dataclass(frozen=True, slots=True)
class Stored:
    """One record as read."""

    value: Json
    revision: int


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads: what stands in the leader key, and on every order."""

    name: str
    address: str
    term: int
    leader_id: str
    version: str = ""


@dataclass(frozen=True, slots=True)
class Reign:
    """A won campaign. `revision` is the leader key's create revision; `lease` is the adapter's own.

    `ends_at` is the moment, on CLOCK_BOOTTIME in seconds, by which the leader must have stopped unless it renewed.
    """

    leader: Leader
    revision: int
    lease: int
    ends_at: float


@dataclass(frozen=True, slots=True)
class Health:
    """How many members of the store answer."""

    kind: str
    healthy_count: int
    member_count: int


class Store(Protocol):
    """A place for records that outlive a coordinator. Every call ends within a small multiple of the store's timeout.

    Errors: `Unavailable("STORE_UNAVAILABLE")` (nothing was changed), `Conflict("LEADERSHIP_LOST")`, and
    `Damaged("IO_ERROR")` for a record that is no JSON object.
    """

    async def open(self) -> str:
        """Connects, mints the store_id on first use, and answers it."""

    async def campaign(self, name: str, address: str, *, above_term: int = 0) -> Reign | Leader:
        """Tries once to lead, with a term above the last one and above `above_term`; answers who leads if not us."""

    async def renew(self, reign: Reign) -> Reign:
        """Extends the lease; the new `ends_at` is counted from before the renewal was sent."""

    async def resign(self, reign: Reign) -> None: ...

    async def leader(self) -> Leader | None: ...

    async def read_all(self) -> Mapping[str, Stored]:
        """Every record of the cluster, of one moment, but for store_id, term and leader."""

    async def commit(self, reign: Reign, writes: Sequence[Write]) -> int:
        """Writes all or nothing, under the reign; answers the revision that the written records now have.

        `LEADERSHIP_LOST` also if a record has another revision than expected, because then somebody else has written;
        `metadata["key"]` names it. More than WRITES_MAX records, or more bytes than the bounds above, are refused with
        `Exhausted("TOO_LARGE")` and nothing is written: it is the caller who knows how to split.
        """

    async def health(self) -> Health: ...

    async def close(self) -> None: ...
