"""The page of metrics and the daemons agree: names, types and labels; and the sample rules name what there is."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import Counter, Info
from prometheus_client.metrics import MetricWrapperBase

import agent.metrics
import coordinator.counters
from coordinator.front import Front
from coordinator.metrics import ClusterCollector
from resilver import rpc, telemetry
from tests.coordinator.core.scenario import Scenario
from tests.coordinator.core.scenario import given as kept

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reference" / "metrics.md").read_text()
RULES = (ROOT / "deploy" / "alerts.yml").read_text()

Described = set[tuple[str, str, tuple[str, ...]]]


def described(heading: str) -> Described:
    """The rows of one table of the page."""
    section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "| `" in line[:4]]
    return {(row[0].strip("`"), row[1], tuple(re.findall(r"`(\w+)`", row[2]))) for row in rows}


def defined(*modules: Any) -> Described:
    """What modules count with, as it is served."""
    found = set()
    for metric in {
        value for module in modules for value in vars(module).values() if isinstance(value, MetricWrapperBase)
    }:
        suffix = {Counter: "_total", Info: "_info"}.get(type(metric), "")
        labels = ("version",) if isinstance(metric, Info) else tuple(metric._labelnames)
        found.add((metric._name + suffix, type(metric).__name__.lower(), labels))
    return found


def read_off_a_replica() -> Described:
    """What an agent counts for each volume."""
    families = agent.metrics.Replicas().describe()
    return {
        (family.name + ("_total" if family.type == "counter" else ""), family.type, tuple(family._labelnames))
        for family in families
    }


def read_off_an_engine() -> Described:
    """The figures of the cluster, as a leader that knows a volume serves them."""
    from coordinator.core.events import Loaded

    loaded = Loaded(dict([kept(["vm1", "3", "E3", "a", "a,b", "3-2:s2", "s1"])]), {}, {}, {})
    front = Front("demo", "c1", "c1:1", True, "0", store=None)  # type: ignore[arg-type]  # nothing here asks it
    front.reign = SimpleNamespace(engine=Scenario(loaded).engine)  # type: ignore[assignment]  # the engine is the real one
    loop = asyncio.new_event_loop()
    families = list(ClusterCollector(front, loop)._read())
    loop.close()
    return {(family.name, family.type, tuple(family._labelnames)) for family in families}


def test_the_page_has_what_a_coordinator_serves() -> None:
    assert described("Coordinator") == read_off_an_engine() | defined(coordinator.counters) | defined(telemetry)


def test_the_page_has_what_an_agent_serves() -> None:
    assert described("Agent") == read_off_a_replica() | defined(agent.metrics) | defined(telemetry)


def test_the_page_has_what_both_serve() -> None:
    assert described("Both") == defined(rpc)


NAMES = {name for heading in ("Coordinator", "Agent", "Both") for name, _, _ in described(heading)}
EXPRESSIONS = re.findall(r"^ +expr: (.+)$", RULES, re.MULTILINE)


def test_there_are_rules() -> None:
    assert len(EXPRESSIONS) == RULES.count("- alert: ") == RULES.count("summary: ") >= 10


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_rule_names_what_there_is(expression: str) -> None:
    named = {name.removesuffix("_bucket") for name in re.findall(r"\bresilver_\w+", expression)}
    assert named
    assert named <= NAMES
    labels = {
        label
        for heading in ("Coordinator", "Agent")
        for name, _, own in described(heading)
        if name in named
        for label in own
    }
    asked = {label for block in re.findall(r"\{(.*?)\}", expression) for label in re.findall(r"(\w+)=", block)}
    assert asked <= labels
    assert expression.count("(") == expression.count(")")
