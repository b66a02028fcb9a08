"""Mistakes, each told in a sentence that says what is wrong and what would be right; nothing on any disk changes."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance import images
from tests.acceptance.images import MIB, identical
from tests.cluster import Cluster, cluster, free_port, wait_for
from tests.loopfs import mounted, needs_root

pytestmark = needs_root

BYTES = 32 * MIB
SMALL_DISK_BYTES = 320 * MIB
LEFT_BYTES = 40 * MIB
MODULES = {"a": "agent.app", "c1": "coordinator.app"}
LISTENS = ("listen", "stream_listen", "metrics_listen")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Iterator[Cluster]:
    """`vm1`, in sync on two nodes."""
    with cluster(tmp_path_factory.mktemp("bad"), "sqlite") as made:
        made.start_coordinator()
        images.make(disk / "a" / "vm1.img", BYTES, BYTES, seed=1)
        for node in ("a", "b"):
            (disk / node).mkdir(exist_ok=True)
            made.start_agent(node, {"vm1": disk / node / "vm1.img"})
        made.wait_reachable("vm1", "a", "b")
        made.ok("resync", "vm1")
        yield made


@contextlib.contextmanager
def unchanged(*places: Path) -> Iterator[None]:
    """Holds that no file below was made, removed, replaced or written to."""

    def look() -> dict[Path, tuple[int, int, int]]:
        found = {path: path.lstat() for place in places for path in place.rglob("*")}
        return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}

    before = look()
    yield
    assert look() == before


def daemon(name: str, config: Path) -> tuple[int, str]:
    """Starts one that cannot run; its exit code, and the one line that is not its log's."""
    done = subprocess.run(
        [sys.executable, "-m", MODULES[name], "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "Traceback" not in done.stderr + done.stdout
    said = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(said) == 1, done.stderr
    return done.returncode, said[0]


def edited(made: Cluster, name: str, *changes: tuple[str, str]) -> Path:
    """The configuration of a daemon with something else in it, in a file of its own."""
    text = (made.directory / f"{name}.toml").read_text()
    for pattern, replacement in changes:
        text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        assert count == 1, pattern
    path = made.directory / f"{name}-edited.toml"
    path.write_text(text)
    return path


def another(made: Cluster, name: str) -> tuple[tuple[str, str], ...]:
    """What gives a second agent a state_dir and ports of its own."""
    ports = tuple((rf"^{key} = .*$", f'{key} = "127.0.0.1:{free_port()}"') for key in LISTENS)
    return (*ports, (r"^state_dir = .*$", f'state_dir = "{made.directory}/{name}"'))


@pytest.mark.parametrize(
    ("words", "reason", "nearest"),
    [
        (("status", "vm2"), "VOLUME_NOT_FOUND", "did you mean 'vm1'?"),
        (("resync", "vm"), "VOLUME_NOT_FOUND", "did you mean 'vm1'?"),
        (("resync", "vm1", "--to", "bb"), "NODE_NOT_FOUND", "did you mean 'b'?"),
        (("elect", "vm1", "--accept-loss", "aa"), "NODE_NOT_FOUND", "did you mean 'a'?"),
        (("resynk", "vm1"), "USAGE", "did you mean 'resync'?"),
        (("resync",), "INVALID_FIELD", "or give --all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_unknown_name_is_2_and_the_nearest_is_named(
    pair: Cluster, disk: Path, words: tuple[str, ...], reason: str, nearest: str
) -> None:
    with unchanged(disk):
        ran = pair.cli(*words, "-o", "table")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"{reason}: ")
    assert nearest in ran.err


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("a", (r'^node = "a"', "node = a"), "is not valid TOML: Invalid value (at line 1, column 8)"),
        ("a", (r"^state_dir", "state_dri"), "state_dri: unknown key; did you mean 'state_dir'?"),
        ("a", (r"^reserve_ratio", "reserve"), "space.reserve: unknown key; did you mean 'reserve_ratio'?"),
        ("a", (r'^path = ".*"', 'path = "/proc"'), "/proc is a directory; name an image file in it"),
        ("a", (r"^priority = 10", 'priority = "high"'), "volumes[0].priority: should be a whole number"),
        ("c1", (r"^lease_ttl_s", "lease_ttl"), "lease_ttl: unknown key; did you mean 'lease_ttl_s'?"),
        ("c1", (r'^name = "c1"', 'name = "c1'), "is not valid TOML"),
    ],
    ids=["toml", "key", "key in a table", "directory", "type", "key of a coordinator", "toml of a coordinator"],
)
def test_a_mistake_in_a_file_is_2_and_names_the_place(
    pair: Cluster, disk: Path, name: str, change: tuple[str, str], said: str
) -> None:
    own = another(pair, "mistaken") if name == "a" and "state_dir" not in change[0] else ()
    with unchanged(disk):
        code, sentence = daemon(name, edited(pair, name, *own, change))
    assert code == 2
    assert said in sentence


@pytest.mark.parametrize(("name", "key"), [*(("a", key) for key in LISTENS), ("c1", "listen")])
def test_a_port_in_use_is_2_and_named(pair: Cluster, disk: Path, name: str, key: str) -> None:
    (address,) = re.findall(rf'^{key} = "(.*)"', (pair.directory / f"{name}.toml").read_text(), re.MULTILINE)
    own = [change for change in another(pair, "second") if not change[0].startswith(f"^{key} ")]
    if name == "c1":
        own = [change for change in own if "metrics" in change[0]]
    with unchanged(disk):
        code, sentence = daemon(name, edited(pair, name, *own))
    assert code == 2
    assert f"{key}: cannot listen on {address}: Address already in use" in sentence
    assert "choose another address" in sentence


def test_a_state_dir_in_use_is_2_and_its_user_named(pair: Cluster, disk: Path) -> None:
    ports = another(pair, "unused")[:-1]
    with unchanged(disk):
        code, sentence = daemon("a", edited(pair, "a", *ports))
    assert code == 2
    assert f"is in use by the agent with pid {pair.processes['a'].pid}" in sentence
    assert "give this agent a state_dir of its own" in sentence


def reasons(made: Cluster, name: str) -> list[str]:
    return [problem["reason"] for problem in made.node(name).get("problems", ())]


def second_agent(made: Cluster, name: str, *changes: tuple[str, str]) -> Path:
    """Starts one more agent, with the configuration of b but for these changes; where its data would be."""
    place = made.image("b", "vm1").parent.parent / name
    place.mkdir()
    path = (r'^path = ".*"', f'path = "{place}/vm1.img"')
    config = edited(made, "b", *another(made, name), path, *changes)
    made.process(
        name, sys.executable, "-m", "agent.app", "--config", str(config.rename(made.directory / f"{name}.toml"))
    )
    return place


def test_an_agent_of_another_cluster_stays_out(pair: Cluster, disk: Path) -> None:
    with unchanged(disk / "a", disk / "b"):
        place = second_agent(pair, "w", (r"^node = .*", 'node = "w"'), (r"^cluster = .*", 'cluster = "prod"'))
        told = wait_for(lambda: pair.node("w"), "the coordinator tells of it")
        assert not told["reachable"]
        (problem,) = told["problems"]
        assert problem["reason"] == "CLUSTER_MISMATCH"
        assert "this is cluster 'test'" in problem["message"]
        assert "'prod'" in problem["message"]
        wait_for(lambda: "correct `cluster` or `coordinators`" in pair.log("w"), "the agent logs it")
        assert "w" not in pair.replicas("vm1")
        pair.processes["w"].stop()
    assert list(place.iterdir()) == []


def test_of_two_agents_with_one_name_neither_is_believed(pair: Cluster, disk: Path) -> None:
    with unchanged(disk / "a", disk / "b"):
        place = second_agent(pair, "twin")
        wait_for(lambda: "DUPLICATE_NODE" in reasons(pair, "b"), "the coordinator tells of it")
        assert not pair.node("b")["reachable"]
        row = pair.replicas("vm1")["b"]
        assert (row["state"], row["reachable"]) == ("UNKNOWN", False)
        ran = pair.refused("resync", "vm1", reason="DUPLICATE_NODE vm1/b")
        assert "two agents call themselves b; neither is believed until the other is stopped" in ran.err
        pair.processes["twin"].stop()
        row = pair.wait_state("vm1", "b", "IN_SYNC")
        assert row["cp"] == "1-1"
    assert list(place.iterdir()) == []


def test_no_space_on_the_target_is_3_and_says_how_much_to_free(pair: Cluster) -> None:
    with mounted("xfs", SMALL_DISK_BYTES) as small:
        pair.start_agent("c", {"vm1": small / "vm1.img"})
        pair.wait_reachable("vm1", "c")
        filler = small / "filler"
        with filler.open("wb") as file:
            stat = os.statvfs(small)
            os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - LEFT_BYTES)
        with unchanged(small):
            ran = pair.refused("resync", "vm1", reason="NO_SPACE vm1/c")
            assert re.search(rf"needs [\d,]+ bytes .* are free in {small}; free [\d,]+ more there", ran.err)
            assert pair.replicas("vm1")["c"]["state"] == "EMPTY"
        filler.unlink()
        pair.ok("resync", "vm1")
        assert identical(pair.image("a", "vm1"), small / "vm1.img")
        pair.processes["c"].stop()
        pair.ok("node", "remove", "c", "--yes")


