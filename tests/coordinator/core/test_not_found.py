"""What is not there is named in the error as data, so that a client need not read the sentence."""

from __future__ import annotations

import pytest

from coordinator.core import events as e
from coordinator.core.requests import (
    CancelRequest,
    DropRequest,
    ElectRequest,
    ExportRequest,
    PlanRequest,
    RemoveRequest,
    ResyncRequest,
)
from resilver.errors import NotFound
from tests.coordinator.core.scenario import Scenario

KNOWN = "connect a vm1\nconnect b vm1\nreport a vm1 modified\nreport b vm1 empty\n"
NOTHING = e.Loaded({}, {}, {}, {})


@pytest.mark.parametrize(
    ("request_", "kind", "name"),
    [
        (ElectRequest("vm2"), "volume", "vm2"),
        (PlanRequest(("vm2",)), "volume", "vm2"),
        (ElectRequest("vm1", choose="d"), "node", "d"),
        (ResyncRequest(("vm1",), nodes=frozenset({"d"})), "node", "d"),
        (RemoveRequest("vm1", "d"), "node", "d"),
        (CancelRequest("r9"), "resync", "r9"),
        (DropRequest("s9"), "snapshot", "s9"),
        (ExportRequest("s9", "a", "/tmp/out"), "snapshot", "s9"),
    ],
)
def test_an_unknown_name_stands_in_the_error(request_, kind, name):
    scenario = Scenario(NOTHING)
    scenario.run(KNOWN)
    actions = scenario.engine.step(e.Requested("q", request_), scenario.now_ms)
    (answer,) = [action.answer for action in actions if isinstance(action, e.Answer)]
    assert isinstance(answer, NotFound)
    assert answer.reason == f"{kind.upper()}_NOT_FOUND"
    assert answer.metadata[kind] == name
