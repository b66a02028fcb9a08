"""`resilver volumes`, `nodes` and `events`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from typing import TYPE_CHECKING, NoReturn

import click

from resilver.cli.options import Verb
from resilver.cli.output import EXIT_STOPPED
from resilver.cli.plainjson import plain, plain_list
from resilver.cli.screens import lists
from resilver.cli.session import Session, pass_session
from resilver.cli.watching import RETRY_S, steady
from resilver.cli.words import now
from resilver.errors import ResilverError
from resilver.v1 import coordinator_pb2 as api

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from resilver.cli.client import Client
    from resilver.v1 import volume_pb2 as pb

LOST_HISTORY = "OUT_OF_RANGE"
"""gRPC's own code, which has no reason of ours beside it."""
SHOWN_MAX = 20_000
"""Twice what a coordinator keeps."""


@click.command(cls=Verb)
@pass_session
def volumes(session: Session) -> int:
    """List the volumes."""

    async def work(client: Client) -> list[pb.Volume]:
        return await client.pages(lambda s: s.ListVolumes, api.ListVolumesRequest(), lambda page: page.volumes)

    found = session.run(work)
    if session.output.json:
        session.output.emit({"volumes": plain_list(found)})
    elif found:
        session.output.show(lists.volumes(found, now()))
    else:
        session.output.say("no volumes; they appear when an agent that has some in its configuration reports")
    return 0


@click.command(cls=Verb)
@pass_session
def nodes(session: Session) -> int:
    """List the nodes."""

    async def work(client: Client) -> list[pb.Node]:
        return await client.pages(lambda s: s.ListNodes, api.ListNodesRequest(), lambda page: page.nodes)

    found = session.run(work)
    if session.output.json:
        session.output.emit({"nodes": plain_list(found)})
    elif found:
        session.output.show(lists.nodes(found, now()))
    else:
        session.output.say("no nodes; they appear when an agent of this cluster reports")
    return 0


@click.command(cls=Verb)
@click.option("--volume", default="", metavar="VOLUME", help="Only what happened to this volume.")
@click.option("--node", default="", metavar="NODE", help="Only what happened on this node.")
@click.option("--follow", is_flag=True, help="Go on with what happens from now on, until Ctrl-C.")
@pass_session
def events(session: Session, volume: str, node: str, follow: bool) -> int:
    """List what happened, oldest first."""

    def show(found: Iterable[pb.Event]) -> None:
        for event in found:
            if session.output.json:
                session.output.emit(plain(event), compact=True)
            else:
                session.output.out.print(lists.event_line(event), soft_wrap=True)

    async def work(client: Client) -> list[pb.Event]:
        if follow:
            # A timeout is how long to follow, so reaching it is no failure.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(session.options.timeout_s):
                    await _follow(client, volume, node, show, session.output.aside)
            return []
        request = api.ListEventsRequest(volume=volume, node=node)
        found = await client.pages(lambda s: s.ListEvents, request, lambda page: page.events)
        return sorted(found, key=lambda event: event.sequence)

    try:
        found = session.run(work)
    except KeyboardInterrupt:
        return EXIT_STOPPED
    if follow:
        return 0
    if session.output.json:
        session.output.emit({"events": plain_list(found)})
    else:
        show(found)
        if not found:
            session.output.say("no events yet")
    return 0


async def _follow(
    client: Client,
    volume: str,
    node: str,
    show: Callable[[Iterable[pb.Event]], None],
    lost: Callable[[str], None],
) -> NoReturn:
    """Shows all that is kept, and what comes, until the caller stops. When a leader goes away it goes on, with the
    next one, after the last one seen: each event is shown once.
    """
    seen = 0
    shown: dict[tuple[int, int], None] = {}
    """By number and time, because a store that was put back to an older copy gives numbers again."""

    def new(events: Iterable[pb.Event]) -> Iterator[pb.Event]:
        for event in events:
            key = (event.sequence, event.create_time.ToNanoseconds())
            if key not in shown:
                shown[key] = None
                yield event
        for old in list(itertools.islice(shown, max(0, len(shown) - SHOWN_MAX))):
            del shown[old]

    def onward() -> api.WatchEventsRequest:
        return api.WatchEventsRequest(after_sequence=seen, from_oldest=not seen, volume=volume, node=node)

    while True:
        try:
            async for answer in steady(client, lambda s: s.WatchEvents, onward, lost):
                show(new(answer.events))
                seen = max(seen, answer.up_to_sequence)
        except ResilverError as error:
            if error.reason != LOST_HISTORY:
                raise
            sys.stderr.write(f"some events were lost: {error.message}\n")
            seen = 0
        # A leader that goes away may end the watch without a word.
        await asyncio.sleep(RETRY_S)
