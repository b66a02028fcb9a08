"""`resilver audit`: who ordered what, from where, and what was answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from resilver.cli.options import Verb
from resilver.cli.plainjson import plain_list
from resilver.cli.screens import audit as screens
from resilver.cli.session import Session, pass_session
from resilver.v1 import coordinator_pb2 as api

if TYPE_CHECKING:
    from resilver.cli.client import Client


@click.command(cls=Verb)
@click.option("--volume", default="", metavar="VOLUME", help="Only orders that name this volume.")
@click.option(
    "--by", "principal", default="", metavar="NAME", help="Only what this party asked for: jo, or its whole name."
)
@click.option("--refused", is_flag=True, help="Only what was refused.")
@pass_session
def audit(session: Session, volume: str, principal: str, refused: bool) -> int:
    """List the orders that changed something, and those that were refused, oldest first."""
    result = api.AUDIT_RESULT_REFUSED if refused else api.AUDIT_RESULT_UNSPECIFIED
    request = api.ListAuditEntriesRequest(volume=volume, principal=principal, result=result)

    async def work(client: Client) -> list[api.AuditEntry]:
        return await client.pages(lambda s: s.ListAuditEntries, request, lambda page: page.entries)

    found = sorted(session.run(work), key=lambda entry: entry.sequence)
    if session.output.json:
        session.output.emit({"audit": plain_list(found)})
        return 0
    for entry in found:
        session.output.out.print(screens.audit_line(entry), soft_wrap=True)
    if not found:
        session.output.say("no orders yet" if not (volume or principal or refused) else "no such orders")
    return 0
