"""A short one; `python -m tests.leaders.deaths` in a network namespace is a long one."""

from __future__ import annotations

import pytest

from tests.acceptance.images import MIB
from tests.leaders.deaths import in_a_namespace
from tests.loopfs import needs_root

pytestmark = [needs_root, pytest.mark.timeout(600)]


def test_a_resync_outlives_its_leaders_and_no_byte_is_sent_twice() -> None:
    told = in_a_namespace(mib=240, rate_mbit=80, lease_ttl_s=3, timeout_s=500.0)
    assert sorted(told["leaders_killed"]) == ["c1", "c2"]
    assert told["resyncs"] == 1
    assert told["done_bytes"] == told["total_bytes"] == 240 * MIB
    assert told["resent_bytes"] == 0
    assert told["wire_bytes"] <= told["done_bytes"] * 1.001
