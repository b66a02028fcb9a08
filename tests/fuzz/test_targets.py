"""Every fuzz target over its corpus and some changes to it, by a fixed seed; `make fuzz` does it guided by coverage."""

from __future__ import annotations

import random
import resource
import time

import pytest

from fuzz.all_targets import ALL
from fuzz.mutate import mutated
from fuzz.target import CORPORA, sweep

CHANGES = 150
CPU_MAX_S = 5.0
"""For one input; they take a millisecond."""
MEMORY_KIB_MAX = 1 << 20
"""For all that is given to all of them."""


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture(autouse=True, scope="module")
def _clean():
    before = peak_kib()
    yield
    sweep()
    assert peak_kib() - before < MEMORY_KIB_MAX, "more than a GiB"


@pytest.mark.parametrize("name", ALL)
def test_a_target_takes_anything(name: str) -> None:
    target = ALL[name]
    seeds = target.seeds()
    assert seeds, f"{target.corpus} is empty"
    for data in seeds:
        target.run(data)
    chance = random.Random(name)
    for _ in range(CHANGES):
        data = mutated(target, chance.choice(seeds), seeds, chance)
        begun = time.process_time()
        try:
            target.run(data)
        except BaseException as error:
            error.add_note(f"the input: {data!r}")
            raise
        assert time.process_time() - begun < CPU_MAX_S, f"an input that takes long: {data!r}"


def test_every_corpus_has_a_target() -> None:
    assert {path.name for path in CORPORA.iterdir()} == set(ALL)
