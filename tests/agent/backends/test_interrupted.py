"""A commit that fails in the middle of a running agent, and one whose live copy is replaced under its hands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.backends import image_commit
from agent.disk import ioctl
from resilver.errors import ResilverError
from resilver.volume import LiveState
from tests.agent.backends.replica import Replica, noise


@pytest.fixture(params=["xfs", "ext4"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("step", ["commit.described", "commit.intended", "commit.snapshot"])
def test_a_stage_is_not_taken_from_under_a_commit_that_failed(stale, step):
    """What the run does after an error of its own disk: it discards the stage, and the next run begins anew."""
    source, target, base = stale
    before = target.content

    def failing(name: str) -> None:
        if name == step:
            raise OSError(5, "Input/output error")

    broken = Replica(target.directory, step=failing)
    with pytest.raises(ResilverError) as caught:
        broken.receive(source, base)
    assert caught.value.reason == "IO_ERROR"
    broken.backend.discard_stage()
    again = Replica(target.directory)
    again.backend.recover()
    assert again.content == before
    assert again.lineage.tip_id == base
    assert again.backend.examine().preserved == ()
    again.receive(source, base)
    assert again.content == source.content
    assert again.backend.examine().live.state is LiveState.UNMODIFIED


def test_a_live_copy_that_is_replaced_twice_during_the_exchange_is_not_lost(stale, monkeypatch):
    """The user's rename falls between the exchange and its taking back: neither of his two images is let go."""
    source, target, base = stale
    images = [noise(number, 100_000) for number in (21, 22)]
    calls = []

    def replacing(one: Path, other: Path) -> None:
        if not calls:
            user_renames(target.path, images[0])
        calls.append(1)
        real(one, other)
        if len(calls) == 1:
            user_renames(target.path, images[1])

    real = ioctl.exchange
    monkeypatch.setattr(image_commit.ioctl, "exchange", replacing)
    with pytest.raises(ResilverError) as caught:
        target.receive(source, base)
    assert caught.value.reason == "TARGET_CHANGED"
    kept = [Path(copy.path).read_bytes() for copy in target.backend.examine().preserved]
    assert sorted([target.content, *kept]) == sorted(images)
    assert target.lineage.tip_id == base


def user_renames(path: Path, content: bytes) -> None:
    made = path.with_name("made-by-the-user")
    made.write_bytes(content)
    os.replace(made, path)  # noqa: PTH105  # what a user's program does
