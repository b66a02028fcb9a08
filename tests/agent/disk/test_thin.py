"""What the tools of a thin pool print, and what is made of it; what they do is tested in the machine (tests/vm)."""

from __future__ import annotations

import itertools
import random
import shlex
import time
from xml.parsers import expat

import numpy as np
import pytest

from agent.backends.lvm_delta import to_map
from agent.backends.lvm_space import needed
from agent.delta import DeltaMap, DeltaRange
from agent.disk import lvm, thin
from agent.disk.thin import DIFFERENT, LEFT_ONLY, RIGHT_ONLY, SAME, Chunks, parse, parse_status
from resilver.errors import Damaged, Exhausted

CHUNK = 64 << 10
HEAD = (
    '<superblock uuid="" time="1" transaction="2" data_block_size="128" nr_data_blocks="0">\n<diff left="2" right="1">'
)


def read(body: str, row_of=thin._delta_row) -> Chunks:
    return parse([body.encode()], row_of, "thin_delta")


def test_a_delta_is_read() -> None:
    found = read(
        f'{HEAD}<different begin="0" length="1"/><same begin="1" length="3"/><left_only begin="9" length="2"/>'
        '<right_only begin="20" length="63" of="another version"/></diff></superblock>'
    )
    assert found.chunk_bytes == CHUNK
    assert list(zip(found.begins, found.lengths, found.kinds, strict=True)) == [
        (0, 1, DIFFERENT),
        (1, 3, SAME),
        (9, 2, LEFT_ONLY),
        (20, 63, RIGHT_ONLY),
    ]


def test_a_dump_is_read() -> None:
    found = read(
        '<superblock uuid="" time="0" transaction="1" flags="0" version="2" data_block_size="128" nr_data_blocks="0">'
        '<device dev_id="1" mapped_blocks="5" transaction="0" creation_time="0" snap_time="0">'
        '<range_mapping origin_begin="0" data_begin="68" length="4" time="0"/>'
        '<single_mapping origin_block="9" data_block="1" time="0"/></device></superblock>',
        thin._dump_row,
    )
    assert list(zip(found.begins, found.lengths, strict=True)) == [(0, 4), (9, 1)]


@pytest.mark.parametrize(
    "body",
    [
        f'{HEAD}<changed begin="0" length="1"/></diff></superblock>',
        f'{HEAD}<different begin="0"/></diff></superblock>',
        f'{HEAD}<different begin="x" length="1"/></diff></superblock>',
        f'{HEAD}<different begin="5" length="2"/><same begin="6" length="1"/></diff></superblock>',
        f'{HEAD}<different begin="5" length="0"/></diff></superblock>',
        '<superblock><diff left="1" right="2"></diff></superblock>',
    ],
)
def test_what_is_not_understood_is_an_error(body: str) -> None:
    with pytest.raises(Damaged, match="thin_delta"):
        read(body)


@pytest.mark.parametrize("body", ["", HEAD, f'{HEAD}<different begin="0" length="1"/></diff>', "no XML at all"])
def test_what_is_cut_off_is_an_error(body: str) -> None:
    with pytest.raises(expat.ExpatError):
        read(body)


def test_stretches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "RANGES_MAX", 2)
    rows = "".join(f'<same begin="{at}" length="1"/>' for at in range(3))
    with pytest.raises(Exhausted):
        read(f"{HEAD}{rows}</diff></superblock>")


def test_the_status_of_a_pool() -> None:
    found = parse_status("thin-pool", "2 216/2048 177/8192 75 rw discard_passdown queue_if_no_space - 512 ", "vg/pool")
    assert (found.metadata_used, found.metadata_total, found.data_used, found.data_total) == (216, 2048, 177, 8192)
    assert (found.held_root, found.mode, found.queues_when_full, found.needs_check) == (75, "rw", True, False)
    words = "2 216/2048 8192/8192 - out_of_data_space discard_passdown error_if_no_space needs_check 512"
    found = parse_status("thin-pool", words, "vg/pool")
    assert (found.held_root, found.mode, found.queues_when_full, found.needs_check) == (
        0,
        "out_of_data_space",
        False,
        True,
    )
    for kind, words in (("thin-pool", "Fail"), ("linear", ""), ("thin-pool", "1 a/b c/d - rw")):
        with pytest.raises(Damaged, match="vg/pool"):
            parse_status(kind, words, "vg/pool")


