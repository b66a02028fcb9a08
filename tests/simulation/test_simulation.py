"""The real core and the agent's real rules, in a cluster that fails in every way: nothing that is promised breaks.

A seed that fails is one line that replays it. That the simulation would notice is shown by taking rules away, one at a
time: each must break within a bounded number of seeds, and it must be a guarantee that breaks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.simulation.mutations import MUTATIONS, applied, harsh
from tests.simulation.simulate import simulate

SEEDS: Final = 1000
MUTANT_SEEDS_MAX: Final = 400
RUN_TIMEOUT_S: Final = 580
SAME_SEEDS: Final = 15
ROOT: Final = Path(__file__).parents[2]


@pytest.mark.timeout(RUN_TIMEOUT_S + 10)  # 40 s on a quiet machine; hangs are what it is for
def test_every_guarantee_holds_at_every_seed(tmp_path: Path) -> None:
    ran = run("--seeds", str(SEEDS), "--jobs", "2", "--directory", str(tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_rule_that_is_taken_away_is_missed(name: str) -> None:
    with applied(name):
        for seed in range(MUTANT_SEEDS_MAX):
            result = simulate(seed, None, harsh(name))
            if result.broken:
                assert result.name in MUTATIONS[name].breaks, result.broken
                return
    pytest.fail(f"{MUTANT_SEEDS_MAX} seeds, and nobody missed it")


def test_a_mutation_leaves_nothing_behind() -> None:
    kept = [place.__dict__[name] for one in MUTATIONS.values() for place, name, _ in one.places()]
    for name in MUTATIONS:
        with applied(name):
            pass
    assert kept == [place.__dict__[name] for one in MUTATIONS.values() for place, name, _ in one.places()]


def test_a_seed_is_the_same_story_whatever_the_order_of_sets(tmp_path: Path) -> None:
    """Also of the core: nothing in it may be decided by how a set happens to be ordered."""
    told = []
    for hashing in ("1", "2"):
        script = "import sys; from tests.simulation.simulate import stories; print(stories(range(1, int(sys.argv[1]))))"
        command = [sys.executable, "-c", script, str(SAME_SEEDS + 1)]
        environment = {**os.environ, "PYTHONHASHSEED": hashing}
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60)
        told.append(ran.stdout.splitlines())
    assert len(told[0]) == SAME_SEEDS
    assert told[0] == told[1]


def test_a_failing_seed_is_one_line_that_replays_it(tmp_path: Path) -> None:
    with_it = ("--mutation", "lock not released", "--directory", str(tmp_path))
    ran = run("--seeds", "1", *with_it)
    assert ran.returncode == 1
    line = ran.stdout.splitlines()[0]
    assert line.startswith(".venv/bin/python -m tests.simulation 1 --mutation 'lock not released'   # ")
    assert run("1", *with_it).stdout.splitlines()[0] in line
    assert (tmp_path / "simulation-1.txt").read_text().splitlines()[-1] in line


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, as somebody would type it."""
    command = [sys.executable, "-m", "tests.simulation", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=RUN_TIMEOUT_S)
