"""`resilver status`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click
from rich.live import Live

from resilver.cli.options import Verb
from resilver.cli.plainjson import plain, plain_list
from resilver.cli.screens import status as screens
from resilver.cli.session import Session, pass_session
from resilver.cli.watching import steady
from resilver.cli.words import now
from resilver.v1 import coordinator_pb2 as api

if TYPE_CHECKING:
    from collections.abc import Sequence

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

    def chosen(found: Sequence[pb.Volume]) -> list[pb.Volume]:
        return screens.with_problems(found) if problems else list(found)

    async def work(client: Client) -> list[pb.Volume]:
        if watch:
            await _watch(client, session, volumes, chosen)
        cluster, found = await _read(client, volumes)
        _show(session, cluster, chosen(found))
        return found

    found = session.run(work)
    return screens.exit_code(found) if with_exit_code else 0


async def _cluster(client: Client) -> screens.Cluster:
    info = await client.call(lambda s: s.GetCluster, api.GetClusterRequest())
    nodes = await client.pages(lambda s: s.ListNodes, api.ListNodesRequest(), lambda page: page.nodes)
    return screens.Cluster(info, nodes)


async def _read(client: Client, volumes: tuple[str, ...]) -> tuple[screens.Cluster, list[pb.Volume]]:
    request = api.ListVolumesRequest(volumes=volumes, view=api.VOLUME_VIEW_BASIC)
    found = await client.pages(lambda s: s.ListVolumes, request, lambda page: page.volumes)
    return await _cluster(client), found


def document(cluster: screens.Cluster, volumes: Sequence[pb.Volume]) -> dict[str, Any]:
    """The JSON of `status`."""
    return {**plain(cluster.info), "nodes": plain_list(cluster.nodes), "volumes": plain_list(volumes)}


def _show(session: Session, cluster: screens.Cluster, volumes: Sequence[pb.Volume]) -> None:
    if session.output.json:
        session.output.emit(document(cluster, volumes))
    else:
        session.output.show(screens.screen(cluster, volumes, now()))


async def _watch(client: Client, session: Session, volumes: tuple[str, ...], chosen: Any) -> None:
    """Shows each change until Ctrl-C; JSON is then one document a line."""
    cluster = await _cluster(client)
    known: dict[str, pb.Volume] = {}
    output = session.output
    live = Live(console=output.out, get_renderable=lambda: screens.screen(cluster, chosen(list(known.values())), now()))
    if output.out.is_terminal and not output.json:
        live.start()
    try:
        async with asyncio.timeout(session.options.timeout_s):
            request = api.WatchVolumesRequest(volumes=volumes)
            async for answer in steady(client, lambda s: s.WatchVolumes, lambda: request):
                if not answer.volumes and not answer.removed:
                    continue
                known |= {volume.name: volume for volume in answer.volumes}
                known = {name: volume for name, volume in sorted(known.items()) if name not in answer.removed}
                cluster = await _cluster(client)
                if output.json:
                    output.emit(document(cluster, chosen(list(known.values()))), compact=True)
                elif not live.is_started:
                    output.show(screens.screen(cluster, chosen(list(known.values())), now()), "")
    except TimeoutError:
        return
    finally:
        live.stop()
