"""`resilver plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from resilver.cli.client import PAGE_SIZE, PAGES_MAX
from resilver.cli.options import Verb
from resilver.cli.output import EXIT_REFUSED
from resilver.cli.plainjson import plain
from resilver.cli.screens import plan as screens
from resilver.cli.session import Session, pass_session, select
from resilver.errors import Conflict
from resilver.v1 import coordinator_pb2 as api

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from resilver.cli.client import Client
    from resilver.v1 import volume_pb2 as pb


@click.command(cls=Verb)
@click.argument("volumes", nargs=-1, metavar="[VOLUME]…")
@click.option("--all", "all_volumes", is_flag=True, help="Every volume.")
@click.option("--to", "nodes", multiple=True, metavar="NODE", help="Only these replicas; may be repeated.")
@click.option("--snapshot", is_flag=True, help="Take the consistency point first, so that the bytes are exact.")
@click.option("--full", is_flag=True, help="Copy all of what is not in sync, whatever is in common.")
@click.option("--replace", "replace", multiple=True, metavar="NODE", help="As with resync --replace.")
@pass_session
def plan(
    session: Session,
    volumes: tuple[str, ...],
    *,
    all_volumes: bool,
    nodes: tuple[str, ...],
    snapshot: bool,
    full: bool,
    replace: tuple[str, ...],
) -> int:
    """Show what a resync would do. Changes nothing."""
    request = api.PlanResyncRequest(
        **select(volumes, all_volumes=all_volumes),
        nodes=nodes,
        full=full,
        take_snapshot=snapshot,
        replace_nodes=replace,
    )

    async def work(client: Client) -> tuple[pb.Plan, Mapping[str, pb.Problem]]:
        whole = await whole_plan(client, request)
        return whole, {} if session.output.json else await _pauses(client, volumes)

    found, paused = session.run(work)
    if session.output.json:
        session.output.emit(plain(found))
    else:
        again = selection(volumes, nodes, full=full, replace=replace)
        session.output.show(screens.screen(found, again, took_snapshot=snapshot, paused=paused))
    for volume in found.volumes:
        if volume.HasField("refusal"):
            session.output.refusal(volume.refusal, where=volume.volume)
    return exit_code(found)


async def whole_plan(client: Client, request: api.PlanResyncRequest) -> pb.Plan:
    """The plan, put together from its pages."""
    request.page_size = PAGE_SIZE
    answer = await client.call(lambda s: s.PlanResync, request)
    found = answer.plan
    for _ in range(PAGES_MAX):
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token
        answer = await client.call(lambda s: s.PlanResync, request)
        if answer.plan.etag != found.etag:
            raise Conflict("PLAN_CHANGED", "somebody else has planned meanwhile, and it has changed: run it again")
        found.volumes.extend(answer.plan.volumes)
    return found


async def _pauses(client: Client, names: Sequence[str]) -> dict[str, pb.Problem]:
    """What holds back resyncs of the paused ones among these volumes, or among all: a plan says nothing of it."""
    asked = api.ListVolumesRequest(volumes=names)
    found = await client.pages(lambda s: s.ListVolumes, asked, lambda page: page.volumes)
    return {volume.name: one for volume in found for one in volume.problems if one.reason == "PAUSED"}


def selection(volumes: tuple[str, ...], nodes: tuple[str, ...], *, full: bool, replace: tuple[str, ...]) -> str:
    """The arguments that choose the same replicas again."""
    words = [*(volumes or ["--all"]), *(f"--to {node}" for node in nodes), *(["--full"] if full else [])]
    return " ".join([*words, *(f"--replace {node}" for node in replace)])


def exit_code(found: pb.Plan) -> int:
    """3 if every volume was refused, else 0: a plan with a refusal in it is still a plan."""
    refused = [volume.HasField("refusal") for volume in found.volumes]
    return EXIT_REFUSED if refused and all(refused) else 0
