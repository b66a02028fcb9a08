"""What only another kernel can show: the tests of tests/vm/inside, run in a machine, each with its own result here.

One machine runs them, once for a session. A function there that has parameters is one result here. All takes several
times as long in there: `make test` runs what is QUICK, `make thorough` (`RESILVER_MACHINE=all`) all of it.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.vm.machine import Outcome, inside, run, why_not

INSIDE = Path(__file__).parent / "inside"
ALL = os.environ.get("RESILVER_MACHINE") == "all"
FILES = ("backend.py", "crash.py", "unlike.py") if ALL else ("backend.py",)
QUICK = frozenset(
    {
        "test_before_anything_is_there",
        "test_records_stand_in_a_volume_of_their_own",
        "test_snapshot_delta_and_first_copy",
    }
)
DEADLINE_S = 7200 if ALL else 1800

pytestmark = pytest.mark.timeout(DEADLINE_S + 120)


def names() -> Iterator[tuple[str, str]]:
    """(file, function) of the tests in there, without running any of it."""
    for name in FILES:
        for node in ast.parse((INSIDE / name).read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and (ALL or node.name in QUICK):
                yield name, node.name


@pytest.fixture(scope="session")
def outcome() -> Outcome:
    why = why_not()
    if why and os.environ.get("CI") == "true":
        pytest.fail(f"in CI the machine must run: {why}")
    if why:
        pytest.skip(why)
    return run(inside(*(f"tests/vm/inside/{file}::{name}" for file, name in names())), DEADLINE_S)


def cases(outcome: Outcome) -> list[ET.Element]:
    report = outcome.files.get("junit.xml")
    if report is None:
        said = f"the machine has no report, status {outcome.status}"
        pytest.fail(f"{said}\n{outcome.output[-8000:]}\n{outcome.console[-4000:]}")
    return list(ET.fromstring(report).iter("testcase"))


@pytest.mark.parametrize(("file", "name"), list(names()))
def test_inside(outcome: Outcome, file: str, name: str) -> None:
    module = f"tests.vm.inside.{file.removesuffix('.py')}"
    found = [
        case
        for case in cases(outcome)
        if case.get("classname") == module and str(case.get("name")).split("[")[0] == name
    ]
    assert found, f"{file}: {name} did not run\n{outcome.output[-8000:]}"
    for case in found:
        for kind in ("failure", "error"):
            for said in case.iter(kind):
                pytest.fail(f"{case.get('name')}: {said.text}")


def test_all_of_it_ran(outcome: Outcome) -> None:
    assert outcome.status == 0, outcome.output[-8000:]
    assert not [case for case in cases(outcome) if case.find("skipped") is not None]
