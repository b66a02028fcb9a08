"""All targets for so many minutes together: `python -m fuzz --minutes 30 [--jobs 2] [--only NAME...]` (`make fuzz`).

Each target has its share of the time in a process of its own. What they found to reach more is kept in `.fuzz/corpus/`
and gone on from the next time. For each target one line tells executions, edges of code that were reached, and the most
memory that its process took. An input that breaks something is written to `.fuzz/found/` and named; the exit code is 1:
mend what it breaks, and put the input into `fuzz/corpora/TARGET/found-*`, where the tests run it ever after.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fuzz.all_targets import ALL
from fuzz.target import SCRATCH

PLACE: Final = Path(".fuzz")
START_MAX_S: Final = 120
_COVERED: Final = re.compile(r" cov: (\d+) ft: (\d+)")
_STAT: Final = re.compile(r"^stat::(\w+):\s+(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one target's process did; `log` is where it said so."""

    name: str
    executions: int
    edges: int
    memory_mib: int
    code: int
    found: tuple[Path, ...]
    log: Path

    @property
    def bad(self) -> bool:
        return self.code != 0 or bool(self.found)


def run(name: str, seconds: int) -> Outcome:
    """Runs one target for that long; one that does not end by itself is ended."""
    corpus, found, log = PLACE / "corpus" / name, PLACE / "found", PLACE / "log" / f"{name}.txt"
    for directory in (corpus, found, log.parent):
        directory.mkdir(parents=True, exist_ok=True)
    before = set(found.glob(f"{name}-*"))
    command = [sys.executable, "-m", "fuzz.one", name, str(corpus), str(found), str(seconds)]
    memory = Path("/dev/shm")  # noqa: S108 - the directory within it is private
    with (
        log.open("wb") as file,
        tempfile.TemporaryDirectory(prefix="resilver-fuzz-", dir=memory if os.access(memory, os.W_OK) else None) as own,
    ):
        environment = {**os.environ, SCRATCH: own}
        try:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=seconds + START_MAX_S,
                check=False,
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = -1
    text = log.read_text(errors="replace")
    stats = {key: int(value) for key, value in _STAT.findall(text)}
    covered = _COVERED.findall(text)
    return Outcome(
        name=name,
        executions=stats.get("number_of_executed_units", 0),
        edges=int(covered[-1][0]) if covered else 0,
        memory_mib=stats.get("peak_rss_mb", 0),
        code=code,
        found=tuple(sorted(set(found.glob(f"{name}-*")) - before)),
        log=log,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Fuzzes every target, guided by coverage.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", choices=list(ALL), default=list(ALL), metavar="NAME")
    asked = parser.parse_args()
    seconds = max(1, int(asked.minutes * 60 * asked.jobs / len(asked.only)))
    print(f"{len(asked.only)} targets, {seconds} s each, {asked.jobs} at a time", flush=True)
    print(f"{'target':20} {'executions':>12} {'edges':>8} {'memory MiB':>11}", flush=True)
    outcomes = []
    with concurrent.futures.ThreadPoolExecutor(asked.jobs) as pool:
        for outcome in pool.map(lambda name: run(name, seconds), asked.only):
            outcomes.append(outcome)
            said = f"{outcome.name:20} {outcome.executions:12,} {outcome.edges:8,} {outcome.memory_mib:11,}"
            why = ", ".join(map(str, outcome.found)) or f"exit code {outcome.code}"
            print(f"{said}  {f'BROKEN: {why}; see {outcome.log}' if outcome.bad else ''}".rstrip(), flush=True)
    print(f"{'together':20} {sum(one.executions for one in outcomes):12,}", flush=True)
    return 1 if any(outcome.bad for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
