"""Golden scenarios: each file tells what happened and, indented, what the engine did. `--rewrite` accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.coordinator.core.scenario import Scenario

FILES = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_scenario(path: Path, pytestconfig: pytest.Config) -> None:
    text = path.read_text()
    found = Scenario.play(text)
    if pytestconfig.getoption("--rewrite"):
        path.write_text(found)
    assert found == text


def test_the_scenarios_are_there() -> None:
    assert len(FILES) >= 8
