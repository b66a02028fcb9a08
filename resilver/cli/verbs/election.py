"""`resilver elect`, `explain` and `history`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.text import Text

from resilver.cli.options import Verb
from resilver.cli.output import EXIT_REFUSED
from resilver.cli.plainjson import plain, plain_list
from resilver.cli.screens import election as screens
from resilver.cli.screens import lists
from resilver.cli.screens.layout import indented
from resilver.cli.session import Session, pass_session, request_id
from resilver.v1 import coordinator_pb2 as api

if TYPE_CHECKING:
    from resilver.cli.client import Client
    from resilver.v1 import volume_pb2 as pb


@click.command(cls=Verb)
@click.argument("volume")
@click.option("--dry-run", is_flag=True, help="Examine and say what would be decided; decide nothing.")
@click.option("--choose", metavar="NODE", help="This one, where no rule can choose.")
@click.option(
    "--accept-loss", multiple=True, metavar="NODE", help="Give up what only this node has; once for each node named."
)
@pass_session
def elect(session: Session, volume: str, dry_run: bool, choose: str | None, accept_loss: tuple[str, ...]) -> int:
    """Examine the replicas of a volume and decide who is primary."""
    if accept_loss and not dry_run and session.on_terminal:
        nodes = " and ".join(accept_loss)
        session.confirm(f"Elect without {nodes}, and give up what only {nodes} has of {volume}?")
    request = api.ElectPrimaryRequest(
        request_id=request_id(),
        validate_only=dry_run,
        volume=volume,
        choose_node=choose or "",
        accept_loss_nodes=accept_loss,
    )

    async def work(client: Client) -> pb.Election:
        return (await client.call(lambda s: s.ElectPrimary, request)).election

    found = session.run(work)
    if session.output.json:
        session.output.emit(plain(found))
    else:
        session.output.show(screens.screen(found, dry_run=dry_run))
    if found.HasField("refusal"):
        session.output.refusal(found.refusal, where=found.volume)
        return EXIT_REFUSED
    return 0


@click.command(cls=Verb)
@click.argument("volume")
@click.argument("node", required=False)
@pass_session
def explain(session: Session, volume: str, node: str | None) -> int:
    """Say why this primary, why this state, why this action, why refused."""

    async def work(client: Client) -> api.ExplainVolumeResponse:
        return await client.call(lambda s: s.ExplainVolume, api.ExplainVolumeRequest(volume=volume, node=node or ""))

    found = session.run(work)
    output = session.output
    if output.json:
        output.emit(plain(found))
        return 0
    for line in found.text.splitlines():
        output.say(line)
    would_be = found.would_be
    if would_be.HasField("refusal") or would_be.winner != would_be.previous_primary:
        # The text says what would be decided; this is what it would be decided from.
        output.show(Text("CANDIDATES NOW", style="bold"), indented(screens.candidates(would_be)))
    return 0


@click.command(cls=Verb)
@click.argument("volume")
@pass_session
def history(session: Session, volume: str) -> int:
    """List the elections of a volume, refusals among them, newest first."""

    async def work(client: Client) -> list[pb.Election]:
        request = api.ListElectionsRequest(volume=volume)
        return await client.pages(lambda s: s.ListElections, request, lambda page: page.elections)

    found = session.run(work)
    if session.output.json:
        session.output.emit({"history": plain_list(found)})
    elif found:
        session.output.show(lists.history(found))
    else:
        session.output.say(f"nobody was ever elected for {volume}; the first resync does it")
    return 0
