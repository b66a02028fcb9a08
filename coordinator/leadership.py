"""Who leads: campaigns, renews at a third of the lease, and steps down before the lease can have ended.

The rules:

* `Reign.ends_at` is on CLOCK_BOOTTIME, which goes on while a machine sleeps, and is counted from before the renewal was
  sent. A watch of its own ends the reign `SAFETY_S` before it, whatever a renewal that is still under way may bring.
* Whoever acts asks `leading()` first. It speaks of one reign: what is left over from an earlier one is told no.
* A reign that has ended is resigned once nothing acts for it any more, so that nobody need wait for its lease.
* Reigns that end as soon as they begin are begun more and more slowly: each one costs a term.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import structlog

from coordinator.store.base import Leader, Reign, Store
from coordinator.store.encoding import boottime_s
from resilver.errors import Conflict, ResilverError, Unavailable
from resilver.telemetry import bound

log = structlog.get_logger(__name__)

CAMPAIGN_EVERY_S: Final = 1.0
CAMPAIGN_AFTER_FAULT_MAX_S: Final = 5.0
CAMPAIGN_AFTER_REIGN_S: Final = 0.1
RENEW_AGAIN_S: Final = 0.5
WATCH_EVERY_S: Final = 0.2
RESIGN_TIMEOUT_S: Final = 3.0
SAFETY_S: Final = 0.5
"""What a slow scheduler may take between the question and the act."""


class Leadership:
    """Campaigns until cancelled; each reign is led by `lead`, which must end when the reign does.

    `lead(reign, leading)` runs for one reign; it is cancelled when the reign is lost, and what it raises, if it is a
    ResilverError, ends the reign and not the process. `on_leader` is told who leads whenever a campaign finds somebody
    else, and None when a reign of our own has ended. Before each campaign `term_wanted()` says which term to exceed.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        address: str,
        *,
        lease_ttl_s: float,
        lead: Callable[[Reign, Callable[[], bool]], Awaitable[None]],
        on_leader: Callable[[Leader | None], None],
        term_wanted: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = boottime_s,
    ) -> None:
        self._store = store
        self._name = name
        self._address = address
        self._lease_ttl_s = lease_ttl_s
        self._lead = lead
        self._on_leader = on_leader
        self._term_wanted = term_wanted
        self._clock = clock
        self._reign: Reign | None = None
        self._said = ""

    def current(self) -> Reign | None:
        """The present reign, if its lease certainly has not ended yet."""
        reign = self._reign
        return reign if reign is not None and self._clock() < reign.ends_at - SAFETY_S else None

    async def run(self) -> None:
        """Campaigns, leads, and campaigns again. On cancellation it resigns."""
        pause_s = 0.0
        while True:
            await asyncio.sleep(pause_s)
            try:
                outcome = await self._store.campaign(self._name, self._address, above_term=self._term_wanted())
            except ResilverError as error:
                self._say("the store gives no leadership", error)
                pause_s = min(CAMPAIGN_AFTER_FAULT_MAX_S, max(CAMPAIGN_EVERY_S, pause_s * 2))
                continue
            if isinstance(outcome, Leader):
                self._said = ""
                self._on_leader(outcome)
                pause_s = CAMPAIGN_EVERY_S
                continue
            begun_s = self._clock()
            await self._one_reign(outcome)
            lasted_s = self._clock() - begun_s
            again_s = CAMPAIGN_AFTER_REIGN_S if lasted_s > self._lease_ttl_s else pause_s * 2
            pause_s = min(CAMPAIGN_AFTER_FAULT_MAX_S, max(CAMPAIGN_AFTER_REIGN_S, again_s))

    async def _one_reign(self, reign: Reign) -> None:
        with bound(term=reign.leader.term):
            await self._led(reign)

    async def _led(self, reign: Reign) -> None:
        self._reign = reign
        leader_id = reign.leader.leader_id

        def leading() -> bool:
            now = self.current()
            return now is not None and now.leader.leader_id == leader_id

        log.info("leading", leader_id=leader_id)
        tasks = [
            asyncio.ensure_future(work) for work in (self._lead(reign, leading), self._renew(), self._watch(leading))
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                self._tell_end(task)
        finally:
            # First nobody is told any more that this reign lasts, then all that acts for it ends, then it is given up.
            self._reign = None
            for task in tasks:
                task.cancel()
            try:
                # Being cancelled here must not be lost: it is what ends the process.
                await asyncio.wait(tasks)
            finally:
                for task in tasks:
                    if task.done() and not task.cancelled():
                        task.exception()  # asked for, or asyncio would log it as forgotten
                self._on_leader(None)
                await self._resign(reign)

    def _tell_end(self, task: asyncio.Future[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, ResilverError):
            self._say("the reign has ended", error)
        elif error is not None:
            raise error

    def _say(self, what: str, error: ResilverError) -> None:
        """Each cause once, and not once for each try."""
        if self._said != error.message:
            log.warning(what, reason=error.reason, why=error.message)
        self._said = error.message

    async def _renew(self) -> None:
        """Extends the lease for as long as there is one; raises what the store says if it is another's."""
        pause_s = self._lease_ttl_s / 3
        while self._reign is not None:
            await asyncio.sleep(pause_s)
            try:
                self._reign = await self._store.renew(self._reign)
            except Unavailable as error:
                self._say("the lease was not renewed", error)
                pause_s = min(RENEW_AGAIN_S, self._lease_ttl_s / 10)
            else:
                self._said = ""
                pause_s = self._lease_ttl_s / 3

    async def _watch(self, leading: Callable[[], bool]) -> None:
        """Ends the reign in time. In small steps, because asyncio's own clock stands still while a machine sleeps."""
        while leading():  # noqa: ASYNC110 - the passing of time is not an event that anybody could set
            await asyncio.sleep(WATCH_EVERY_S)
        raise Conflict("LEADERSHIP_LOST", "the lease was not renewed in time")

    async def _resign(self, reign: Reign) -> None:
        """Best effort, and bounded: a lease that cannot be given back runs out."""
        with suppress(ResilverError, TimeoutError):
            # Not wait_for, which on Python 3.11 loses the cancellation that comes as the answer does.
            async with asyncio.timeout(RESIGN_TIMEOUT_S):
                await self._store.resign(reign)
