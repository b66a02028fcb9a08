"""The table of steps and faults is the code's: no step without a line, no line without a step, no test that is not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from agent.backends import btrfs, image, lvm, zfs
from tests.agent.backends.registry import KINDS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "reference" / "steps.md").read_text()
BACKENDS = {"image": image.STEPS, "btrfs": btrfs.STEPS, "zfs": zfs.STEPS, "lvm-thin": lvm.STEPS}


def rows(heading: str) -> list[list[str]]:
    """The cells of all tables below a heading, without their heads."""
    part = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] not in {"step", "operation"}]


STEPS = {row[0].strip("`"): row for row in rows("The steps")}


def called() -> set[str]:
    """Every name that the agent's code calls a step by, as it stands in its text."""
    found = set()
    for path in (ROOT / "agent").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {"step", "_step"}:
                found |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return found


def test_every_step_has_its_line() -> None:
    assert len(STEPS) == len(rows("The steps")), "a step has two lines"
    named = {name for names in BACKENDS.values() for name in names}
    assert set(STEPS) == named
    found = called()
    assert len(found) > 40
    assert found <= named, "a step that no backend names is killed at by no test"


@pytest.mark.parametrize("at", range(len(BACKENDS)), ids=list(BACKENDS))
def test_the_lines_say_which_backend_takes_the_step(at: int) -> None:
    taken = {name for name, row in STEPS.items() if row[2 + at] == "x"}
    assert taken == set(list(BACKENDS.values())[at])


@pytest.mark.parametrize("kind", ["image-xfs", "btrfs"])
@pytest.mark.parametrize("what", ["snapshot", "commit"])
def test_the_lines_say_from_which_step_on_the_new_state_counts(kind: str, what: str) -> None:
    """As the tests of kills and faults hold it."""
    tested = next(one for one in KINDS if one.name == kind)
    names = [step for step in tested.steps if step.startswith(f"{what}.")]
    deciding = tested.decides[what]
    first = names.index(deciding if isinstance(deciding, str) else deciding[0])
    for number, name in enumerate(names):
        assert STEPS[name][-1].startswith("**new**" if number >= first else "old"), name


def test_every_test_that_is_named_is_there() -> None:
    found = 0
    for row in rows("Faults and their tests"):
        assert len(row) == 6, row
        for path, name in re.findall(r"`([^`]+)::(\w+)`", "|".join(row[2:])):
            tree = ast.parse((ROOT / "tests" / "agent" / path).resolve().read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (path, name)
            found += 1
        for cell in row[2:]:
            assert cell == "-" or "::" in cell, cell
    assert found > 30
