"""A plan in pages: made once, put together again, and gone after a minute."""

from __future__ import annotations

import pytest

from coordinator.core.cluster import VolumePlan
from coordinator.core.requests import Planned
from coordinator.plans import KEPT_MS, PLANS_MAX, Plans
from resilver.cli.verbs.plan import whole_plan
from resilver.errors import Conflict, Invalid
from resilver.lineage import NO_CP
from resilver.v1 import coordinator_pb2 as api


def planned(etag: str, count: int = 5) -> Planned:
    plans = (VolumePlan(f"vm{at}", "a", NO_CP, takes_snapshot=False, replicas=()) for at in range(count))
    return Planned(etag, 1_700_000_000_000, tuple(plans))


class Planner:
    """What is planned next, and how often it was asked for."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.made: list[str] = []
        self.plans = Plans(lambda: self.now_ms)

    async def ask(self, **fields) -> api.PlanResyncResponse:
        async def make() -> Planned:
            self.made.append(f"etag{len(self.made)}")
            return planned(self.made[-1])

        return await self.plans.answer(api.PlanResyncRequest(all=True, **fields), make)


def names(answer: api.PlanResyncResponse) -> list[str]:
    return [plan.volume for plan in answer.plan.volumes]


async def test_pages_are_of_one_plan_that_is_made_once():
    planner = Planner()
    first = await planner.ask(page_size=2)
    second = await planner.ask(page_size=2, page_token=first.next_page_token)
    third = await planner.ask(page_size=2, page_token=second.next_page_token)
    assert [names(one) for one in (first, second, third)] == [["vm0", "vm1"], ["vm2", "vm3"], ["vm4"]]
    assert not third.next_page_token
    assert {one.plan.etag for one in (first, second, third)} == {"etag0"}
    assert planner.made == ["etag0"]


async def test_without_pages_it_is_whole():
    planner = Planner()
    answer = await planner.ask()
    assert (len(names(answer)), answer.next_page_token) == (5, "")


async def test_a_plan_is_kept_for_a_minute_and_only_so_many_are():
    planner = Planner()
    token = (await planner.ask(page_size=2)).next_page_token
    planner.now_ms = KEPT_MS
    with pytest.raises(Invalid, match="not kept any more"):
        await planner.ask(page_size=2, page_token=token)
    planner = Planner()
    token = (await planner.ask(page_size=2)).next_page_token
    for at in range(PLANS_MAX):
        await planner.ask(page_size=2, nodes=[f"n{at}"])
    with pytest.raises(Invalid, match="not kept any more"):
        await planner.ask(page_size=2, page_token=token)
    with pytest.raises(Invalid):
        await planner.ask(page_size=2, full=True, page_token=token)


class Client:
    """As the command's client calls; somebody else plans in between if `disturbed`."""

    def __init__(self, *, disturbed: bool) -> None:
        self.planner = Planner()
        self.disturbed = disturbed

    async def call(self, _method, request):
        if self.disturbed and request.page_token:
            await self.planner.ask(page_size=2)
        return await self.planner.ask(page_size=2, page_token=request.page_token)


async def test_the_command_puts_the_pages_together_and_never_two_plans():
    whole = await whole_plan(Client(disturbed=False), api.PlanResyncRequest(all=True))
    assert [plan.volume for plan in whole.volumes] == [f"vm{at}" for at in range(5)]
    with pytest.raises(Conflict) as caught:
        await whole_plan(Client(disturbed=True), api.PlanResyncRequest(all=True))
    assert caught.value.reason == "PLAN_CHANGED"
