"""What only another kernel can show, run in machines of its own, with a result here for each file of tests in there.

Everything takes several times as long in there: `make test` runs what is QUICK, `make thorough`
(`RESILVER_MACHINE=all`) all of it, the conformance suite on thin volumes among it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.vm.machine import ROOT, Outcome, inside, run, why_not

INSIDE = "tests/vm/inside"
OF_OTHERS = {"test_streams", "test_trees", "test_disk_faults"}
"""What the conformance suite asks of streams and trees, and of file systems whose calls can be made to fail."""


@dataclass(frozen=True)
class Machine:
    """The files that share one, or a few tests of theirs by name, and what pytest is told besides."""

    files: tuple[str, ...]
    names: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def command(self) -> str:
        chosen = [f"{file}::{name}" for file in self.files for name in self.names] or self.files
        return inside(*map(shlex.quote, (*self.options, *chosen)))


QUICK: Mapping[str, Machine] = {
    "thin": Machine(
        (f"{INSIDE}/backend.py",),
        (
            "test_before_anything_is_there",
            "test_records_stand_in_a_volume_of_their_own",
            "test_snapshot_delta_and_first_copy",
            "test_in_use[open]",
            "test_a_leaked_metadata_snapshot",
        ),
    )
}
ALL: Mapping[str, Machine] = {
    "thin": Machine(tuple(f"{INSIDE}/{name}.py" for name in ("backend", "by_hand", "crash", "unlike"))),
    "files": Machine((f"{INSIDE}/files.py",)),
    "conformance": Machine(
        tuple(
            str(path.relative_to(ROOT))
            for path in sorted(Path(ROOT, "tests/agent/backends/conformance").glob("test_*.py"))
            if path.stem not in OF_OTHERS
        ),
        options=("-p", "tests.vm.inside.only_lvm"),
    ),
}
THOROUGH = os.environ.get("RESILVER_MACHINE") == "all"
MACHINES = ALL if THOROUGH else QUICK
DEADLINE_S = 4 * 3600 if THOROUGH else 1800

pytestmark = pytest.mark.timeout(DEADLINE_S + 120)


@cache
def outcome(machine: str) -> Outcome:
    """What a machine ended with, which runs once for all that is asked of it."""
    return run(MACHINES[machine].command(), DEADLINE_S)


def cases(machine: str) -> Iterator[tuple[str, ET.Element]]:
    """(file, what pytest says of a test of it) of all that ran in a machine."""
    ended = outcome(machine)
    report = ended.files.get("junit.xml")
    if report is None:
        said = f"the machine has no report, status {ended.status}"
        pytest.fail(f"{said}\n{ended.output[-8000:]}\n{ended.console[-4000:]}")
    for case in ET.fromstring(report).iter("testcase"):
        yield f"{str(case.get('classname')).replace('.', '/')}.py", case


@pytest.fixture(autouse=True)
def can_run() -> None:
    why = why_not()
    if why and os.environ.get("CI") == "true":
        pytest.fail(f"in CI the machine must run: {why}")
    if why:
        pytest.skip(why)


@pytest.mark.parametrize(("machine", "file"), [(name, file) for name, one in MACHINES.items() for file in one.files])
def test_inside(machine: str, file: str) -> None:
    ran = [case for place, case in cases(machine) if place == file]
    failed = [
        f"{case.get('name')}: {said.text}" for case in ran for kind in ("failure", "error") for said in case.iter(kind)
    ]
    assert not failed, "\n\n".join(failed)
    passed = {case.get("name") for case in ran if case.find("skipped") is None}
    assert passed >= set(MACHINES[machine].names)
    assert passed, f"nothing of it ran\n{outcome(machine).output[-8000:]}"


@pytest.mark.parametrize("machine", MACHINES)
def test_all_of_it_ran(machine: str) -> None:
    assert outcome(machine).status == 0, outcome(machine).output[-8000:]
    assert not [case.get("name") for _file, case in cases(machine) if case.find("skipped") is not None]
