"""`resilver inspect`: offline, without any daemon.

Reading a replica's records is the agent's knowledge and deciding between replicas the coordinator's; this command
stands below both and imports neither. It runs the two as programs, with this interpreter, and hands on what they
print and what they end with.
"""

from __future__ import annotations

import subprocess
import sys

import click

from resilver.cli.options import Verb
from resilver.cli.session import Session, pass_session
from resilver.errors import Invalid

COMPARED_MIN = 2


@click.command(cls=Verb)
@click.argument("paths", nargs=-1, required=True, metavar="PATH…")
@click.option(
    "--compare",
    is_flag=True,
    help="PATHs are JSON files that `inspect -o json` printed on several nodes: run the real election on them.",
)
@click.option("--node", metavar="NODE", help="What to call this machine. [its host name]")
@click.option("--volume", metavar="VOLUME", help="The one volume that is meant.")
@pass_session
def inspect(session: Session, paths: tuple[str, ...], compare: bool, node: str | None, volume: str | None) -> int:
    """Show the records and the live state of replicas on this machine, or compare several.

    PATH is a volume's live copy, its snapshot directory, a directory that holds such, or an agent.toml.
    """
    if compare and node:
        raise Invalid("INVALID_FIELD", "--node names a machine that is looked at; --compare looks at files")
    if compare and len(paths) < COMPARED_MIN:
        raise Invalid("INVALID_FIELD", "--compare wants the JSON of two nodes or more")
    module = "coordinator.compare" if compare else "agent.inspect"
    # -P: a folder called `agent` in the present directory is not ours.
    command = [sys.executable, "-P", "-m", module, *paths]
    if node:
        command += ["--node", node]
    if volume:
        command += ["--volume", volume]
    if session.output.json:
        command += ["-o", "json"]
    sys.stdout.flush()
    code = subprocess.run(command, check=False).returncode
    return code if code >= 0 else 128 - code
