"""By hand: `make openzfs`, or `python -m tests.openzfs.run [--hours N] [pytest options]`.

Runs tests in a machine with the kernel's OpenZFS and shows what they say; without options those of
tests/agent/backends/zfs/test_openzfs.py. It is slow, and no part of `make test`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from tests.openzfs.machine import run, why_not
from tests.vm.machine import inside


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=3.0, help="after which the machine is ended (%(default)s)")
    options, rest = parser.parse_known_args()
    why = why_not()
    if why:
        sys.stderr.write(f"{why}\n")
        return 2
    chosen = rest or ["-v", "tests/agent/backends/zfs/test_openzfs.py"]
    with tempfile.TemporaryDirectory(prefix="openzfs-results-") as name:
        results = Path(name)
        sys.stdout.write(f"tail -f {results / 'output'}\n")
        sys.stdout.flush()
        outcome = run(inside(*map(shlex.quote, chosen)), results, options.hours * 3600)
    sys.stdout.write(outcome.output + (outcome.console if outcome.status < 0 else ""))
    return 1 if outcome.status < 0 else outcome.status


if __name__ == "__main__":
    sys.exit(main())
