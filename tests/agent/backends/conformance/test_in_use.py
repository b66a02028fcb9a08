"""While anybody has the live copy in use nothing is called unmodified and nothing is replaced; who it is, is told."""

from __future__ import annotations

import pytest

from resilver.errors import Refused
from resilver.volume import LiveState
from tests.agent.backends.conformance.cases import Case


def test_in_use(place, use):
    case = Case(place, "stale")
    target = case.target
    traces = target.traces()
    with use.hold(target) as name:
        found = target.backend.examine()
        assert found.live.in_use
        assert any(name in user for user in found.live.in_use_by), found.live.in_use_by
        assert found.live.state is (LiveState.MODIFIED if use.writes else LiveState.UNKNOWN)
        with pytest.raises(Refused) as refused:
            case.commit()
        assert refused.value.reason == "IN_USE"
        assert name in refused.value.message
        assert target.lineage == case.before
        assert target.preserved == ()
    assert target.traces() == traces, "nothing has changed, and the stage is kept"
    assert target.contents() == case.old
    assert case.commit() == ()
    case.check_done()


def test_a_source_in_use_is_sent(place, use):
    """Whoever uses the source's live copy is in nobody's way."""
    case = Case(place, "stale")
    base = case.source.tip
    case.source.edit(70)
    tip = case.source.snapshot()
    case.commit()
    with use.hold(case.source):
        case.target.receive(case.source, base.id)
    assert case.target.contents() == case.source.contents(tip.id)


def test_in_use_while_it_recovers(place, use):
    """An agent that starts while somebody has the live copy open looks, and changes nothing."""
    case = Case(place, "written")
    with use.hold(case.target):
        again = case.target.again()
        again.backend.recover()
        assert again.lineage == case.before
    assert case.target.contents() == case.old
    case.commit()
    case.check_done()
