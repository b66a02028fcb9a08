"""A short campaign; `python -m tests.campaign --kills 200` is a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaign.kills import campaign
from tests.loopfs import mounted, needs_root

pytestmark = [needs_root, pytest.mark.timeout(600)]


def test_whatever_is_killed_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    with mounted("xfs", 4 << 30) as disk, campaign(tmp_path, disk, seed=1) as one:
        story = one.run(4, give_up_every=3)
    assert story.kills.total() == 5
    assert story.given_up == ["a"]
    assert story.preserved
