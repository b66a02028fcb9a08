"""Live copies in use, mounted, written to, or replaced while the agent dies or the disk fills: nothing lost or torn."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import images, users
from tests.acceptance.images import BLOCK, MIB, identical
from tests.cluster import Cluster, cluster, wait_for
from tests.loopfs import mounted, mounted_image, needs_root

pytestmark = needs_root

HELD = {"opened": users.opened, "mapped": users.mapped, "looped": users.looped}
SIZES = {
    **dict.fromkeys(HELD, 8 * MIB),
    "raced": 192 * MIB,
    "mounted": 64 * MIB,
    "killed": 32 * MIB,
    "packed": 64 * MIB,
    "filled": 48 * MIB,
}
BLOCKS = 256
SMALL_DISK_BYTES = 320 * MIB
KILLED_RUNS = 1
KILL_WITHIN_S = (0.02, 0.05, 0.1, 0.2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Iterator[Cluster]:
    """Two nodes with a volume for each story, in sync; `packed` on compressed Btrfs, `filled` on a small disk."""
    with (
        mounted("btrfs-compressed", 2 << 30) as packed,
        mounted("xfs", SMALL_DISK_BYTES) as small,
        cluster(tmp_path_factory.mktemp("in-use"), "sqlite") as made,
    ):
        made.start_coordinator()
        for node in ("a", "b"):
            for place in (disk, packed):
                (place / node).mkdir()
            paths = {volume: disk / node / f"{volume}.img" for volume in SIZES}
            paths["packed"] = packed / node / "packed.img"
            if node == "b":
                paths["filled"] = small / "filled.img"
            if node == "a":
                _fill(paths)
            made.start_agent(node, paths)
        for volume in SIZES:
            made.wait_reachable(volume, "a", "b")
        made.ok("resync", "--all")
        yield made


def _fill(paths: dict[str, Path]) -> None:
    for seed, (volume, path) in enumerate(paths.items()):
        if volume == "mounted":
            with path.open("wb") as file:
                file.truncate(SIZES[volume])
            subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], check=True)
        elif volume == "packed":
            path.write_bytes(b"".join(b"%4095d\n" % number for number in range(SIZES[volume] // BLOCK)))
        else:
            images.make(path, SIZES[volume], SIZES[volume], seed)


def change(made: Cluster, volume: str, seed: int, count: int = BLOCKS) -> int:
    """Writes to the primary; the bytes that are new."""
    images.write(made.image("a", volume), images.scattered(SIZES[volume], count, seed), seed)
    return count * BLOCK


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def test_a_copy_in_use_is_left_alone_and_its_stage_commits_once_it_is_closed(pair: Cluster) -> None:
    changed = {volume: change(pair, volume, seed) for seed, volume in enumerate(HELD)}
    before = {volume: digest(pair.image("b", volume)) for volume in HELD}
    with contextlib.ExitStack() as stack:
        by = {volume: stack.enter_context(hold(pair.image("b", volume))) for volume, hold in HELD.items()}
        ran = pair.cli("resync", *HELD)
        assert ran.code == 3, ran.err
        told = ran.err.splitlines()
        for volume, user in by.items():
            (line,) = [line for line in told if f"{volume}/b" in line]
            assert line.startswith("IN_USE")
            assert user in line
        for run in ran.json["resyncs"]:
            assert (run["state"], run["done_bytes"]) == ("BLOCKED", changed[run["volume"]])
            row = pair.replicas(run["volume"])["b"]
            assert (row["state"], row["cp"], row["live"]["state"] == "UNMODIFIED") == ("STALE", "1-1", False)
            assert any(by[run["volume"]] in user for user in row["live"]["in_use_by"])
        assert {volume: digest(pair.image("b", volume)) for volume in HELD} == before
    for volume in HELD:
        pair.wait_state(volume, "b", "IN_SYNC")
        second, first, *_ = pair.resyncs(volume)
        assert (first["state"], second["state"]) == ("BLOCKED", "SUCCEEDED")
        assert second["wire_bytes"] == 0
        assert second["preserved"] == []
        assert identical(pair.image("a", volume), pair.image("b", volume))


def test_what_is_written_to_a_copy_during_the_transfer_is_found_and_preserved(pair: Cluster, disk: Path) -> None:
    live, source = pair.image("b", "raced"), pair.processes["a"]
    images.make(pair.image("a", "raced"), SIZES["raced"], SIZES["raced"], seed=77)
    stage = pair.records("b", "raced") / "stage"
    pair.ok("resync", "raced", "--no-wait")
    wait_for(lambda: _begun(stage), "a part is there", every_s=0.002)
    source.send(signal.SIGSTOP)
    images.write(live, [0, 100 * MIB], seed=78)
    written = images.copy(live, disk / "written.img")
    source.send(signal.SIGCONT)
    pair.wait_state("raced", "b", "IN_SYNC")
    (run, _first) = pair.resyncs("raced")
    assert run["state"] == "SUCCEEDED"
    assert identical(pair.image("a", "raced"), live)
    (kept,) = pair.ok("preserved", "raced")["preserved"]
    assert run["preserved"] == [kept["id"]]
    exported = disk / "exported.img"
    pair.ok("export", kept["id"], "--node", "b", "--to", str(exported))
    assert identical(written, exported)


def test_a_mounted_primary_is_never_called_unmodified_and_its_point_has_what_its_mount_had(
    pair: Cluster, disk: Path, tmp_path: Path
) -> None:
    live, point = pair.image("a", "mounted"), tmp_path / "guest"
    with mounted_image(live, point) as device:
        (plan,) = pair.ok("plan", "mounted")["volumes"]
        assert plan["takes_snapshot"], "mounting alone may write"
        for number in range(40):
            (point / f"file-{number}").write_bytes(random.Random(number).randbytes(20_000))
        before = pair.replicas("mounted")["a"]["live"]
        assert before["state"] != "UNMODIFIED"
        assert str(device) in before["in_use_by"]
        pair.ok("resync", "mounted")
        assert pair.replicas("mounted")["a"]["live"]["state"] != "UNMODIFIED"
        tip = pair.replicas("mounted")["b"]["snapshot"]
        exported = disk / "mounted.export"
        pair.ok("export", tip, "--node", "b", "--to", str(exported), "--writable")
        with mounted_image(exported, tmp_path / "export"):
            assert sorted(path.name for path in (tmp_path / "export").iterdir() if path.is_file()) == sorted(
                f"file-{number}" for number in range(40)
            )
            for number in range(40):
                assert (tmp_path / "export" / f"file-{number}").read_bytes() == (point / f"file-{number}").read_bytes()


def test_on_compressed_btrfs_an_untouched_copy_is_unmodified_and_a_delta_is_exact(pair: Cluster) -> None:
    (plan,) = pair.ok("plan", "packed")["volumes"]
    assert not plan["takes_snapshot"]
    assert [row["action"] for row in plan["replicas"]] == ["NONE"]
    assert {row["live"]["state"] for row in pair.replicas("packed").values()} == {"UNMODIFIED"}
    changed = change(pair, "packed", seed=31, count=1000)
    (plan,) = pair.ok("plan", "packed", "--snapshot")["volumes"]
    assert [(row["bytes"], row["range_count"]) for row in plan["replicas"]] == [(changed, 1000)]
    (run,) = pair.ok("resync", "packed")["resyncs"]
    assert run["done_bytes"] == changed
    assert identical(pair.image("a", "packed"), pair.image("b", "packed"))


def test_a_kill_at_any_moment_of_a_commit_leaves_one_whole_image_at_the_path(pair: Cluster) -> None:
    killed, live, records = pair.processes["b"], pair.image("b", "killed"), pair.records("b", "killed")
    chance = random.Random(9)
    for seed in range(40, 40 + KILLED_RUNS):
        old, before = digest(live), live.stat().st_ino
        change(pair, "killed", seed, count=2000)
        new = digest(pair.image("a", "killed"))
        seen = _signs(records)
        pair.ok("resync", "killed", "--no-wait")
        for longest_s in KILL_WITHIN_S:
            if not _commits(records, seen, lambda inode=before: live.stat().st_ino != inode):
                break
            time.sleep(chance.uniform(0.0, longest_s))  # the moment is what this is about
            killed.kill()
            assert digest(live) in (old, new)
            seen = _signs(records)
            killed.start()
        pair.wait_state("killed", "b", "IN_SYNC")
        assert digest(live) == new


def test_a_disk_that_is_full_in_the_middle_costs_the_run_and_nothing_else(pair: Cluster) -> None:
    live, source = pair.image("b", "filled"), pair.processes["a"]
    images.make(pair.image("a", "filled"), SIZES["filled"], SIZES["filled"], seed=50)
    old = digest(live)
    stage = pair.records("b", "filled") / "stage"
    pair.ok("resync", "filled", "--no-wait")
    wait_for(lambda: _begun(stage), "a part is there", every_s=0.002)
    source.send(signal.SIGSTOP)
    with _full(live.parent):
        source.send(signal.SIGCONT)
        run = _ended(pair, "filled")
        assert (run["state"], run["refusal"]["reasons"]) == ("FAILED", ["NO_SPACE"])
        assert digest(live) == old
        assert not stage.exists()
    pair.ok("resync", "filled")
    assert identical(pair.image("a", "filled"), live)


def test_a_disk_that_is_full_during_a_commit_leaves_one_whole_image_at_the_path(pair: Cluster) -> None:
    live, records = pair.image("b", "filled"), pair.records("b", "filled")
    chance = random.Random(10)
    for seed, longest_s in enumerate(KILL_WITHIN_S[1:], 60):
        old, before = digest(live), live.stat().st_ino
        change(pair, "filled", seed, count=1000)
        new = digest(pair.image("a", "filled"))
        pair.ok("resync", "filled", "--no-wait")
        _commits(records, [], lambda inode=before: live.stat().st_ino != inode)
        time.sleep(chance.uniform(0.0, longest_s))  # as above
        with _full(live.parent):
            run = _ended(pair, "filled")
            assert digest(live) == (new if run["state"] == "SUCCEEDED" else old), run
        pair.ok("resync", "filled")
        assert digest(live) == new


def _begun(stage: Path) -> bool:
    """Whether a part of a transfer is on the target's disk."""
    journal = stage / "journal.bin"
    return journal.exists() and journal.stat().st_size > 512


