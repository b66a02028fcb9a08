"""`resilver snapshot`, `snapshots`, `preserved`, `export`, `drop` and `prune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import click

from resilver.cli.options import Verb
from resilver.cli.output import EXIT_PARTLY, EXIT_REFUSED
from resilver.cli.plainjson import cp_text, plain, plain_list
from resilver.cli.screens import lists
from resilver.cli.session import Session, pass_session, request_id, resolve, select
from resilver.cli.words import count, listing, now, short_id, size
from resilver.errors import ResilverError
from resilver.v1 import coordinator_pb2 as api

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resilver.cli.client import Client
    from resilver.v1 import volume_pb2 as pb

ID_LENGTH = 36
"""Of a whole UUID: nothing needs to be looked up for it."""


@click.command(cls=Verb)
@click.argument("volumes", nargs=-1, metavar="[VOLUME]…")
@click.option("--all", "all_volumes", is_flag=True, help="Every volume.")
@click.option("--note", default="", metavar="TEXT", help="Stands beside it in every list.")
@pass_session
def snapshot(session: Session, volumes: tuple[str, ...], all_volumes: bool, note: str) -> int:
    """Take a consistency point on each primary now."""
    request = api.CreateSnapshotRequest(request_id=request_id(), **select(volumes, all_volumes=all_volumes), note=note)

    async def work(client: Client) -> api.CreateSnapshotResponse:
        return await client.call(lambda s: s.CreateSnapshot, request)

    found = session.run(work)
    if session.output.json:
        session.output.emit(plain(found))
    for one in found.snapshots:
        on = listing(copy.node for copy in one.copies)
        much = f"{size(one.size_bytes)} " if one.size_bytes else ""  # of a subvolume nobody counts it
        session.output.say(f"{one.volume} {cp_text(one.cp)}  {short_id(one.id)}  {much}on {on}")
    for refusal in found.refusals:
        session.output.refusal(refusal.refusal, where=refusal.volume)
    if not found.refusals and not found.snapshots:
        session.output.say("no volumes, so nothing was taken")
    if not found.refusals:
        return 0
    return EXIT_PARTLY if found.snapshots else EXIT_REFUSED


@click.command(cls=Verb)
@click.argument("volume")
@click.option("--node", default="", metavar="NODE", help="Only those that this node has.")
@pass_session
def snapshots(session: Session, volume: str, node: str) -> int:
    """List the snapshots of a volume: where each is, and who pins it."""
    request = api.ListSnapshotsRequest(volume=volume, node=node)

    async def work(client: Client) -> list[pb.Snapshot]:
        return await client.pages(lambda s: s.ListSnapshots, request, lambda page: page.snapshots)

    found = session.run(work)
    if session.output.json:
        session.output.emit({"snapshots": plain_list(found)})
    elif found:
        session.output.show(lists.snapshots(found, now()))
    else:
        session.output.say(f"{volume} has no snapshots there")
    return 0


@click.command(cls=Verb)
@click.argument("volume", required=False)
@click.option("--node", default="", metavar="NODE", help="Only those on this node.")
@pass_session
def preserved(session: Session, volume: str | None, node: str) -> int:
    """List what was kept before it was replaced. It stays until it is dropped."""

    async def work(client: Client) -> list[pb.PreservedCopy]:
        return await _preserved(client, volume or "", node)

    found = session.run(work)
    if session.output.json:
        session.output.emit({"preserved": plain_list(found)})
    elif found:
        session.output.show(lists.preserved(found, now()))
        one = found[0]
        session.output.say(
            f"get one out: resilver export {short_id(one.id)} --node {one.node} --to PATH   "
            f"let it go: resilver drop {short_id(one.id)} --node {one.node}"
        )
    else:
        session.output.say("nothing was preserved")
    return 0


@click.command(cls=Verb)
@click.argument("snapshot")
@click.option("--node", required=True, metavar="NODE", help="The node that has it.")
@click.option("--to", "path", required=True, metavar="PATH", help="A path on that node that does not exist yet.")
@click.option("--writable", is_flag=True, help="Make the copy writable.")
@pass_session
def export(session: Session, snapshot: str, node: str, path: str, writable: bool) -> int:
    """Copy a snapshot or a preserved copy out, to a path on its node."""

    async def work(client: Client) -> api.ExportSnapshotResponse:
        whole = (await _named(client, (snapshot,)))[0].id
        request = api.ExportSnapshotRequest(request_id=request_id(), id=whole, node=node, path=path, writable=writable)
        return await client.call(lambda s: s.ExportSnapshot, request)

    found = session.run(work)
    if session.output.json:
        session.output.emit(plain(found))
    else:
        much = f"  {size(found.size_bytes)}" if found.size_bytes else ""
        session.output.say(f"{node}:{found.path}{much}")
    return 0


@click.command(cls=Verb)
@click.argument("snapshots", nargs=-1, required=True, metavar="SNAPSHOT…")
@click.option("--node", required=True, metavar="NODE", help="The node that lets it go.")
@pass_session
def drop(session: Session, snapshots: tuple[str, ...], node: str) -> int:
    """Let snapshots or preserved copies of a node go. Refused for pinned and last copies."""
    session.needs_confirmation(f"Drop {', '.join(snapshots)} on {node}? Data that is nowhere else is gone then.")

    async def look(client: Client) -> list[Named]:
        return await _named(client, snapshots)

    chosen = session.run(look)
    session.confirm(f"Drop on {node}: {', '.join(one.text for one in chosen)}? Data that is nowhere else is gone then.")

    async def work(client: Client) -> list[Dropped]:
        return [await _drop(client, one, node) for one in chosen]

    found = session.run(work)
    if len(found) == 1 and found[0].error is not None:
        raise found[0].error
    return _show_dropped(session, found, node)


@click.command(cls=Verb)
@click.argument("volume")
@click.option("--keep-last", type=click.IntRange(min=1), help="How many stay. [each agent's own keep_last]")
@pass_session
def prune(session: Session, volume: str, keep_last: int | None) -> int:
    """Let the oldest snapshots of a volume go; pinned ones stay."""
    request = api.PruneSnapshotsRequest(request_id=request_id(), volume=volume, keep_last=keep_last or 0)

    async def work(client: Client) -> api.PruneSnapshotsResponse:
        return await client.call(lambda s: s.PruneSnapshots, request)

    found = session.run(work)
    if session.output.json:
        session.output.emit(plain(found))
        return 0
    freed = sum(one.freed_bytes for one in found.dropped)
    session.output.say(f"dropped {count(len(found.dropped), 'copy', 'copies')}{_freed(freed)}")
    for one in found.kept:
        if one.pinned_by:
            session.output.say(f"  kept {short_id(one.id)} on {one.node}: {listing(one.pinned_by)}")
    return 0


def _freed(size_bytes: int) -> str:
    return f", {size(size_bytes)} freed" if size_bytes else ""  # where counting takes long nobody does


class Named(NamedTuple):
    """A snapshot or preserved copy that the command line names, and how to say it."""

    id: str
    text: str


class Dropped(NamedTuple):
    """What became of one of them."""

    id: str
    freed_bytes: int
    error: ResilverError | None = None


async def _drop(client: Client, one: Named, node: str) -> Dropped:
    request = api.DeleteSnapshotRequest(request_id=request_id(), id=one.id, nodes=[node])
    try:
        answer = await client.call(lambda s: s.DeleteSnapshot, request)
    except ResilverError as error:
        return Dropped(one.id, 0, error)
    return Dropped(one.id, answer.freed_bytes)


def _show_dropped(session: Session, found: Sequence[Dropped], node: str) -> int:
    dropped = [one for one in found if one.error is None]
    errors = [(one.id, one.error) for one in found if one.error is not None]
    if session.output.json:
        rows = [{"id": one.id, "node": node, "freed_bytes": one.freed_bytes} for one in dropped]
        session.output.emit({"dropped": rows, "refused": [identity for identity, _ in errors]})
    for one in dropped:
        session.output.say(f"dropped {short_id(one.id)} on {node}{_freed(one.freed_bytes)}")
    for identity, error in errors:
        session.output.refused([error.reason], error.message, error.next_command, where=short_id(identity))
    if not errors:
        return 0
    return EXIT_PARTLY if dropped else max(error.exit_code for _, error in errors)


async def _preserved(client: Client, volume: str = "", node: str = "") -> list[pb.PreservedCopy]:
    request = api.ListPreservedRequest(volume=volume, node=node)
    return await client.pages(lambda s: s.ListPreserved, request, lambda page: page.preserved)


async def _named(client: Client, texts: tuple[str, ...]) -> list[Named]:
    """The things that shortened ids stand for, wherever they are: that a node lacks one is for the server to say."""
    if all(len(text) == ID_LENGTH for text in texts):
        return [Named(text, short_id(text)) for text in texts]
    known: dict[str, str] = {}
    for copy in await _preserved(client):
        exclusive = f", {size(copy.exclusive_bytes)} its own" if copy.HasField("exclusive_bytes") else ""
        known[copy.id] = f"{short_id(copy.id)} (preserved of {copy.volume}{exclusive})"
    names = await client.pages(lambda s: s.ListVolumes, api.ListVolumesRequest(), lambda page: page.volumes)
    for volume in names:
        request = api.ListSnapshotsRequest(volume=volume.name)
        for one in await client.pages(lambda s: s.ListSnapshots, request, lambda page: page.snapshots):
            known[one.id] = f"{short_id(one.id)} ({volume.name} {cp_text(one.cp) or 'adopted'})"
    whole = [resolve(text, known, "snapshot") for text in texts]
    return [Named(identity, known.get(identity, identity)) for identity in whole]
