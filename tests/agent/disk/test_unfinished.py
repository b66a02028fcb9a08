"""What an export makes beside its path: by one at a time, and gone if it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.disk.unfinished import unfinished
from resilver.errors import Refused


def touch(path: Path) -> None:
    path.touch(exist_ok=False)


MAKE = {"directory": (Path.mkdir, Path.rmdir), "file": (touch, Path.unlink)}


@pytest.fixture(params=MAKE)
def how(request):
    return MAKE[request.param]


def test_one_at_a_time(tmp_path, how):
    path = tmp_path / "out"
    with unfinished(path, *how) as (temporary, _lock):
        before = temporary.lstat().st_ino
        with pytest.raises(Refused) as caught, unfinished(path, *how):
            pass
        assert caught.value.reason == "IN_USE"
        assert temporary.lstat().st_ino == before, "the first one's is left alone"
        with unfinished(tmp_path / "other", *how) as (another, _lock):
            another.rename(tmp_path / "other")
        temporary.rename(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other", "out"]


def test_what_fails_is_removed_and_what_was_left_is_made_anew(tmp_path, how):
    path, (make, _remove) = tmp_path / "out", how
    make(tmp_path / ".out.resilver-export")
    with pytest.raises(OSError, match="full"), unfinished(path, *how):
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []


def test_one_that_comes_in_between_is_left_alone(tmp_path, how):
    path, (make, remove) = tmp_path / "out", how
    made = []

    def late(temporary: Path) -> None:
        """Another export has made its own by now."""
        make(temporary)
        made.append(temporary)
        make(temporary)

    with pytest.raises(Refused) as caught, unfinished(path, late, remove):
        pass
    assert caught.value.reason == "IN_USE"
    assert made[0].exists()


def test_a_link_of_that_name_is_not_followed(tmp_path, how):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.resilver-export").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"), unfinished(tmp_path / "out", *how):
        pass
    assert (tmp_path / "elsewhere").is_dir()
