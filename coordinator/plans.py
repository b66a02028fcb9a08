"""Plans that are answered in pages: made once, and kept until their last page had time to be asked for.

A plan of a large cluster does not fit one message, and to make it again for each page would be to examine every volume
again. A page says its plan's etag, so that whoever puts pages together sees if they are of two plans.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

from coordinator.core.requests import Planned
from coordinator.paging import digest_of, page, token_gone
from coordinator.wire import plan_to_proto, volume_plan_to_proto
from resilver.v1 import coordinator_pb2 as api

KEPT_MS: Final = 60_000
PLANS_MAX: Final = 8


class Plans:
    """The plans of one coordinator that may still be asked for. `make` is what examines and plans."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self._now_ms = now_ms
        self._kept: OrderedDict[str, tuple[int, Planned]] = OrderedDict()

    async def answer(
        self, request: api.PlanResyncRequest, make: Callable[[], Awaitable[Planned]]
    ) -> api.PlanResyncResponse:
        """The first page of a new plan, or the next one of a plan that is kept; without pages all of it."""
        if not request.page_size and not request.page_token:
            return api.PlanResyncResponse(plan=plan_to_proto(await make()))
        digest = digest_of(request)
        if request.page_token:
            planned = self._find(digest)
        else:
            planned = await make()
            self._keep(digest, planned)
        found = page(request, planned.volumes, lambda plan: plan.volume, volume_plan_to_proto)
        whole = plan_to_proto(Planned(planned.etag, planned.create_time_ms, ()))
        whole.volumes.extend(found.messages)
        return api.PlanResyncResponse(plan=whole, next_page_token=found.next_page_token)

    def _find(self, digest: str) -> Planned:
        until_ms, planned = self._kept.get(digest, (0, None))
        if planned is None or self._now_ms() >= until_ms:
            raise token_gone()
        return planned

    def _keep(self, digest: str, planned: Planned) -> None:
        self._kept.pop(digest, None)
        while len(self._kept) >= PLANS_MAX:
            self._kept.popitem(last=False)
        self._kept[digest] = self._now_ms() + KEPT_MS, planned
