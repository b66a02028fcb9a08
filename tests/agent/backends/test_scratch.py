"""Small pieces written into a stage on XFS: what a sync has covered is there, wherever it went through."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from agent.backends.image_scratch import SMALL_BYTES_MAX
from tests import faults
from tests.agent.backends.replica import BLOCK, SIZE, Replica, noise
from tests.faults import Fault, faulty

KIB = 1 << 10


@pytest.fixture
def kind() -> str:
    return "xfs"


@pytest.fixture
def stage(replica: Replica) -> Any:
    replica.create()
    return replica.open_stage(replica.snapshot().id, "2" * 8 + "-0000-4000-8000-000000000000", SIZE)


def data_of(replica: Replica) -> Path:
    return replica.backend._layout.tree / "data"


def pieces() -> list[tuple[int, bytes]]:
    """Single blocks, neighbours, pieces at both sides of what is small, and such as begin or end within a block."""
    lengths = [BLOCK] * 40 + [SMALL_BYTES_MAX, SMALL_BYTES_MAX + BLOCK, 12 * KIB, 12 * KIB, 100]
    made, at = [], 0
    for number, length in enumerate(lengths):
        made.append((at, noise(100 + number, length)))
        at += length if number % 3 else length + 2 * BLOCK
    made.append((at + 10 * BLOCK + 7, noise(99, BLOCK)))
    random.Random(4).shuffle(made)
    return made


def expected(replica: Replica, written: list[tuple[int, bytes]]) -> bytes:
    content = bytearray(replica.content)
    for offset, data in written:
        content[offset : offset + len(data)] = data
    return bytes(content)


def test_all_pieces_arrive(replica: Replica, stage: Any) -> None:
    written = pieces()
    for number, (offset, data) in enumerate(written):
        stage.write(offset, memoryview(data))
        if number % 11 == 10:
            stage.sync()
    stage.drop_cache()
    assert data_of(replica).read_bytes() == expected(replica, written)


@pytest.mark.parametrize("synced", [False, True])
def test_of_two_writes_to_one_place_the_later_counts(replica: Replica, stage: Any, synced: bool) -> None:
    """Whether small ones, of which one waits, or a large one or a hole over what waits, or one that waits over it."""
    large, at = noise(7, SMALL_BYTES_MAX + BLOCK), 32 * BLOCK
    written = [
        (BLOCK, noise(5, BLOCK)),
        (BLOCK, noise(6, BLOCK)),
        (at + 16 * BLOCK, noise(8, BLOCK)),
        (at, large),
        (at + BLOCK, noise(9, 2 * BLOCK)),
        (at + 2 * BLOCK, noise(10, 2 * BLOCK)),
    ]
    for offset, data in written:
        stage.write(offset, memoryview(data))
        if synced:
            stage.sync()
    stage.write(64 * BLOCK, memoryview(noise(11, BLOCK)))
    stage.zero(60 * BLOCK, 8 * BLOCK)
    stage.sync()
    assert data_of(replica).read_bytes() == expected(replica, [*written, (60 * BLOCK, bytes(8 * BLOCK))])


def test_what_was_not_synced_is_not_there_and_leaves_nothing(replica: Replica, stage: Any) -> None:
    stage.write(BLOCK, memoryview(noise(5, BLOCK)))
    names = sorted(path.name for path in stage.directory.rglob("*"))
    stage.close()
    assert data_of(replica).read_bytes() == replica.content
    assert sorted(path.name for path in stage.directory.rglob("*")) == names


@pytest.mark.parametrize("skip", range(4))
@pytest.mark.skipif(bool(faults.available()), reason=faults.available() or "-")
def test_a_sync_that_fails_has_covered_nothing_and_another_one_does(replica: Replica, stage: Any, skip: int) -> None:
    written = [(number * 3 * BLOCK, noise(number, BLOCK)) for number in range(3)]
    for offset, data in written:
        stage.write(offset, memoryview(data))
    outcome = faulty(lambda _step: stage.sync(), stage.directory, Fault("EIO", skip=skip))
    assert outcome.reason == "IO_ERROR", "the sync of the pieces, and the sharing of each, can fail"
    stage.sync()
    assert data_of(replica).read_bytes() == expected(replica, written)
