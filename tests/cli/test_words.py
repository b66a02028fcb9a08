import pytest

from resilver.cli import words


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
    ("seconds", "text", "short"),
    [(-3, "0s", "0s"), (9.9, "9s", "9s"), (252, "4m12s", "4m"), (7500, "2h5m", "2h"), (7200, "2h", "2h"),
     (273600, "3d4h", "3d")],
)  # fmt: skip
def test_age(seconds, text, short):
    assert words.age(seconds) == text
    assert words.short_age(seconds) == short


def test_short_id_leaves_foreign_ids_alone():
    assert words.short_id("31111111-2222-3333-4444-555555555555") == "31111111"
    assert words.short_id("pool/vm1@daily") == "pool/vm1@daily"
