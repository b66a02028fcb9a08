"""What an agent keeps in small files, on a disk that fails: each call in turn with EIO and ENOSPC, or killed before it.

What is kept is what was there before or the new thing, never a third; what was not kept is not acted on; the same
process keeps it as soon as the disk is well, and so does one that is started anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import faults, loopfs
from tests.agent.backends.crash import reason_of
from tests.agent.kept_things import KINDS, Kept, NewJournal, NoValue
from tests.faults import Fault, faulty, killed
from tests.loopfs import mounted

pytestmark = pytest.mark.skipif(bool(faults.available()), reason=faults.available() or "-")
REASONS = {"EIO": {"", "IO_ERROR"}, "ENOSPC": {"", "NO_SPACE"}}


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("error", REASONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_every_call(kind: type[Kept], error: str, lasting: bool, tmp_path: Path) -> None:
    kept, number = kind(tmp_path), 0
    while True:
        kept.begin()
        kept.open()
        fault = Fault(error, skip=number, lasting=lasting)
        outcome = faulty(lambda _step: kept.change(), tmp_path, fault)
        assert outcome.reason in REASONS[error], f"{fault}: {outcome}"
        assert kept.seen() in (kept.old, kept.new), f"{fault}: {outcome}"
        assert outcome.reason or kept.seen() == kept.new, f"{fault}: {outcome}"
        if number % 2:
            kept.close()
            kept.open()
            assert kept.seen() in (kept.old, kept.new), f"{fault}: {outcome}"
        kept.change()
        assert kept.seen() == kept.new
        kept.close()
        kept.open()
        assert kept.seen() == kept.new
        kept.close()
        assert not list(tmp_path.rglob(".*.tmp"))
        if not outcome.failed:
            break
        number += 1
    assert number >= kept.calls_min, "it takes more calls than that"


@pytest.mark.parametrize("kind", KINDS)
def test_killed_before_every_change(kind: type[Kept], tmp_path: Path) -> None:
    kept, number, came = kind(tmp_path), 0, False
    while not came:
        kept.begin()
        kept.close()
        came = killed(lambda _step: kept.change(), tmp_path, Fault(skip=number, kill=True)) is not None
        kept.open()
        assert kept.seen() in (kept.old, kept.new)
        assert not came or kept.seen() == kept.new
        kept.change()
        kept.close()
        kept.open()
        assert kept.seen() == kept.new
        kept.close()
        assert not list(tmp_path.rglob(".*.tmp"))
        number += 1
    assert number > kept.calls_min, "it takes more calls than that"


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    """A small file system of its own, to be filled."""
    with mounted("ext4", 16 << 20) as point:
        yield point


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk(kind: type[Kept], disk: Path) -> None:
    """A real one: what does not fit is refused, what was there stays, and with room again it is kept."""
    directory = disk / kind.__name__
    directory.mkdir()
    kept = kind(directory)
    kept.begin()
    kept.open()
    loopfs.fill(disk)
    try:
        reason = reason_of(kept.change)
        assert reason == ("" if kind is NoValue else "NO_SPACE")
        if kind is not NewJournal:
            assert kept.seen() == (kept.old if reason else kept.new)
    finally:
        loopfs.make_room(disk)
    kept.change()
    kept.close()
    kept.open()
    assert kept.seen() == kept.new
    kept.close()
    assert not list(directory.rglob(".*.tmp"))
