"""`resilver limit`: how many bytes a second mirroring may move on a node, for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from google.protobuf.duration_pb2 import Duration

from resilver.cli.options import RATE, SPAN, Verb
from resilver.cli.plainjson import plain
from resilver.cli.screens import lists
from resilver.cli.session import Session, pass_session, request_id
from resilver.cli.words import now
from resilver.limits import LIMIT_SECONDS_DEFAULT, LIMIT_SECONDS_MAX
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import volume_pb2 as pb

if TYPE_CHECKING:
    from resilver.cli.client import Client


@click.command(cls=Verb)
@click.argument("node")
@click.option("--in", "receive", type=RATE, metavar="RATE", help="What it may receive, such as 50MB; 0 is no cap.")
@click.option("--out", "send", type=RATE, metavar="RATE", help="What it may send.")
@click.option("--for", "span", type=SPAN, metavar="TIME", help="For how long, such as 2h; at most 30d. [1d]")
@click.option("--clear", is_flag=True, help="End what was ordered before: what the node's file says counts again.")
@pass_session
def limit(
    session: Session, node: str, *, receive: int | None, send: int | None, span: float | None, clear: bool
) -> int:
    """Cap what mirroring moves on a node, for a while; without options, show what holds.

    It ends by itself, and what the node's file says counts again. A rate is in bytes a second: 50MB, 50MiB, 800kB.
    """
    capped = receive is not None or send is not None
    if span is not None and not capped:
        raise click.UsageError("--for goes with --in or --out: say what holds for that time")
    if span is not None and not 1 <= span <= LIMIT_SECONDS_MAX:
        raise click.UsageError("--for should be at least 1s and at most 30d")

    async def work(client: Client) -> pb.Node:
        if not capped and not clear:
            return (await client.call(lambda s: s.GetNode, api.GetNodeRequest(node=node))).node
        change = pb.NodeLimitChange(
            receive_bytes_per_second=receive,
            send_bytes_per_second=send,
            limit_duration=Duration(seconds=int(span or LIMIT_SECONDS_DEFAULT)),
            clear=clear,
        )
        request = api.UpdateNodeRequest(request_id=request_id(), node=node, limits=change)
        return (await client.call(lambda s: s.UpdateNode, request)).node

    found = session.run(work)
    if session.output.json:
        session.output.emit({"node": plain(found)})
    else:
        session.output.show(lists.limits(found, now()))
    return 0
