"""Runs seeds.

`python -m tests.simulation SEED` replays one and writes its trace; `--seeds N` runs N from `--first`, on every
processor. A seed that fails is one line: the command that replays it, and what it broke.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TRACES_MAX = 10
SHARE = 50
"""Seeds that a process takes at a time."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("seed", nargs="?", type=int)
    parser.add_argument("--seeds", type=int, default=0, metavar="N")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--mutation", default="", help="with a rule taken away: see mutations.py")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where traces are written")
    asked = parser.parse_args()
    if asked.seed is not None:
        return replay(asked.seed, asked.mutation, asked.directory)
    return run_all(range(asked.first, asked.first + asked.seeds), asked.jobs, asked.mutation, asked.directory)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def replay(seed: int, mutation: str, directory: Path) -> int:
    """One seed with its trace."""
    from tests.simulation.mutations import applied, harsh
    from tests.simulation.simulate import simulate

    trace: list[str] = []
    with applied(mutation):
        result = simulate(seed, trace, harsh(mutation))
    path = directory / f"simulation-{seed}.txt"
    path.write_text("\n".join([*trace, result.broken or "everything held", ""]))
    say(f"{result.broken or 'everything held'}\n{len(trace)} lines in {path}")
    return 1 if result.broken else 0


def run_all(seeds: range, jobs: int, mutation: str, directory: Path) -> int:
    """Many seeds; the failing ones are told as they are found."""
    begun, failed, counts = time.monotonic(), 0, Counter[str]()
    shares = [seeds[at : at + SHARE] for at in range(0, len(seeds), SHARE)]
    with ProcessPoolExecutor(jobs) as pool:
        for broken, counted in pool.map(_share, shares, [mutation] * len(shares)):
            counts.update(counted)
            for seed, said in broken:
                failed += 1
                again = f" --mutation {mutation!r}" if mutation else ""
                say(f".venv/bin/python -m tests.simulation {seed}{again}   # {said}")
                if failed <= TRACES_MAX:
                    replay(seed, mutation, directory)
    say(f"{len(seeds)} seeds in {time.monotonic() - begun:.0f} s, {failed} failed; {_told(counts)}")
    return 1 if failed else 0


def _share(seeds: Iterable[int], mutation: str) -> tuple[list[tuple[int, str]], Counter[str]]:
    from tests.simulation.mutations import applied, harsh
    from tests.simulation.simulate import simulate

    broken, counts = [], Counter[str]()
    with applied(mutation):
        for seed in seeds:
            result = simulate(seed, None, harsh(mutation))
            counts.update(result.counts)
            if result.broken:
                broken.append((seed, result.broken))
    return broken, counts


def _told(counts: Counter[str]) -> str:
    names = ("epochs", "acknowledged", "commits", "preserved", "refusals", "reigns", "agents died")
    return ", ".join(f"{counts[name]:,} {name}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
