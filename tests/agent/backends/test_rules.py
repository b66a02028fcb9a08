"""What may be preserved beside what is: by number, and by the bytes that are known."""

from __future__ import annotations

import pytest

from agent.backends.rules import check_bounds
from resilver.errors import Refused
from resilver.lineage import NO_CP
from resilver.volume import PreservedCopy


def copy(size_bytes: int, own: int | None) -> PreservedCopy:
    return PreservedCopy(
        id="p",
        path="/p",
        based_on="",
        cp=NO_CP,
        live=True,
        create_time_ms=1,
        size_bytes=size_bytes,
        exclusive_bytes=own,
    )


def full(there: list[PreservedCopy], more: list[PreservedCopy], count_max: int, bytes_max: int) -> bool:
    try:
        check_bounds("vm1", there, more, count_max, bytes_max)
    except Refused as error:
        return error.reason == "PRESERVED_FULL"
    return False


@pytest.mark.parametrize(
    ("size_bytes", "own", "counted"),
    [(1000, 10, 10), (1000, 0, 0), (1000, None, 1000), (0, None, 0)],
    ids=["its own", "nothing its own", "not counted", "a subvolume that is not counted"],
)
@pytest.mark.parametrize("place", ["there", "more"])
def test_what_a_copy_counts(size_bytes, own, counted, place):
    """Beside one of 100 bytes: refused from one byte more than the bound on."""
    this, that = [copy(size_bytes, own)], [copy(100, 100)]
    there, more = (this, that) if place == "there" else (that, this)
    assert not full(there, more, 2, counted + 100)
    assert full(there, more, 2, counted + 99)
    assert full(there, more, 1, counted + 100), "by number"
    assert not full(there, more, 2, 0), "no bound of bytes"
    assert not full(there, [], 0, 1), "nothing comes to them"
