"""Whether what a stage begins with is what was once taken: somebody may have mounted it, or copied half of it."""

from __future__ import annotations

import os

import pytest

from resilver.errors import ResilverError
from tests.agent.backends.replica import Replica, noise


@pytest.fixture(params=["xfs", "btrfs", "ext4"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def mirrored(replica: Replica, other: Replica) -> tuple[Replica, Replica, str]:
    replica.create()
    base = replica.snapshot().id
    other.receive(replica)
    replica.write(300_000, noise(7, 40_000))
    replica.snapshot()
    return replica, other, base


def reason_of(source: Replica, target: Replica, base: str) -> str:
    try:
        target.receive(source, base)
    except ResilverError as error:
        return error.reason
    return ""


def test_a_base_of_which_the_end_is_missing_is_none(mirrored):
    source, target, base = mirrored
    os.truncate(target.data(base), target.data(base).stat().st_size - 4096)
    before = target.content
    assert reason_of(source, target, base) == "BASE_MISMATCH"
    assert target.content == before


def test_a_base_that_was_written_to_is_none(mirrored):
    """One block, as by mounting the snapshot to look into it: no sample would find it."""
    source, target, base = mirrored
    with target.data(base).open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"replayed")
    before = target.content
    assert reason_of(source, target, base) == "BASE_MISMATCH"
    assert target.content == before


def test_reading_a_base_does_it_no_harm(mirrored):
    source, target, base = mirrored
    target.data(base).read_bytes()
    assert reason_of(source, target, base) == ""
    assert target.content == source.content
