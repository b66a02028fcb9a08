"""What TLS costs: a first copy with certificates and one without, in turn, between the same two processes.

    sudo .venv/bin/python bench/tls.py [--mebibytes 1024] [--rounds 5] [--json FILE]

As the case `first-copy` of the suite: an image of incompressible data that is in memory, from XFS on a loop device to a
tmpfs, over the loopback. So nothing but the work of the two processes is in it, which is where TLS is felt the most; a
disk or a network that is slower hides it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.suite import data
from bench.suite.cases import newcomer
from bench.suite.data import MIB
from bench.suite.measure import Arena, Entry, compete
from bench.suite.ours import Ours
from resilver.names import Role
from tests import namespace
from tests.certificates import Authority


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    namespace.enter()
    with tempfile.TemporaryDirectory(prefix="resilver-tls-") as work:
        plain, secured = measured(Path(work), asked.mebibytes * MIB, asked.rounds)
    found = {one.name: figures(one, asked.mebibytes) for one in (plain, secured)}
    ratios = {key: found[secured.name][key] / found[plain.name][key] for key in ("transfer_s", "cpu_s")}
    for name, row in found.items():
        print(f"{name:<10} " + "   ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print("TLS costs  " + "   ".join(f"{key} x {value:.2f}" for key, value in ratios.items()))
    if asked.json is not None:
        asked.json.write_text(json.dumps({"mebibytes": asked.mebibytes, "median": found, "ratio": ratios}, indent=1))


def measured(work: Path, size: int, rounds: int) -> list[Entry]:
    authority = Authority(work / "certs", "bench")
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(data.disk(work, "source", "xfs", 4 * size))
        target = stack.enter_context(data.memory(work, "target", 3 * size + 64 * MIB))
        there, here, image, ranges = newcomer(work, source, target, size)
        files = [authority.issue(Role.NODE, node) for node in ("a", "b")]
        pair: list[Any] = [Ours(there, here, "", "goal", ranges), Ours(there, here, "", "goal", ranges, tls=files)]
        pair[0].name, pair[1].name = "plaintext", "TLS 1.3"
        arena = Arena(
            [source],
            target=lambda _one: target,
            settle=lambda _one: data.warm(image),
            differs=lambda result: data.differing(image, result, [(0, size)]),
        )
        return compete(pair, arena, rounds, print, warm_up=True)


def figures(one: Entry, mebibytes: int) -> dict[str, float]:
    """Medians; the CPU is that of both processes."""
    transfer_s = statistics.median(run.parts["transfer_s"] for run in one.runs)
    return {
        "transfer_s": transfer_s,
        "mib_s": mebibytes / transfer_s,
        "cpu_s": statistics.median(run.cpu_s for run in one.runs),
    }


if __name__ == "__main__":
    main()
