"""Somebody changes a snapshot directory in the middle of a commit: nothing wrong is committed, nothing is lost.

Each step of a commit is a moment at which the other one comes; it is a second agent's backend, or what that would do.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.backends import image_commit, image_keep
from agent.disk import ioctl
from resilver.errors import ResilverError
from resilver.volume import LiveState
from tests.agent.backends.replica import SIZE, Replica, noise

Stale = tuple[Replica, Replica, str]


@pytest.fixture(params=["xfs"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def at(directory: Path, name: str, then: Callable[[], None]) -> Replica:
    """The replica in a directory, whose commit meets somebody at a step, once."""
    left = [then]

    def step(now: str) -> None:
        if now == name and left:
            left.pop()()

    return Replica(directory, step=step)


def reason_of(target: Replica, source: Replica, base: str) -> str:
    with pytest.raises(ResilverError) as raised:
        target.receive(source, base)
    return raised.value.reason


def another_stage(target: Replica, base: str, tip: str) -> None:
    """The same stage as it is when nothing has been received yet."""
    tree = target.root / "stage" / "tree"
    shutil.rmtree(tree)
    tree.mkdir()
    shutil.copyfile(target.data(base), tree / "data")


@pytest.mark.parametrize("step", ["commit.begun", "commit.filled", "commit.leased", "commit.intended"])
@pytest.mark.parametrize("left", ["another", "none"])
def test_a_stage_that_was_exchanged_is_not_committed(stale: Stale, step: str, left: str) -> None:
    source, target, base = stale
    tip, before = source.lineage.tip_id, target.content

    def other_agent() -> None:
        if left == "another":
            another_stage(target, base, tip)
        else:
            shutil.rmtree(target.root / "stage")

    met = at(target.directory, step, other_agent)
    assert reason_of(met, source, base) == "TARGET_CHANGED"
    assert (target.lineage.tip_id, target.content) == (base, before)
    assert target.backend.examine().live.state is LiveState.UNMODIFIED
    target.backend.discard_stage()
    target.receive(source, base)
    assert (target.lineage.tip_id, target.content) == (tip, source.content)
    assert (target.debris(), target.backend.examine().preserved) == ([], ())


def test_a_target_that_another_has_committed_meanwhile_stays(stale: Stale) -> None:
    """Its stage went with that; undoing our commit does not take the snapshot away again."""
    source, target, base = stale
    tip = source.lineage.tip_id

    def other_agent() -> None:
        (target.root / "stage" / "tree").rename(target.root / tip)
        (target.root / tip / "data").rename(target.root / "moved")
        shutil.copyfile(target.root / "moved", target.data(tip))

    assert reason_of(at(target.directory, "commit.intended", other_agent), source, base) == "TARGET_CHANGED"
    assert target.data(tip).read_bytes() == source.content


@pytest.mark.parametrize("step", ["commit.filled", "commit.snapshot"])
def test_a_next_live_copy_that_was_exchanged_does_not_become_the_live_copy(stale: Stale, step: str) -> None:
    source, target, base = stale
    before = target.content
    incoming = target.root / ".live"
    strange = noise(31, SIZE)

    def other_agent() -> None:
        incoming.unlink()
        incoming.write_bytes(strange)

    assert reason_of(at(target.directory, step, other_agent), source, base) == "TARGET_CHANGED"
    assert (target.lineage.tip_id, target.content) == (base, before)
    (kept,) = target.backend.examine().preserved
    assert Path(kept.path).read_bytes() == strange, "whose it is nobody knows, so it is kept"


def test_nor_where_there_was_none(stale: Stale) -> None:
    source, target, base = stale
    target.remove_live()
    incoming = target.root / ".live"

    def other_agent() -> None:
        incoming.unlink()
        incoming.write_bytes(b"strange")

    assert reason_of(at(target.directory, "commit.snapshot", other_agent), source, base) == "TARGET_CHANGED"
    assert not target.path.exists()
    assert reason_of(at(target.directory, "commit.snapshot", incoming.unlink), source, base) == "TARGET_CHANGED"
    target.receive(source, base)
    assert target.content == source.content


@pytest.mark.parametrize("when", ["before the first look", "before the lease", "before the exchange"])
@pytest.mark.parametrize("how", ["removed", "linked", "a directory"])
def test_a_live_copy_that_is_gone_is_a_change(
    stale: Stale, when: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a failing disk, which would cost the stage."""
    source, target, base = stale
    moved = target.path.with_name("moved.img")

    def user() -> None:
        target.path.rename(moved)
        if how == "linked":
            target.path.symlink_to(moved)
        if how == "a directory":
            target.path.mkdir()

    step = {"before the lease": "commit.logged", "before the exchange": "commit.snapshot"}.get(when, "")
    met = at(target.directory, step, user)
    if not step:
        look = image_commit.check_live

        def looked(path: Path) -> os.stat_result | None:
            found = look(path)
            user()
            return found

        monkeypatch.setattr(image_commit, "check_live", looked)
    assert reason_of(met, source, base) == "TARGET_CHANGED"
    monkeypatch.undo()
    assert (target.root / "stage" / "tree" / "data").exists()
    assert moved.read_bytes() == target.data(base).read_bytes()
    assert (target.path.is_symlink(), target.path.is_dir()) == (how == "linked", how == "a directory")
    if how == "a directory":
        target.path.rmdir()
    moved.replace(target.path)
    assert target.backend.examine().live.state is LiveState.UNMODIFIED
    target.receive(source, base)
    assert target.content == source.content
    assert target.backend.examine().preserved == ()


