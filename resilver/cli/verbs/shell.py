"""`resilver completion` and `version`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import get_completion_class

from resilver.cli.options import Verb, own_version
from resilver.cli.plainjson import plain_list
from resilver.cli.session import Session, pass_session
from resilver.errors import ResilverError
from resilver.v1 import coordinator_pb2 as api

if TYPE_CHECKING:
    from resilver.cli.client import Client

SHELLS = ("bash", "fish", "zsh")


@click.command(cls=Verb)
@click.argument("shell", type=click.Choice(SHELLS))
@pass_session
def completion(session: Session, shell: str) -> int:
    """Print the completion script of a shell, to be sourced: `source <(resilver completion bash)`."""
    del session
    root = click.get_current_context().find_root()
    found = get_completion_class(shell)
    assert found is not None, "click knows the shells of SHELLS"
    click.echo(found(root.command, {}, "resilver", "_RESILVER_COMPLETE").source())
    return 0


@click.command(cls=Verb)
@pass_session
def version(session: Session) -> int:
    """Show the version of this command and, if they answer, of the coordinators."""

    async def work(client: Client) -> api.GetClusterResponse:
        return await client.call(lambda s: s.GetCluster, api.GetClusterRequest())

    document: dict[str, Any] = {"version": own_version(), "coordinators": []}
    silence = ""
    try:
        document["coordinators"] = plain_list(session.run(work).coordinators)
    except ResilverError as error:
        # The command's own version is an answer also without a cluster.
        silence = error.message
    if session.output.json:
        session.output.emit(document)
        return 0
    session.output.say(f"resilver {document['version']}")
    for one in document["coordinators"]:
        session.output.say(f"coordinator {one['name']} {one['version']}{' (leads)' if one['leading'] else ''}")
    if silence:
        session.output.say(f"coordinators: {silence}")
    return 0