def test_a_map_is_what_makes_the_target_of_the_base() -> None:
    """By brute force: two volumes as the pool maps them, of any sizes, with places left over beyond their ends."""
    chance = random.Random(7)
    for _ in range(300):
        ends = [chance.randint(1, 24) for _ in range(2)]
        places = [[chance.choice([0, 0, 1, 2, 3]) for _ in range(26)] for _ in range(2)]
        left, right = places
        kinds = [
            (at, SAME if one == other else DIFFERENT if one and other else LEFT_ONLY if one else RIGHT_ONLY)
            for at, (one, other) in enumerate(zip(left, right, strict=True))
            if one or other
        ]
        chunks = Chunks(
            CHUNK,
            np.array([at for at, _kind in kinds], np.int64),
            np.ones(len(kinds), np.int64),
            np.array([kind for _at, kind in kinds], np.int8),
        )
        made = left[: ends[0]] + [0] * 26
        delta = to_map(chunks, ends[0] * CHUNK, ends[1] * CHUNK)
        for row in delta:
            for at in range(row.offset // CHUNK, (row.offset + row.length) // CHUNK):
                made[at] = 0 if row.zero else right[at]
        assert made[: ends[1]] == right[: ends[1]]
        assert all(one.offset + one.length < other.offset or one.zero != other.zero for one, other in pairs(delta))


def pairs(delta: DeltaMap) -> list[tuple[DeltaRange, DeltaRange]]:
    rows = list(delta)
    return list(itertools.pairwise(rows))


def test_an_end_within_a_chunk() -> None:
    chunks = Chunks(4 * CHUNK, np.array([0]), np.array([2]), np.array([SAME], np.int8))
    assert [tuple(row) for row in to_map(chunks, 5 * CHUNK, 7 * CHUNK)] == [(5 * CHUNK, 2 * CHUNK, False)]
    assert not len(to_map(chunks, 7 * CHUNK, 5 * CHUNK))


def test_what_receiving_takes() -> None:
    delta = DeltaMap.of(
        100 * CHUNK, [DeltaRange(10, 10), DeltaRange(CHUNK - 1, 2), DeltaRange(2 * CHUNK, 50 * CHUNK, True)]
    )
    need, blocks = needed(delta, CHUNK, 0)
    assert need == (1 + 2 + 2) * CHUNK + (16 << 20)
    assert blocks >= 3


def test_commands_end_with_their_own_words() -> None:
    with pytest.raises(Damaged, match="ls: cannot access '/nowhere': No such file"):
        lvm.run("ls", "/nowhere")


@pytest.mark.parametrize("printed", ["", HEAD])
def test_a_tool_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, printed: str) -> None:
    """As reading a disk that does not answer, with the pool's metadata reserved meanwhile."""
    monkeypatch.setattr(thin, "TOOL_MAX_S", 0.3)
    begun = time.monotonic()
    with pytest.raises(Damaged, match="not done within"):
        thin._read(["bash", "-c", f"printf %s {shlex.quote(printed)}; exec sleep 60"], thin._delta_row)
    assert time.monotonic() - begun < 30


def test_a_tool_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "END_MAX_S", 0.3)
    with pytest.raises(Damaged, match="does not end"):
        thin._read(
            ["bash", "-c", f"printf %s {shlex.quote(f'{HEAD}</diff></superblock>')}; exec sleep 60 >&-"],
            thin._delta_row,
        )
