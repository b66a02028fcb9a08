"""By hand: `python -m tests.vm.run [pytest options]` runs the tests of tests/vm/inside in a machine and shows all."""

from __future__ import annotations

import shlex
import sys

from tests.vm.machine import inside, run

if __name__ == "__main__":
    if {"-h", "--help"}.intersection(sys.argv[1:]):
        sys.stdout.write(f"{__doc__}\n")
        sys.exit(0)
    outcome = run(inside(*map(shlex.quote, sys.argv[1:])), deadline_s=7200, show=True)
    sys.stdout.write(outcome.console + (outcome.output if outcome.status < 0 else ""))
    sys.exit(outcome.status)
