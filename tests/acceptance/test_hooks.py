"""Volumes of a group at one instant: under a writer that hooks stop, under mounts that are frozen, under a database."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import postgres
from tests.cluster import Cluster, cluster, wait_for
from tests.loopfs import mounted_image, needs_root, run

pytestmark = [needs_root, pytest.mark.timeout(400)]

MIB = 1 << 20
PAIRS = {"hooked": ("data1", "data2"), "mounted": ("files1", "files2"), "database": ("pg1", "pg2")}
SIZES = {"data1": MIB, "data2": MIB, "files1": 64 * MIB, "files2": 64 * MIB, "pg1": 384 * MIB, "pg2": 128 * MIB}

# Numbers in turn, the first file always one ahead or equal: what a database does with its log and its tables.
_WRITER = """
import os, struct, sys
first, second = (os.open(path, os.O_RDWR) for path in sys.argv[1:3])
number = max(struct.unpack("<4096Q", os.pread(first, 4096 * 8, 0)))
while True:
    number += 1
    for fd in (first, second):
        os.pwrite(fd, struct.pack("<Q", number), number % 4096 * 8)
"""
_APPENDER = """
import os, sys
first, second = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in sys.argv[1:3])
number = 0
while True:
    number += 1
    for fd in (first, second):
        os.write(fd, b"%09d\\n" % number)
"""
_HOOK = """#!/bin/sh
[ -e "$1/pid" ] || exit 0
read -r pid < "$1/pid"
kill -0 "$pid" || exit 0
if [ "$RESILVER_PHASE" = before ]; then
    kill -STOP "$pid"
    until grep -q "^State:.T" "/proc/$pid/status"; do sleep 0.01; done
else
    kill -CONT "$pid"
fi
"""


@dataclass
class Group:
    """Two nodes with three groups of two volumes; the live copies of `a` are written to by each test's own writer."""

    cluster: Cluster
    directory: Path
    place: Path

    def take(self, volume: str, pair: tuple[str, str]) -> dict[str, Any]:
        """The CP of a group, asked for by one of its volumes."""
        rows = {row["volume"]: row for row in self.cluster.ok("snapshot", volume)["snapshots"]}
        assert set(rows) == set(pair)
        assert len({row["group_id"] for row in rows.values()}) == 1
        assert all(row["group_id"] for row in rows.values())
        return rows

    def tips(self, node: str, pair: tuple[str, str]) -> dict[str, dict[str, Any]]:
        """What the node has of a group: snapshots that were taken together, with the same id as on the primary."""
        rows = {}
        for volume in pair:
            tip = self.cluster.replicas(volume)[node]["snapshot"]
            held = self.cluster.ok("snapshots", volume, "--node", node)["snapshots"]
            rows[volume] = next(each for each in held if each["id"] == tip)
        assert len({row["group_id"] for row in rows.values()}) == 1
        assert all(row["group_id"] for row in rows.values())
        return rows

    def data(self, node: str, row: dict[str, Any]) -> Path:
        return self.cluster.snapshot_data(node, row["volume"], row["id"])

    def exported(self, node: str, row: dict[str, Any]) -> Path:
        """A writable copy of a snapshot."""
        path = self.place / f"out-{node}-{row['id']}"
        self.cluster.ok("export", row["id"], "--node", node, "--to", str(path), "--writable")
        return path


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Iterator[Group]:
    directory = tmp_path_factory.mktemp("hooks")
    place = disk / "hooks"
    hook = directory / "hook"
    hook.write_text(_HOOK)
    hook.chmod(0o700)
    with cluster(directory, "sqlite") as made:
        made.start_coordinator()
        for node in ("a", "b"):
            (place / node).mkdir(parents=True)
            paths = {volume: place / node / f"{volume}.img" for volume in SIZES}
            if node == "a":
                for volume, path in paths.items():
                    with path.open("wb") as file:
                        file.truncate(SIZES[volume])
                    if not volume.startswith("data"):
                        run("mkfs.ext4", "-q", "-F", path)
            text = made.agent_config(node, paths).read_text()
            for pair, volumes in PAIRS.items():
                for volume in volumes:
                    text = text.replace(f'name = "{volume}"\n', f'name = "{volume}"\ngroup = "{pair}"\n')
            words = f'["{hook}", "{directory}"]'
            first = f"hooks = {{before = {words}, after = {words}, timeout_s = 60, freezes = true}}\n"
            for volume, hooks in {"data1": first, "data2": "hooks = {freezes = true}\n"}.items():
                text = text.replace(f'name = "{volume}"\n', f'name = "{volume}"\n{hooks}')
            (directory / f"{node}.toml").write_text(text)
            made.process(node, sys.executable, "-m", "agent.app", "--config", str(directory / f"{node}.toml"))
        # Three processes start at once, which takes a busy machine its time.
        wait_for(lambda: len(made.replicas("pg2")) == len("ab"), "the agents have come", deadline_s=150.0)
        for volume in SIZES:
            made.wait_reachable(volume, "a", "b")
        made.ok("resync", "--all")
        yield Group(made, directory, place)


@contextlib.contextmanager
def writing(script: str, *paths: Path, pid_file: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, paths)])
    if pid_file is not None:
        pid_file.write_text(f"{process.pid}\n")
    try:
        yield process
        assert process.poll() is None, "it wrote until the end"
    finally:
        process.kill()
        process.wait()


def newest(path: Path) -> int:
    data = path.read_bytes()[: 4096 * 8]
    return max(struct.unpack(f"<{len(data) // 8}Q", data))


