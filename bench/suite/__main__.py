"""Measures us and the others on the same change, in the same run, in turn, and writes what was found.

    sudo make bench                                   # all of it, at full size
    sudo .venv/bin/python -m bench.suite --small      # a minute, to see that it works

It makes its own data on loop devices in a temporary directory, in a mount and a network namespace of its own, and
leaves nothing behind. A case that is run again with `--only` replaces its own figures and leaves the others'.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.suite import report
from bench.suite.cases import CASES, Asked
from bench.suite.data import GIB, MIB
from tests import namespace

_CLONE_NEWNET = 0x40000000
FULL_BYTES = 4 * GIB
SMALL_BYTES = 256 * MIB


def alone() -> None:
    """A mount namespace and a network of this process's own, so that what the loopback carries is ours."""
    if os.geteuid() != 0 or not namespace.enter() or ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        sys.exit("only root can mount file systems and have a network of its own: run it as root")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=list(CASES), help="this case alone; again for more")
    parser.add_argument("--who", action="append", default=[], metavar="WORD", help="only competitors of such names")
    parser.add_argument("--without", action="append", default=[], metavar="WORD", help="leave such competitors out")
    parser.add_argument("--rounds", type=int, help="how often each competitor runs: 5, with --small 2")
    parser.add_argument("--small", action="store_true", help="images of 256 MiB, and nothing is written into docs")
    parser.add_argument("--mib", type=int, help="images of that size instead")
    parser.add_argument("--out", type=Path, help="where the page, the JSON and the plots go: docs/benchmarks")
    parser.add_argument("--direct", action="store_true", help="loop devices go past the cache below them")
    parser.add_argument("--place", type=Path, default=Path("/var/tmp"), help="where the disks' files are made")
    return parser.parse_args(arguments)


def main() -> None:
    asked = parsed()
    size = asked.mib * MIB if asked.mib else SMALL_BYTES if asked.small else FULL_BYTES
    small = size < FULL_BYTES
    out = asked.out
    if out is None:
        docs = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
        out = Path(tempfile.mkdtemp(prefix="resilver-bench-out-")) if small else docs
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended before its time"))
    alone()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    wanted = Asked(
        size,
        asked.rounds or (2 if small else 5),
        asked.place,
        say,
        tuple(asked.who),
        tuple(asked.without),
        asked.direct,
    )
    for name in asked.only or CASES:
        say(f"{name}:")
        case = CASES[name](wanted)
        case.facts["loop devices"] = "direct" if asked.direct else "as `mount -o loop` makes them"
        print(report.table(case.json()), flush=True)
        report.save(out, case.json(), list(CASES))
    say(f"written to {out}")


if __name__ == "__main__":
    main()
