"""`resilver pause` and `unpause`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from google.protobuf.duration_pb2 import Duration

from resilver.cli.options import SPAN, Verb
from resilver.cli.plainjson import plain_list
from resilver.cli.session import Session, pass_session, request_id, select
from resilver.cli.words import listing
from resilver.spans import span as in_words
from resilver.v1 import coordinator_pb2 as api

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resilver.cli.client import Client
    from resilver.v1 import volume_pb2 as pb


@click.command(cls=Verb)
@click.argument("volumes", nargs=-1, metavar="[VOLUME]…")
@click.option("--all", "all_volumes", is_flag=True, help="Every volume.")
@click.option("--reason", required=True, metavar="TEXT", help="Why; `status` and whatever is held back say it.")
@click.option("--for", "span", type=SPAN, metavar="TIME", help="For how long, such as 2h. [until unpaused]")
@pass_session
def pause(session: Session, volumes: tuple[str, ...], all_volumes: bool, reason: str, span: float | None) -> int:
    """Hold back resyncs of volumes. What runs goes on; what would start waits."""
    request = api.PauseVolumeRequest(
        request_id=request_id(),
        **select(volumes, all_volumes=all_volumes),
        reason=reason,
        pause_duration=None if span is None else _duration(span),
    )

    async def work(client: Client) -> Sequence[pb.Volume]:
        return (await client.call(lambda s: s.PauseVolume, request)).volumes

    until = f"for {in_words(span)}" if span is not None else "until resilver unpause"
    return _show(session, session.run(work), f"paused {until}")


@click.command(cls=Verb)
@click.argument("volumes", nargs=-1, metavar="[VOLUME]…")
@click.option("--all", "all_volumes", is_flag=True, help="Every volume.")
@pass_session
def unpause(session: Session, volumes: tuple[str, ...], all_volumes: bool) -> int:
    """Let resyncs of volumes start again."""
    request = api.ResumeVolumeRequest(request_id=request_id(), **select(volumes, all_volumes=all_volumes))

    async def work(client: Client) -> Sequence[pb.Volume]:
        return (await client.call(lambda s: s.ResumeVolume, request)).volumes

    return _show(session, session.run(work), "unpaused")


def _duration(seconds: float) -> Duration:
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def _show(session: Session, found: Sequence[pb.Volume], what: str) -> int:
    if session.output.json:
        session.output.emit({"volumes": plain_list(found)})
    else:
        session.output.say(f"{listing(volume.name for volume in found)}: {what}")
    return 0
