"""What a source has been told to serve.

A ticket belongs to (resync, target node, base, target) and serves any number of connections of that node. Tickets are
kept on disk, so that a restarted source goes on; each lives for a duration that traffic renews, and while it is in use
its two snapshots are pinned. Lifetimes run on the clock that does not jump; across a restart wall time has to do.
"""

from __future__ import annotations

import hmac
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from agent.disk.durable import read_json, write_json
from agent.stored import typed, understood
from resilver.errors import Exhausted, Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from agent.disk.durable import Json

TICKETS_MAX: Final = 1024
LIFETIME_S_MIN: Final = 10
LIFETIME_S_MAX: Final = 7 * 24 * 3600
LIFETIME_S_DEFAULT: Final = 3600
PINNED_S: Final = 120


@dataclass(frozen=True, slots=True)
class Ticket:
    """`ends_at` is in seconds of the clock that `Tickets` was given."""

    secret: str
    resync_id: str
    volume: str
    target_node: str
    base: str
    target: str
    lifetime_s: int
    ends_at: float = 0.0


class Tickets:
    """All tickets of one node. Methods block on the disk and may be called from several threads."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._clock = clock
        self._wall = wall
        self._mutex = threading.Lock()
        self._tickets: dict[tuple[str, str], Ticket] = {}
        self._saved_at = clock()
        self._load()

    def keep(self, ticket: Ticket) -> None:
        """Takes a ticket, on disk when this returns; one for the same resync and node replaces the older."""
        lifetime_s = min(max(ticket.lifetime_s or LIFETIME_S_DEFAULT, LIFETIME_S_MIN), LIFETIME_S_MAX)
        with self._mutex:
            self._sweep()
            key = (ticket.resync_id, ticket.target_node)
            if key not in self._tickets and len(self._tickets) >= TICKETS_MAX:
                raise Exhausted(
                    "TOO_MANY_RESYNCS", f"this node serves {TICKETS_MAX} transfers; wait until some are done"
                )
            kept = replace(ticket, lifetime_s=lifetime_s, ends_at=self._clock() + lifetime_s)
            self._save(self._tickets | {key: kept})

    def check(
        self, *, secret: str, resync_id: str, volume: str, target_node: str, target: str = "", snapshot: str = ""
    ) -> Ticket:
        """The ticket that the caller shows, renewed; `Unauthenticated("TICKET_INVALID")` if it is not this one.

        `target` names what the caller wants to become, `snapshot` one of the ticket's two; one of them is given.
        """
        with self._mutex:
            self._sweep()
            ticket = self._tickets.get((resync_id, target_node))
            if (
                ticket is None
                or not hmac.compare_digest(ticket.secret.encode(), secret.encode())
                or ticket.volume != volume
                or (target and ticket.target != target)
                or (snapshot and snapshot not in {ticket.base, ticket.target})
                or not (target or snapshot)
            ):
                raise Unauthenticated(
                    "TICKET_INVALID",
                    f"resync {resync_id} has no such ticket here for node {target_node}; "
                    "it has expired, or the coordinator has not prepared this source",
                )
            return self._renewed(ticket)

    def renew(self, resync_id: str, target_node: str) -> None:
        """Called while bytes flow."""
        with self._mutex:
            ticket = self._tickets.get((resync_id, target_node))
            if ticket is not None:
                self._renewed(ticket)

    def drop(self, resync_id: str) -> bool:
        """Ends all tickets of a resync; whether there were any."""
        with self._mutex:
            left = {key: ticket for key, ticket in self._tickets.items() if ticket.resync_id != resync_id}
            dropped = len(left) < len(self._tickets)
            if dropped:
                self._save(left)
            return dropped

    def pinned(self, volume: str) -> frozenset[str]:
        """The snapshots of a volume that a transfer needs at this moment: those whose ticket was shown lately.

        A target that has done its work says no word of it. One that is slow or away shows its ticket every few
        seconds; one that waits for its turn is known to the coordinator, who orders nothing dropped that it needs.
        """
        with self._mutex:
            self._sweep()
            since = self._clock() - PINNED_S
            held = [
                ticket
                for ticket in self._tickets.values()
                if ticket.volume == volume and ticket.ends_at - ticket.lifetime_s > since
            ]
        return frozenset(each for ticket in held for each in (ticket.base, ticket.target) if each)

    def live(self) -> tuple[Ticket, ...]:
        with self._mutex:
            self._sweep()
            return tuple(self._tickets.values())

    def _renewed(self, ticket: Ticket) -> Ticket:
        now = self._clock()
        renewed = replace(ticket, ends_at=now + ticket.lifetime_s)
        tickets = self._tickets | {(ticket.resync_id, ticket.target_node): renewed}
        # A disk write for every request would cost more than the request: what stands on disk may lag by a quarter
        # of a lifetime, and a restart takes that into account by giving what is left of it anew.
        if now - self._saved_at > ticket.lifetime_s / 4:
            self._save(tickets)
        else:
            self._tickets = tickets
        return renewed

    def _sweep(self) -> None:
        now = self._clock()
        self._tickets = {key: ticket for key, ticket in self._tickets.items() if ticket.ends_at > now}

    def _save(self, tickets: dict[tuple[str, str], Ticket]) -> None:
        now, wall = self._clock(), self._wall()
        rows: list[Json] = [
            {
                "secret": ticket.secret,
                "resync_id": ticket.resync_id,
                "volume": ticket.volume,
                "target_node": ticket.target_node,
                "base": ticket.base,
                "target": ticket.target,
                "lifetime_s": ticket.lifetime_s,
                "ends_at": wall + ticket.ends_at - now,
            }
            for ticket in tickets.values()
        ]
        write_json(self._path, {"tickets": rows})
        self._tickets = tickets
        self._saved_at = now

    def _load(self) -> None:
        value = read_json(self._path)
        now, wall = self._clock(), self._wall()
        with understood(self._path):
            rows = typed(self._path, (value or {}).get("tickets", []), tuple[Ticket, ...])
            if len(rows) > TICKETS_MAX:
                raise ValueError(f"it holds {len(rows)} tickets, and {TICKETS_MAX} are the most")
        for row in rows:
            lifetime_s = min(row.lifetime_s, LIFETIME_S_MAX)
            left_s = row.ends_at - wall + lifetime_s / 4
            if left_s > 0:
                ticket = replace(row, lifetime_s=lifetime_s, ends_at=now + min(left_s, lifetime_s))
                self._tickets[ticket.resync_id, ticket.target_node] = ticket
