"""`resilver demo`."""

from __future__ import annotations

import subprocess
import time

import click

from resilver.cli.demo.cleanup import Cleanup
from resilver.cli.options import Verb
from resilver.cli.output import EXIT_FAILED, EXIT_STOPPED
from resilver.cli.session import Session, pass_session
from resilver.errors import ResilverError


@click.command(cls=Verb)
@click.option("--keep", is_flag=True, help="Leave the cluster running until Ctrl-C.")
@pass_session
def demo(session: Session, keep: bool) -> int:
    """Start three nodes on this machine, break two of them, and bring them back.

    Takes a minute or two, needs no installation, and leaves nothing behind.
    """
    from resilver.cli.demo.story import Story  # noqa: PLC0415  # `demo --help` needs none of it

    output = session.output
    begun = time.monotonic()
    story: Story | None = None
    code = 0
    cleanup = Cleanup()
    try:
        with cleanup:
            try:
                story = Story(output.out, cleanup)
                story.tell()
                output.out.print(f"\nDONE in {time.monotonic() - begun:.0f} s", style="bold green")
                story.closing()
                if keep:
                    story.stay()
                output.say("(these need the cluster, which is stopped now: with --keep, or make demo KEEP=1, it stays)")
            except (ResilverError, subprocess.SubprocessError, OSError) as error:
                code = EXIT_FAILED
                output.refused(["DEMO_FAILED"], str(error))
                # While the logs are still there.
                output.note(story.logs() if story is not None else "")
            output.note("stopping everything and removing what was made")
    except KeyboardInterrupt:
        output.note("stopped" if cleanup.failures else "stopped; everything was stopped and removed")
        code = 0 if keep else EXIT_STOPPED
    for failure in cleanup.failures:
        output.note(f"not cleaned up: {failure}")
        code = EXIT_FAILED
    return code
