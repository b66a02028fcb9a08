"""One target under atheris, in a process of its own: `python -m fuzz.one TARGET CORPUS ARTIFACTS SECONDS`.

Everything below `agent`, `coordinator` and `resilver` is instrumented while it is imported, so it is imported here. The
corpus of the project is read and not written: what is found to reach more goes to the first directory. An input that
breaks something, takes more than ten seconds or more than two GiB is written to ARTIFACTS.
"""

from __future__ import annotations

import random
import sys

import atheris
import structlog

INPUT_S_MAX = 10
MEMORY_MIB_MAX = 2048

# The errors that nobody logs here are what the targets look at.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
with atheris.instrument_imports(include=["agent", "coordinator", "resilver"]):
    from fuzz.all_targets import ALL
from fuzz.mutate import mutated
from fuzz.target import INPUT_BYTES_MAX, Target


def main(name: str, corpus: str, artifacts: str, seconds: str) -> None:
    target = ALL[name]
    seeds = target.seeds()

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        """Half by libFuzzer, which knows what was compared with what; half by what knows JSON."""
        chance = random.Random(seed)
        if chance.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        return mutated(target, data, seeds, chance)[:max_size]

    atheris.Setup(_words(target, corpus, artifacts, seconds), target.run, custom_mutator=mutate)
    atheris.Fuzz()  # ends the process


def _words(target: Target, corpus: str, artifacts: str, seconds: str) -> list[str]:
    return [
        target.name,
        corpus,
        str(target.corpus),
        f"-max_total_time={seconds}",
        f"-timeout={INPUT_S_MAX}",
        f"-rss_limit_mb={MEMORY_MIB_MAX}",
        f"-max_len={INPUT_BYTES_MAX}",
        f"-artifact_prefix={artifacts}/{target.name}-",
        "-print_final_stats=1",
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