def test_another_store_is_refused_until_it_is_adopted(pair: Cluster, disk: Path) -> None:
    images.write(pair.image("a", "vm1"), images.scattered(BYTES, 64, seed=5), seed=5)
    pair.processes["c1"].stop()
    edited(pair, "c1", (r"store\.db", "other.db")).rename(pair.directory / "c1.toml")
    with unchanged(disk / "a", disk / "b"):
        pair.restart("c1")
        for name in ("a", "b"):
            told = wait_for(lambda name=name: pair.node(name), f"{name} asks the other store's coordinator")
            assert not told["reachable"]
            assert [problem["reason"] for problem in told["problems"]] == ["WRONG_STORE"]
            adopt = told["problems"][0]["next_command"]
            assert adopt.startswith("resilver store adopt ")
            wait_for(lambda name=name, adopt=adopt: adopt in pair.log(name), f"{name} logs it")
        ran = pair.refused("resync", "vm1", reason="WRONG_STORE")
        assert adopt in ran.err
    pair.ok(*adopt.split()[1:], "--yes")
    pair.wait_reachable("vm1", "a", "b")
    assert pair.volume("vm1")["state"] == "RECOVERING"
    (run,) = pair.ok("resync", "vm1")["resyncs"]
    assert (run["action"], run["done_bytes"]) == ("DELTA", 64 * images.BLOCK)
    assert pair.volume("vm1")["state"] == "HEALTHY"
    assert identical(pair.image("a", "vm1"), pair.image("b", "vm1"))
