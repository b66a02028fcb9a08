"""The `resilver` command: what an operator types, and what it ends with.

Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 refused, 4 no coordinator or timeout, 5 partly done,
130 stopped watching. No traceback ever reaches a user, also not for a bug: that is one line that asks for a report,
and `RESILVER_DEBUG=1` shows the rest.

Only this module and click are imported before the verb is known; each verb brings what it needs.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from resilver.cli.options import Verbs, wants_json
from resilver.errors import ResilverError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from click.formatting import HelpFormatter

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_STOPPED: Final = 130

SECTIONS: Final[Mapping[str, Mapping[str, tuple[str, str]]]] = {
    "Look": {
        "status": ("status", "Volumes, their replicas, and what is wrong with them."),
        "plan": ("plan", "What a resync would do; changes nothing."),
        "explain": ("election:explain", "Why this primary, why this state, why this action."),
        "volumes": ("lists:volumes", "The volumes, one a line."),
        "nodes": ("lists:nodes", "The nodes and when they were last heard of."),
        "snapshots": ("snapshots:snapshots", "The snapshots of a volume and where they are."),
        "preserved": ("snapshots:preserved", "What was kept before it was replaced."),
        "history": ("election:history", "Elections and refusals of a volume."),
        "resyncs": ("resync:resyncs", "Resyncs with their bytes."),
        "events": ("lists:events", "What happened."),
        "audit": ("audit", "Who ordered what, and what was refused."),
        "inspect": ("inspect", "Offline: what replicas on this machine are."),
    },
    "Do": {
        "resync": ("resync:resync", "Brings replicas to the newest consistency point."),
        "snapshot": ("snapshots:snapshot", "Takes a consistency point on each primary now."),
        "elect": ("election:elect", "Examines the replicas and decides who is primary."),
        "pause": ("pause:pause", "Holds back resyncs of volumes."),
        "unpause": ("pause:unpause", "Lets them go on."),
        "cancel": ("resync:cancel", "Ends running resyncs."),
        "limit": ("limit", "Caps what mirroring moves on a node, for a while."),
        "export": ("snapshots:export", "Copies a snapshot or a preserved copy out."),
        "drop": ("snapshots:drop", "Lets a snapshot or a preserved copy go."),
        "prune": ("snapshots:prune", "Lets the oldest snapshots of a volume go."),
    },
    "Administration": {
        "node": ("admin:node", "Take a node out."),
        "replica": ("admin:replica", "Take a replica out."),
        "volume": ("admin:volume", "Take a volume out."),
        "store": ("admin:store", "Adopt or export the store."),
        "certs": ("certs", "A small authority, and the certificates of a cluster."),
        "demo": ("demo", "Three nodes on this machine, broken and brought back."),
        "completion": ("shell:completion", "Completion for bash, zsh or fish."),
        "version": ("shell:version", "The versions of command and coordinators."),
    },
}
"""Section -> verb -> (module under `verbs`[:attribute], help). `--help` reads this and imports nothing."""

_VERBS: Final = {name: place for section in SECTIONS.values() for name, (place, _) in section.items()}


class Root(Verbs):
    """The command itself: imports a verb's module when the verb is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        place = _VERBS.get(cmd_name)
        if place is None:
            return None
        module, _, attribute = place.partition(":")
        command = getattr(importlib.import_module(f"resilver.cli.verbs.{module}"), attribute or cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # click imports every command to suggest a name; the table knows the names already.
        if args[0] not in _VERBS and not args[0].startswith("-"):
            raise click.UsageError(_unknown(args[0]), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: HelpFormatter) -> None:
        del ctx
        for section, verbs in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name, text) for name, (_, text) in verbs.items()])


def _unknown(name: str) -> str:
    from difflib import get_close_matches  # noqa: PLC0415  # needed for mistakes alone

    near = get_close_matches(name, list(_VERBS), n=1)
    return f"there is no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else ". See resilver --help")


@click.command("resilver", cls=Root, environment=True, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Keep the mirrored copies of a volume at the same consistency point."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # gRPC's own log lines would stand between ours; what matters of them reaches us as errors.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A locale that lacks a letter of a message is no reason to fail.
            stream.reconfigure(errors="replace")
    try:
        result = cli.main(given, prog_name="resilver", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        sys.stderr.write("\nstopped\n")
        return EXIT_STOPPED
    except BrokenPipeError:
        # Whoever read us has seen enough; the interpreter would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001  # the last line of defence: a bug is one line, not a traceback
        return _ended(error, as_json=wants_json(given))
    return result if isinstance(result, int) else 0


def _ended(error: Exception, *, as_json: bool) -> int:
    """Says what ended the command; its exit code."""
    if isinstance(error, click.ClickException):
        return _usage(error, as_json=as_json)
    if isinstance(error, ResilverError):
        return _failed(error, as_json=as_json)
    if isinstance(error, OSError):
        return _failed(ResilverError("IO_ERROR", str(error)), as_json=as_json)
    return _bug(error)


def _usage(error: click.ClickException, *, as_json: bool) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        sys.stderr.write(error.format_message() + "\n")
        return EXIT_USAGE
    from resilver.cli.output import Output  # noqa: PLC0415  # rich is not needed when all goes well

    output = Output(as_json=as_json)
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    output.failed("USAGE", error.format_message(), f"{ctx.command_path} --help" if ctx else "")
    return error.exit_code


def _failed(error: ResilverError, *, as_json: bool) -> int:
    from resilver.cli.output import Output  # noqa: PLC0415  # as above

    details = {key: value for key, value in error.metadata.items() if isinstance(value, str)}
    Output(as_json=as_json).failed(error.reason, error.message, error.next_command, **details)
    return error.exit_code


def _bug(error: Exception) -> int:
    if os.environ.get("RESILVER_DEBUG"):
        import traceback  # noqa: PLC0415  # for developers

        traceback.print_exception(error)
    text = " ".join(str(error).split())
    sys.stderr.write(
        f"INTERNAL: a bug in the resilver command ({type(error).__name__}: {text}). Please report it with the output "
        f"of the same command under RESILVER_DEBUG=1\n"
    )
    return EXIT_FAILED


def run() -> Any:
    """For `python -m resilver.cli.main`."""
    raise SystemExit(main())


if __name__ == "__main__":
    run()
