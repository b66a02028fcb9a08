"""Who leads: campaigns, renews at a third of the lease, and steps down before the lease can have ended.

The moment `Reign.ends_at` is on CLOCK_BOOTTIME, which goes on while a machine is suspended, and is counted from before
the renewal was sent. Whoever acts asks `leading()` first: past that moment the answer is no, whatever the store says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import structlog

from coordinator.store.base import Leader, Reign, Store
from resilver.errors import Conflict, ResilverError, Unavailable

log = structlog.get_logger(__name__)

CAMPAIGN_EVERY_S: Final = 1.0
CAMPAIGN_AFTER_FAULT_MAX_S: Final = 5.0
# What a slow scheduler may take between the question and the act.
SAFETY_S: Final = 0.5


def boottime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Leadership:
    """Campaigns until cancelled; each reign is led by `lead`, which must end when the reign does.

    `lead(reign, leading)` runs for one reign; it is cancelled when the reign is lost. `on_leader` is told who leads
    whenever a campaign finds somebody else. `term_wanted()` is asked before each campaign for a term to exceed.
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

    def leading(self) -> bool:
        """Whether the lease certainly has not ended yet."""
        return self._reign is not None and self._clock() < self._reign.ends_at - SAFETY_S

    async def run(self) -> None:
        """Campaigns, leads, and campaigns again. On cancellation it resigns."""
        pause_s = 0.0
        while True:
            await asyncio.sleep(pause_s)
            try:
                outcome = await self._store.campaign(self._name, self._address, above_term=self._term_wanted())
            except ResilverError as error:
                log.warning("the store gives no leadership", reason=error.reason, why=error.message)
                pause_s = min(CAMPAIGN_AFTER_FAULT_MAX_S, max(CAMPAIGN_EVERY_S, pause_s * 2))
                continue
            pause_s = CAMPAIGN_EVERY_S
            if isinstance(outcome, Leader):
                self._on_leader(outcome)
                continue
            await self._one_reign(outcome)

    async def _one_reign(self, reign: Reign) -> None:
        self._reign = reign
        log.info("leading", term=reign.leader.term, leader_id=reign.leader.leader_id)
        leading = asyncio.ensure_future(self._lead(reign, self.leading))
        renewing = asyncio.ensure_future(self._keep())
        try:
            done, _ = await asyncio.wait({leading, renewing}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                self._tell_end(task)
        finally:
            last, self._reign = self._reign, None
            for task in (leading, renewing):
                task.cancel()
            for task in (leading, renewing):
                with suppress(asyncio.CancelledError, ResilverError):
                    await task
            with suppress(ResilverError):
                await asyncio.shield(self._store.resign(last or reign))
            self._on_leader(None)

    def _tell_end(self, task: asyncio.Future[None]) -> None:
        error = task.exception()
        if isinstance(error, ResilverError):
            log.warning("the reign has ended", reason=error.reason, why=error.message)
        elif error is not None:
            raise error

    async def _keep(self) -> None:
        """Renews; raises LEADERSHIP_LOST when another leads, or when the lease can have ended."""
        while self._reign is not None:
            await asyncio.sleep(self._lease_ttl_s / 3)
            try:
                self._reign = await self._store.renew(self._reign)
            except Unavailable as error:
                log.warning("the lease was not renewed", why=error.message)
            if not self.leading():
                raise Conflict("LEADERSHIP_LOST", "the lease was not renewed in time")