@pytest.mark.parametrize("gone", [".keep", ".live"])
def test_what_was_to_be_preserved_is_not_let_go_with_its_place(stale: Stale, gone: str) -> None:
    """Another agent's start removes what it takes for left over."""
    source, target, base = stale
    target.write(0, b"of its own")
    mine = target.content

    def other_agent() -> None:
        if gone == ".live":
            (target.root / ".live").rename(target.directory / "away")
        else:
            shutil.rmtree(*target.root.glob(".keep-*"))

    met = at(target.directory, "commit.synced", other_agent)
    with pytest.raises(ResilverError) as raised:
        met.receive(source, base)
    again = Replica(target.directory)
    with pytest.raises(ResilverError) as repeated:
        again.backend.recover()
    assert (raised.value.reason, repeated.value.message) == ("IO_ERROR", raised.value.message)
    assert again.backend.examine().preserved == ()
    # What the message asks for.
    if gone == ".live":
        assert f"remove {target.root}/.keep-" in raised.value.message
        shutil.rmtree(*target.root.glob(".keep-*"))
    else:
        assert f"move {target.root}/.live" in raised.value.message
        (target.root / ".live").rename(target.directory / "away")
    assert (target.directory / "away").read_bytes() == mine
    again.backend.recover()
    assert (again.content, again.debris()) == (source.content, [])
    assert again.backend.examine().live.state is LiveState.UNMODIFIED


def test_keeping_again_is_no_error(stale: Stale) -> None:
    source, target, base = stale
    target.write(0, b"of its own")
    target.receive(source, base)
    (kept,) = target.backend.examine().preserved
    layout = target.backend._layout
    image_keep.keep_file(layout, layout.incoming, kept.id)
    assert target.backend.examine().preserved == (kept,)


def test_a_user_who_replaces_the_live_copy_right_after_the_exchange_loses_nothing(
    stale: Stale, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, base = stale
    before, mine = target.content, noise(33, 100_000)
    real = ioctl.exchange

    def replacing(one: Path, other: Path) -> None:
        real(one, other)
        monkeypatch.undo()
        made = target.path.with_name("made-by-the-user")
        made.write_bytes(mine)
        made.replace(target.path)

    monkeypatch.setattr(image_commit.ioctl, "exchange", replacing)
    assert reason_of(target, source, base) == "TARGET_CHANGED"
    assert (target.lineage.tip_id, target.content) == (base, before)
    (kept,) = target.backend.examine().preserved
    assert Path(kept.path).read_bytes() == mine


@pytest.mark.parametrize("step", ["commit.begun", "commit.leased", "commit.snapshot"])
@pytest.mark.parametrize("own", [False, True])
def test_a_hard_link_that_is_made_meanwhile_is_nobodys_next_live_copy(stale: Stale, step: str, own: bool) -> None:
    """It is the user's way of keeping the image as it is now: it stays that, whatever comes after."""
    source, target, base = stale
    if own:
        target.write(0, b"of its own")
    before = target.content
    backup = target.path.with_name("backup.img")
    assert reason_of(at(target.directory, step, lambda: backup.hardlink_to(target.path)), source, base) == (
        "NOT_SUPPORTED"
    )
    assert (target.lineage.tip_id, target.content, backup.read_bytes()) == (base, before, before)
    assert (target.debris(), target.backend.examine().preserved) == ([], ())
    backup.unlink()
    target.receive(source, base)
    assert target.content == source.content


def test_a_spare_with_another_name_is_not_written_over(stale: Stale) -> None:
    source, target, base = stale
    before = target.content
    target.receive(source, base)
    (spare,) = target.root.glob(".spare-*")
    backup = target.path.with_name("backup.img")
    backup.hardlink_to(spare)
    base = target.lineage.tip_id
    source.write(0, b"third")
    source.snapshot()
    target.receive(source, base)
    assert (target.content, backup.read_bytes()) == (source.content, before)
    assert not backup.samefile(target.path)
    assert (target.path.stat().st_nlink, backup.stat().st_nlink) == (1, 1)
