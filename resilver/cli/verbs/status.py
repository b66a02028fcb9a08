"""`resilver status`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import click
from rich.live import Live

from resilver.cli.options import Verb
from resilver.cli.plainjson import plain, plain_list
from resilver.cli.screens import status as screens
from resilver.cli.session import Session, pass_session
from resilver.cli.watching import steady
from resilver.cli.words import now
from resilver.errors import Superseded, Unavailable
from resilver.v1 import coordinator_pb2 as api

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Group

    from resilver.cli.client import Client
    from resilver.v1 import volume_pb2 as pb


@click.command(cls=Verb)
@click.argument("volumes", nargs=-1, metavar="[VOLUME]…")
@click.option("--watch", is_flag=True, help="Show it again at each change, until Ctrl-C.")
@click.option("--problems", is_flag=True, help="Only volumes that something is wrong with.")
@click.option("--exit-code", "with_exit_code", is_flag=True, help="End with 0 healthy, 5 degraded, 3 blocked.")
@pass_session
def status(session: Session, volumes: tuple[str, ...], watch: bool, problems: bool, with_exit_code: bool) -> int:
    """Show volumes, their replicas, and what is wrong with them."""
    view = View(session, problems=problems)

    async def work(client: Client) -> list[pb.Volume]:
        if watch:
            return await _watch(client, view, volumes)
        request = api.ListVolumesRequest(volumes=volumes, view=api.VOLUME_VIEW_BASIC)
        found = await client.pages(lambda s: s.ListVolumes, request, lambda page: page.volumes)
        view.show(await _cluster(client), found)
        return found

    found = session.run(work)
    return screens.exit_code(found) if with_exit_code else 0


class View:
    """What is shown of a cluster: all volumes, or those with problems, as a screen or as JSON."""

    def __init__(self, session: Session, *, problems: bool) -> None:
        self.output = session.output
        self.timeout_s = session.options.timeout_s
        self._problems = problems

    def screen(self, cluster: screens.Cluster, volumes: Sequence[pb.Volume]) -> Group:
        empty = screens.NO_PROBLEMS if self._problems and volumes else screens.NO_VOLUMES
        return screens.screen(cluster, self._chosen(volumes), now(), empty=empty)

    def show(self, cluster: screens.Cluster, volumes: Sequence[pb.Volume], *, compact: bool = False) -> None:
        if self.output.json:
            chosen = self._chosen(volumes)
            document = {**plain(cluster.info), "nodes": plain_list(cluster.nodes), "volumes": plain_list(chosen)}
            self.output.emit(document, compact=compact)
        else:
            self.output.show(self.screen(cluster, volumes))

    def _chosen(self, volumes: Sequence[pb.Volume]) -> list[pb.Volume]:
        return screens.with_problems(volumes) if self._problems else list(volumes)


async def _cluster(client: Client) -> screens.Cluster:
    info = await client.call(lambda s: s.GetCluster, api.GetClusterRequest())
    nodes = await client.pages(lambda s: s.ListNodes, api.ListNodesRequest(), lambda page: page.nodes)
    return screens.Cluster(info, nodes)


async def _watch(client: Client, view: View, volumes: tuple[str, ...]) -> list[pb.Volume]:
    """Shows each change until Ctrl-C or `--timeout`; JSON is then one document a line. What was shown last."""
    cluster = await _cluster(client)
    known: dict[str, pb.Volume] = {}
    live = Live(console=view.output.out, get_renderable=lambda: view.screen(cluster, list(known.values())))
    if view.output.out.is_terminal and not view.output.json:
        live.start()
    request = api.WatchVolumesRequest(volumes=volumes)
    # A timeout is how long to watch, so reaching it is no failure.
    with contextlib.suppress(TimeoutError), contextlib.ExitStack() as stack:
        stack.callback(live.stop)
        async with asyncio.timeout(view.timeout_s):
            async for answer in steady(client, lambda s: s.WatchVolumes, lambda: request, view.output.aside):
                if not answer.volumes and not answer.removed:
                    continue
                known |= {volume.name: volume for volume in answer.volumes}
                known = {name: volume for name, volume in sorted(known.items()) if name not in answer.removed}
                # While leaders change the head of the screen stays as it was.
                with contextlib.suppress(Unavailable, Superseded):
                    cluster = await _cluster(client)
                if not live.is_started:
                    view.show(cluster, list(known.values()), compact=True)
    return list(known.values())