def grows(read: Callable[[], int]) -> int:
    """Waits until more has been written than there was."""
    before = read()
    wait_for(lambda: read() > before + 100, "the writer goes on", every_s=0.01)
    return before


def test_what_hooks_stop_is_at_one_instant(group: Group) -> None:
    """Each number is written to the first volume before the second: no pair may have one in the second alone."""
    first, second = (group.cluster.image("a", volume) for volume in PAIRS["hooked"])
    with writing(_WRITER, first, second, pid_file=group.directory / "pid"):
        for _ in range(2):
            grows(lambda: newest(second))
            rows = group.take("data2", PAIRS["hooked"])
            one, two = (newest(group.data("a", rows[volume])) for volume in PAIRS["hooked"])
            assert two in (one - 1, one)
            assert {row["consistency"] for row in rows.values()} == {"FROZEN"}
            grows(lambda: newest(second))
        group.cluster.ok("resync", *PAIRS["hooked"])
    # The other node has a pair too, and an operator can see that it is one.
    group.tips("b", PAIRS["hooked"])
    one, two = (newest(group.cluster.image("b", volume)) for volume in PAIRS["hooked"])
    assert two in (one - 1, one)


def test_taken_one_after_the_other_they_are_not(group: Group) -> None:
    """What the test before would have found, had the two been taken alone: it can fail."""
    first, second = (group.cluster.image("a", volume) for volume in PAIRS["hooked"])
    with writing(_WRITER, first, second, pid_file=group.directory / "pid"):
        grows(lambda: newest(second))
        early = group.take("data1", PAIRS["hooked"])["data1"]
        grows(lambda: newest(second))
        late = group.take("data1", PAIRS["hooked"])["data2"]
        assert newest(group.data("a", late)) > newest(group.data("a", early)) + 1
        assert early["group_id"] != late["group_id"]


def test_what_is_mounted_is_frozen_as_a_whole(group: Group, tmp_path: Path) -> None:
    pair = PAIRS["mounted"]
    points = [tmp_path / volume for volume in pair]
    with contextlib.ExitStack() as stack:
        for volume, point in zip(pair, points, strict=True):
            stack.enter_context(mounted_image(group.cluster.image("a", volume), point))
        logs = [point / "log" for point in points]
        stack.enter_context(writing(_APPENDER, *logs))
        wait_for(lambda: all(log.exists() for log in logs), "the writer writes")
        taken = []
        for _ in range(2):
            grows(lambda: logs[1].stat().st_size)
            taken.append(group.take("files1", pair))
            grows(lambda: logs[1].stat().st_size)
    for rows in taken:
        assert {row["consistency"] for row in rows.values()} == {"FROZEN"}
        lengths = []
        for volume in pair:
            point = tmp_path / f"out-{volume}"
            with mounted_image(group.exported("a", rows[volume]), point):
                text = (point / "log").read_bytes()
            numbers = [int(line) for line in text.splitlines()]
            assert numbers == list(range(1, len(numbers) + 1)), "every line up to the last, and none torn"
            lengths.append(len(numbers))
        assert lengths[1] in (lengths[0] - 1, lengths[0])


@pytest.fixture
def open_place() -> Iterator[Path]:
    """Where a server that is not root comes through, also while pytest makes its own directories private again."""
    made = Path(tempfile.mkdtemp(prefix="hooks-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@postgres.needs_postgres
def test_a_database_on_two_volumes_recovers_from_the_pair(group: Group, open_place: Path) -> None:
    """Log and tables on one volume, a tablespace on the other; taken while it works, started from the copies."""
    pair = PAIRS["database"]
    points = [open_place / volume for volume in pair]
    with contextlib.ExitStack() as stack:
        for volume, point in zip(pair, points, strict=True):
            stack.enter_context(mounted_image(group.cluster.image("a", volume), point))
        space = points[1] / "space"
        space.mkdir()
        shutil.chown(space, postgres.NOBODY.pw_uid, postgres.NOBODY.pw_gid)
        postgres.initialise(points[0] / "pg")
        with postgres.running(points[0] / "pg") as server:
            server.fill()
            server.ask(f"create tablespace other location '{space}'")
            for table in ("pgbench_tellers", "pgbench_history"):
                server.ask(f"alter table {table} set tablespace other")
            done = threading.Event()
            working = threading.Thread(target=_work_until, args=(server, done))
            working.start()
            try:
                grows(lambda: int(server.ask("select count(*) from pgbench_history")))
                group.take("pg2", pair)
                grows(lambda: int(server.ask("select count(*) from pgbench_history")))
                group.cluster.ok("resync", *pair)
                grows(lambda: int(server.ask("select count(*) from pgbench_history")))
            finally:
                done.set()
                working.join(60)
            assert server.balanced()
    rows = group.tips("b", pair)
    assert {row["consistency"] for row in rows.values()} == {"FROZEN"}
    with contextlib.ExitStack() as stack:
        # At the same place, as on a node that takes over: a tablespace is found by its path.
        for volume, point in zip(pair, points, strict=True):
            stack.enter_context(mounted_image(group.exported("b", rows[volume]), point))
        with postgres.running(points[0] / "pg") as server:
            assert server.balanced()
            assert int(server.ask("select count(*) from pgbench_history")) > 100
            server.check()


def _work_until(server: postgres.Server, done: threading.Event) -> None:
    while not done.is_set():
        server.work(200)
