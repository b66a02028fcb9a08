"""What a watcher sees: never over 100 %, never backwards, and lines where there is no terminal."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from resilver.cli.progress import LINE_EVERY_S, Board, bar
from resilver.v1 import volume_pb2 as pb
from tests.cli import sample

STATES = ["QUEUED", "PREPARING", "TRANSFERRING", "VERIFYING", "COMMITTING", "FAILED", "SUCCEEDED"]
UPDATES = st.lists(
    st.tuples(
        st.sampled_from(STATES),
        st.none() | st.integers(0, 2**40),
        st.none() | st.integers(0, 2**40),
    ),
    min_size=1,
    max_size=20,
)


@given(UPDATES)
def test_figures_never_fall_and_never_pass_the_total(updates):
    board = Board()
    percent = done = 0
    for step, (state, copied, total) in enumerate(updates):
        board.update([sample.resync("r", "c", state, copied, total)], float(step))
        track = board.tracks[0]
        assert percent <= track.percent <= 100
        assert track.done >= done
        assert track.total is None or track.done <= track.total
        assert track.left(float(step))
        board.table(float(step))
        percent, done = track.percent, track.done


def test_a_hundred_percent_means_all_of_it():
    board = Board()
    board.update([sample.resync("r", "c", "TRANSFERRING", 999_999, 1_000_000)], 0.0)
    assert board.tracks[0].percent == 99
    assert bar(99) == "#" * 19 + ".  99%"
    assert bar(100) == "#" * 20 + " 100%"


def test_where_it_comes_from():
    sources = [pb.ResyncSource(node="a", wire_bytes=44, bytes_per_second=50 << 20),
               pb.ResyncSource(node="b", wire_bytes=56, bytes_per_second=31 << 20)]  # fmt: skip
    board = Board()
    board.update([sample.resync("r", "c", "PREPARING", 0, 162 << 20)], 0.0)
    assert board.tracks[0].sources() == "a, b"
    board.update([sample.resync("r", "c", "TRANSFERRING", 81 << 20, 162 << 20, sources=sources)], 1.0)
    assert board.tracks[0].sources() == "a 44%, b 56%"
    assert board.tracks[0].rate(1.0) == 81 << 20
    assert board.tracks[0].left(1.0) == "1s"


def test_the_rate_is_measured_where_none_is_told():
    board = Board()
    for second in range(4):
        board.update([sample.resync("r", "c", "TRANSFERRING", second * 1000, 10_000)], float(second))
    assert board.tracks[0].rate(3.0) == 1000
    assert board.tracks[0].left(3.0) == "7s"


def test_a_line_for_each_step_and_now_and_then():
    board = Board()
    board.update([sample.resync("r", "c", "PREPARING", 0, 100)], 0.0)
    assert [line.split("  ")[2] for line in board.lines(0.0)] == ["preparing"]
    board.update([sample.resync("r", "c", "TRANSFERRING", 10, 100)], 1.0)
    assert len(board.lines(1.0)) == 1
    board.update([sample.resync("r", "c", "TRANSFERRING", 50, 100)], 2.0)
    assert board.lines(2.0) == []
    assert len(board.lines(1.0 + LINE_EVERY_S)) == 1
    board.update([sample.resync("r", "c", "SUCCEEDED", 100, 100)], 12.0)
    last = board.lines(12.0)
    assert "in sync  100%" in last[0]
    assert board.lines(40.0) == []
    assert board.settled()


@pytest.mark.parametrize("name", ["vm1", "a-database-with-a-name"])
@pytest.mark.parametrize("width", [48, 60, 80, 100, 160])
def test_which_replica_it_is_can_be_read_at_any_width(width, name):
    board = Board()
    sources = [pb.ResyncSource(node=node, wire_bytes=50, bytes_per_second=260 << 20) for node in ("a", "b")]
    running = sample.resync("r", "c", "TRANSFERRING", 300 << 20, 600 << 20, sources=sources)
    running.volume = name
    board.update([running], 1.0)
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(board.table(1.0))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if "transferring" in line)
    assert "50%" in row
    assert row.startswith(f"{name}/c ") or width < 4 * len(name)
    if width > 100:
        assert "520.0 MiB/s" in row
        assert "a 50%, b 50%" in row


def test_an_estimate_that_proves_too_short_is_not_all_of_it_before_the_step_is_over():
    board = Board()
    running = sample.resync("r", "c", "TRANSFERRING", 100 << 20, 100 << 20)
    running.estimated = True
    board.update([running], 0.0)
    (track,) = board.tracks
    assert (track.percent, track.copied()) == (99, "100.0 / ~100.0 MiB")
    board.update([sample.resync("r", "c", "VERIFYING", 120 << 20, 120 << 20)], 1.0)
    assert (track.percent, track.copied()) == (100, "120.0 / 120.0 MiB")


def test_where_nobody_can_say_how_much_comes_there_is_no_percent():
    board = Board()
    board.update([sample.resync("r", "c", "TRANSFERRING", 12 << 20, None)], 0.0)
    (track,) = board.tracks
    (line,) = board.lines(0.0)
    assert "%" not in line
    assert "transferring  12.0 MiB / unknown" in line
    assert track.left(0.0) == "-"
    console = Console(file=io.StringIO(), width=120, highlight=False)
    console.print(board.table(0.0))
    assert "%" not in console.file.getvalue()
    board.update([sample.resync("r", "c", "VERIFYING", 13 << 20, 13 << 20)], 1.0)
    assert track.percent == 100
