"""`resilver node|replica|volume remove` and `store adopt|export`. Data on disks is never touched by any of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from resilver.cli.options import Verb, Verbs
from resilver.cli.plainjson import plain, plain_list
from resilver.cli.session import Session, pass_session, request_id
from resilver.cli.words import listing, size
from resilver.errors import Invalid
from resilver.v1 import coordinator_pb2 as api

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resilver.cli.client import Client
    from resilver.v1 import volume_pb2 as pb


@click.group(cls=Verbs)
def node() -> None:
    """Take a node out."""


@node.command("remove", cls=Verb)
@click.argument("name", metavar="NODE")
@pass_session
def node_remove(session: Session, name: str) -> int:
    """Forget a node and all its replicas. Refused while it reports; its data is not touched."""
    session.confirm(f"Remove node {name} and all its replicas from the cluster? Its data is not touched.")
    request = api.RemoveNodeRequest(request_id=request_id(), node=name)

    async def work(client: Client) -> Sequence[pb.Volume]:
        return (await client.call(lambda s: s.RemoveNode, request)).volumes

    return _removed(session, session.run(work), f"node {name}")


@click.group(cls=Verbs)
def replica() -> None:
    """Take a replica out."""


@replica.command("remove", cls=Verb)
@click.argument("volume")
@click.argument("name", metavar="NODE")
@pass_session
def replica_remove(session: Session, volume: str, name: str) -> int:
    """Forget one node's replica of a volume. Refused while it reports; its data is not touched."""
    session.confirm(f"Remove the replica of {volume} on {name} from the cluster? Its data is not touched.")
    request = api.RemoveReplicaRequest(request_id=request_id(), volume=volume, node=name)

    async def work(client: Client) -> Sequence[pb.Volume]:
        return (await client.call(lambda s: s.RemoveReplica, request)).volumes

    return _removed(session, session.run(work), f"{volume} on {name}")


@click.group(cls=Verbs)
def volume() -> None:
    """Take a volume out."""


@volume.command("remove", cls=Verb)
@click.argument("name", metavar="VOLUME")
@pass_session
def volume_remove(session: Session, name: str) -> int:
    """Forget a volume. Refused while a node reports it; no data is touched."""
    session.confirm(f"Remove volume {name} from the cluster? Its data is not touched.")
    request = api.RemoveVolumeRequest(request_id=request_id(), volume=name)

    async def work(client: Client) -> Sequence[pb.Volume]:
        return (await client.call(lambda s: s.RemoveVolume, request)).volumes

    return _removed(session, session.run(work), f"volume {name}")


def _removed(session: Session, changed: Sequence[pb.Volume], what: str) -> int:
    if session.output.json:
        session.output.emit({"volumes": plain_list(changed)})
    else:
        session.output.say(f"removed {what}; changed: {listing(one.name for one in changed)}")
    return 0


@click.group(cls=Verbs)
def store() -> None:
    """Adopt or export the store."""


@store.command("adopt", cls=Verb, short_help="Let the agents take on the present store.")
@click.argument("store_id", required=False)
@pass_session
def store_adopt(session: Session, store_id: str | None) -> int:
    """Let the agents take on the present store in place of the one they know.

    Needed once after the store was replaced or emptied. Its volumes are RECOVERING until every member has reported.
    """
    if store_id is None:
        session.needs_confirmation("Adopt the present store?")

    async def look(client: Client) -> str:
        return (await client.call(lambda s: s.GetCluster, api.GetClusterRequest())).store_id

    chosen = store_id or session.run(look)
    if store_id is None:
        session.confirm(f"Let every agent take on store {chosen} in place of the one it knows?")
    request = api.AdoptStoreRequest(request_id=request_id(), store_id=chosen)

    async def work(client: Client) -> api.AdoptStoreResponse:
        return await client.call(lambda s: s.AdoptStore, request)

    found = session.run(work)
    if session.output.json:
        session.output.emit(plain(found))
    else:
        by = listing(found.nodes) if found.nodes else "each agent, as soon as it asks again"
        session.output.say(f"store {found.store_id} is adopted by {by}")
    return 0


@store.command("export", cls=Verb)
@click.option("--to", "path", type=click.Path(path_type=Path), help="A file that does not exist yet. [stdout]")
@pass_session
def store_export(session: Session, path: Path | None) -> int:
    """Write all that the store holds, as JSON."""

    async def read(client: Client) -> bytes:
        chunks = client.stream(lambda s: s.ExportStore, api.ExportStoreRequest())
        return b"".join([answer.chunk async for answer in chunks])

    data = session.run(read)
    if path is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return 0
    try:
        # Whoever can read the store knows every node's addresses and history: its owner alone.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise Invalid("INVALID_FIELD", f"{path} is there already; name a file that does not exist yet") from error
    session.output.say(f"{path}  {size(len(data))}")
    return 0
