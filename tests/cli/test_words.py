import pytest
from hypothesis import given
from hypothesis.strategies import integers

from resilver import spans
from resilver.cli import words
from resilver.limits import LimitChange, described


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (int(234.9 * 2**20), "234.9 MiB"),
        (int(1.31 * 2**30), "1.31 GiB"),
        (96 * 2**30, "96 GiB"),
        (int(212.4 * 2**30), "212 GiB"),
        (2**64 - 1, "16 EiB"),
    ],
)
def test_size(count, text):
    assert words.size(count) == text


def test_size_of_takes_the_unit_of_the_larger():
    assert words.size_of(0, 0) == "0 / 0 B"
    assert words.size_of(1 << 20, 3 << 30) == "0.00 / 3.00 GiB"
    assert words.size_of(int(135.7 * 2**20), 238 << 20) == "135.7 / 238.0 MiB"


@pytest.mark.parametrize(
    ("seconds", "text", "chosen"),
    [(-3, "0s", "0s"), (9.9, "9s", "9s"), (252, "4m12s", "4m12s"), (599, "9m59s", "9m59s"), (750, "12m", "12m30s"),
     (7500, "2h5m", "2h5m"), (7259, "2h", "2h"), (273600, "3d4h", "3d4h")],
)  # fmt: skip
def test_spans(seconds, text, chosen):
    assert spans.age(seconds) == text
    assert spans.span(seconds) == chosen


@given(integers(0, 400_000), integers(0, 400_000))
def test_an_age_reads_the_same_for_one_step(seconds, later):
    step = spans.step_s(seconds)
    assert spans.age(seconds) == spans.age(seconds - seconds % step + later % step)


@pytest.mark.parametrize(("bytes_s", "text"), [(999, "999 B/s"), (65_536, "65.5 kB/s"), (1_500_000_000, "1.5 GB/s")])
def test_rate(bytes_s, text):
    assert spans.rate(bytes_s) == text


def test_a_limit_is_told_as_it_is_ordered():
    change = LimitChange(receive_bytes_s=0, send_bytes_s=1_000_000)
    assert described(change) == "receive without a cap, send 1 MB/s, for 1d"


def test_short_id_leaves_foreign_ids_alone():
    assert words.short_id("31111111-2222-3333-4444-555555555555") == "31111111"
    assert words.short_id("pool/vm1@daily") == "pool/vm1@daily"