def _ended(made: Cluster, volume: str) -> Any:
    """The newest run of a volume, once it has ended."""

    def final() -> Any:
        run = next(iter(made.resyncs(volume)), {})
        return run if run.get("end_time") else None

    return wait_for(final, f"the run of {volume} ends")


@contextlib.contextmanager
def _full(directory: Path) -> Iterator[None]:
    """Takes every free block of a file system, in an instant, and gives it back at the end."""
    filler = directory / "filler"
    fd = os.open(filler, os.O_RDWR | os.O_CREAT)
    try:
        at = 0
        for step in (16 * MIB, MIB, 64 << 10, BLOCK):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(fd, at, step)
                    at += step
        yield
    finally:
        os.close(fd)
        filler.unlink()


def _signs(records: Path) -> list[tuple[int, int]]:
    """What of a commit that is not over can be seen in the directory."""
    found = []
    for name in (".live", "commit.json"):
        with contextlib.suppress(FileNotFoundError):
            stat = (records / name).stat()
            found.append((stat.st_ino, stat.st_ctime_ns))
    return found


def _commits(records: Path, seen: list[tuple[int, int]], replaced: Callable[[], bool]) -> bool:
    """Waits for a commit, or for the recovery of one; False if it is over, and nothing is left to be killed."""

    def found() -> str:
        signs = _signs(records)
        if signs and signs != seen:
            return "commits"
        return "over" if replaced() and not signs else ""

    return bool(wait_for(found, "a commit", every_s=0.001) == "commits")
