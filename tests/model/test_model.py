"""The protocol as Spin sees it: every state of small models (leadership.pml, volume.pml), and proof that they bite.

A model is searched whole, without approximation: each test asserts that nothing was cut short. What a model never
comes to it cannot break, so it is asked for a few states that it must come to. And with a rule taken away, each time
one, the search must end at the guarantee that the rule is for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

HERE: Final = Path(__file__).parent
MEMORY_MAX_MIB: Final = 1024
DEPTH_MAX: Final = 100_000
TIMEOUT_S: Final = 600.0
MISSING: Final = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING) and not os.environ.get("CI"),
    reason=f"not installed: {', '.join(MISSING)} (Debian: spin, gcc, libc6-dev)",
)


@dataclass(frozen=True)
class Found:
    """What a search came to: the first assertion that does not hold, or none."""

    states: int
    errors: int
    violated: str
    text: str

    @property
    def complete(self) -> bool:
        """Nothing was cut short: not by an error, by the depth, by memory."""
        cut_short = ("Search not completed", "max search depth too small", "out of memory", "bit-state", "hash-compact")
        return "Full statespace search" in self.text and not any(said in self.text for said in cut_short)


def run(directory: Path, *command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, stdin=subprocess.DEVNULL,
        cwd=directory, env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def search(directory: Path, model: str, *defined: str, whole: bool) -> Found:
    """Searches a model with some names defined (`NAME` or `NAME value`). `whole`: it takes long, and is worth a better
    compiler.
    """
    # Spin has a shell run the preprocessor, so nothing but a file's name is given to it.
    text = [*(f"#define {each}" for each in defined), f'#include "{HERE / model}"', ""]
    (directory / "model.pml").write_text("\n".join(text), "utf-8")
    run(directory, "spin", "-a", "model.pml")
    # One process only, so partial-order reduction would save nothing.
    switches = ("-DSAFETY", "-DNOREDUCE", f"-DMEMLIM={MEMORY_MAX_MIB}", "-w")
    run(directory, "gcc", "-O1" if whole else "-O0", *switches, "-o", "pan", "pan.c")
    said = run(directory, "./pan", f"-m{DEPTH_MAX}", "-w22", "-n")
    states, errors = re.search(r"(\d[\d.e+]*) states, stored", said), re.search(r"errors: (\d+)", said)
    assert states is not None, said
    assert errors is not None, said
    violated = re.search(r"assertion violated (.*) \(at depth", said)
    return Found(int(float(states[1])), int(errors[1]), violated[1] if violated else "", said)


STANDS_STILL: Final = "CLOCK_STANDS_STILL"
THREE_EPOCHS: Final = ("EPOCHS 3", "IDS 3", "RESYNCS 1")
TWO_RESYNCS: Final = ("EPOCHS 2", "IDS 4", "RESYNCS 2")
SMALL: Final = ("EPOCHS 2", "IDS 4", "RESYNCS 1")
WHOLE: Final = [
    pytest.param("leadership.pml", ("EPOCHS 2",), id="leadership"),
    pytest.param("leadership.pml", ("EPOCHS 1", STANDS_STILL), id="leadership-clock-stands-still"),
    pytest.param("volume.pml", THREE_EPOCHS, id="volume-three-epochs"),
    pytest.param("volume.pml", TWO_RESYNCS, id="volume-two-resyncs"),
    pytest.param("leadership.pml", ("EPOCHS 2", STANDS_STILL), id="leadership-deeper"),
    pytest.param("volume.pml", ("EPOCHS 3", "IDS 4", "RESYNCS 1"), id="volume-snapshots-deeper"),
    pytest.param("volume.pml", ("EPOCHS 3", "IDS 3", "RESYNCS 2"), id="volume-resyncs-deeper"),
]


@pytest.mark.parametrize(("model", "defined"), WHOLE)
def test_every_state_keeps_the_guarantees(tmp_path: Path, model: str, defined: tuple[str, ...]) -> None:
    found = search(tmp_path, model, *defined, whole=True)
    assert found.errors == 0, found.text
    assert found.complete, found.text
    assert found.states > 100_000, found.text


# A state that must come to be, and how small the model is in which it does.
REACHED: Final = {
    "two reigns of one term": ("leadership.pml", "reigns == 3 && term[2] == term[3]", ()),
    "an order that is given after its reign": (
        "leadership.pml",
        "doing[0] == ORDER && !leading[0] && leading[1] && reign[1] == holder && sent[reign[1]] != 0",
        (),
    ),
    "the grant goes on to the other": (
        "leadership.pml",
        "forgot && grant[1] == 2 && record[0] == 2 && reigns == 3",
        (),
    ),
    "own data is kept and the third epoch's CP is here": (
        "volume.pml",
        "epoch_of[newest] == 3 && (kept[0] != 0 && tip[0] == newest || kept[1] != 0 && tip[1] == newest)",
        THREE_EPOCHS,
    ),
    "a run outlives its epoch": (
        "volume.pml",
        "running[2] != 0 && order_epoch[running[2]] < epoch && epoch_of[newest] == epoch",
        SMALL,
    ),
    "a CP that was acknowledged is given up": (
        "volume.pml",
        "(acknowledged & 4) == 0 && holder[2] != NOBODY && epoch_of[2] == 1 && newest == 3 && !in(2, 3) && tip[2] == 2",
        SMALL,
    ),
}


@pytest.mark.parametrize("name", REACHED)
def test_it_comes_to(tmp_path: Path, name: str) -> None:
    model, condition, defined = REACHED[name]
    found = search(tmp_path, model, f"NEVER {condition}", *defined, whole=False)
    assert found.errors == 1, found.text
    assert found.violated == "NEVER_REACHED", found.text


# The rule that is taken away, in which size of the model, and the guarantees that may be the first to break.
TAKEN_AWAY: Final = {
    ("leadership.pml", "TERM_NOT_CHECKED", ()): {"NO_DEPOSED_COORDINATOR"},
    ("leadership.pml", "SAME_TERM_OF_ANOTHER", ()): {"NO_DEPOSED_COORDINATOR"},
    ("leadership.pml", "TERM_NOT_KEPT", ()): {"NO_DEPOSED_COORDINATOR"},
    ("leadership.pml", "NO_STEP_DOWN", ()): {"ONE_LEADER"},
    ("leadership.pml", "CLOCK_STANDS_STILL TERM_NOT_CHECKED", ()): {"NO_DEPOSED_COORDINATOR"},
    ("leadership.pml", "COMMITS_UNGUARDED", ()): {"NO_DEPOSED_COORDINATOR"},
    ("leadership.pml", "SAME_EPOCH_AGAIN", ()): {"ONLY_UP", "ONE_GRANT"},
    ("leadership.pml", "ACTS_BEFORE_IT_STORES", ()): {"ONE_GRANT"},
    ("leadership.pml", "LOWER_EPOCH_OBEYED", ()): {"NO_LOWER_EPOCH"},
    ("leadership.pml", "GRANT_OUTLIVES_ITS_EPOCH", ()): {"ONE_GRANT"},
    ("leadership.pml", "RECOVERING_FORGOTTEN", ()): {"ONLY_UP"},
    ("volume.pml", "LOWER_EPOCH_OBEYED", SMALL): {"NO_LOWER_EPOCH"},
    ("volume.pml", "GRANT_OUTLIVES_ITS_EPOCH", SMALL): {"ONE_GRANT"},
    ("volume.pml", "ANYBODY_ACKNOWLEDGES", SMALL): {"ACKNOWLEDGED_UNDER_GRANT"},
    ("volume.pml", "SEQUENCES_DECIDE", THREE_EPOCHS): {"NOTHING_ACKNOWLEDGED_LOST"},
    ("volume.pml", "NEWEST_PLAYS_NO_PART", THREE_EPOCHS): {"NOTHING_ACKNOWLEDGED_LOST"},
    ("volume.pml", "PRIMARY_AWAY_IS_NO_LOSS", SMALL): {"CERTAIN_OR_REFUSED"},
    ("volume.pml", "LOSSES_NOT_COUNTED", SMALL): {"CERTAIN_OR_REFUSED", "NOTHING_ACKNOWLEDGED_LOST"},
    ("volume.pml", "OPENING_NOT_AWAITED", SMALL): {"NOT_BEFORE_OPENING"},
    ("volume.pml", "EXPECTED_TIP_NOT_COMPARED", SMALL): {"COMPARE_AND_SET"},
    ("volume.pml", "NOTHING_PRESERVED", SMALL): {"KEPT"},
}


@pytest.mark.parametrize(
    ("model", "rules", "defined"), TAKEN_AWAY, ids=lambda part: part if isinstance(part, str) else ""
)
def test_without_a_rule_a_guarantee_breaks(tmp_path: Path, model: str, rules: str, defined: tuple[str, ...]) -> None:
    found = search(tmp_path, model, *rules.split(), *defined, whole=False)
    assert found.errors == 1, found.text
    broken = found.violated.lstrip("(").split("|")[0]
    assert broken in TAKEN_AWAY[model, rules, defined], found.violated
