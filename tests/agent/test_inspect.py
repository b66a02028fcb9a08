"""Replicas as they lie on their disks, with no agent running: everything is told, and nothing is touched."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agent.inspect import main
from resilver.inspection import Inspection, load
from resilver.volume import Grant, LiveState, Presence, VolumeRecord
from tests.agent.backends.replica import VOLUME_ID, Replica


@pytest.fixture
def replica(tmp_path: Path) -> Replica:
    made = Replica(tmp_path / "a")
    made.create()
    return made


def look(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[Inspection, ...]:
    assert main([*map(str, arguments), "-o", "json"]) == 0
    return load(capsys.readouterr().out.encode())


def everything(directory: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in sorted(directory.rglob("*")):
        stat = path.stat()
        found[str(path)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


def test_every_way_to_name_a_replica_finds_the_same(replica: Replica, capsys: pytest.CaptureFixture[str]) -> None:
    replica.snapshot()
    root = replica.root
    seen = [
        look(capsys, path, "--node", "a")
        for path in (replica.path, root, root.parent, replica.directory, replica.directory / "." / "vm1.img")
    ]
    (first,) = seen[0]
    assert first.report is not None
    assert (first.node, first.volume, first.report.presence) == ("a", "vm1", Presence.PRESENT)
    for (other,) in seen[1:]:
        assert other.report is not None
        assert (other.volume, other.report.lineage, other.report.live) == (
            first.volume,
            first.report.lineage,
            first.report.live,
        )


def test_all_that_an_election_needs_is_there(replica: Replica, capsys: pytest.CaptureFixture[str]) -> None:
    tip = replica.snapshot()
    record = VolumeRecord("vm1", VOLUME_ID, 1, "E", "a", ("a", "b"), tip.cp, tip.id)
    replica.backend.save_record(record)
    replica.backend.save_grant(Grant(VOLUME_ID, 1, "E"))
    (found,) = look(capsys, replica.path)
    assert found.node == socket.gethostname()
    report = found.report
    assert report is not None
    assert (report.volume_id, report.record, report.grant) == (VOLUME_ID, record, Grant(VOLUME_ID, 1, "E"))
    assert report.lineage.tip_id == tip.id
    assert report.live.state is LiveState.UNMODIFIED
    replica.write(0, b"x")
    (found,) = look(capsys, replica.path)
    assert found.report is not None
    assert found.report.live.state is LiveState.MODIFIED


def test_nothing_is_touched(replica: Replica, capsys: pytest.CaptureFixture[str]) -> None:
    replica.snapshot()
    (replica.root / ".trash-x").mkdir()
    before = everything(replica.directory)
    look(capsys, replica.path)
    assert everything(replica.directory) == before


def test_of_an_agents_volumes_one_may_be_empty_and_one_may_be_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(tmp_path, vm1=tmp_path / "vm1.img", db1=tmp_path / "mnt" / "db1.img")
    vm1, db1 = look(capsys, config)
    assert vm1.report is not None
    assert db1.report is not None
    assert (vm1.report.presence, db1.report.presence) == (Presence.EMPTY, Presence.LOST)


def test_snapshots_without_a_live_copy(replica: Replica, capsys: pytest.CaptureFixture[str]) -> None:
    tip = replica.snapshot()
    replica.path.unlink()
    for path in (replica.path, replica.root):
        (found,) = look(capsys, path)
        assert found.report is not None
        assert (found.report.live.state, found.report.lineage.tip_id) == (LiveState.ABSENT, tip.id)


def configured(directory: Path, **volumes: Path) -> Path:
    """An agent.toml with these volumes; the first has priority 7."""
    config = directory / "agent.toml"
    tables = "".join(
        f'[[volumes]]\nname = "{name}"\nbackend = "image"\npath = "{path}"\npriority = {0 if index else 7}\n'
        for index, (name, path) in enumerate(volumes.items())
    )
    head = 'node = "alpha"\ncluster = "demo"\ncoordinators = ["127.0.0.1:7400"]\ninsecure = true\n'
    config.write_text(f'{head}state_dir = "{directory}/state"\n{tables}')
    return config


def test_an_agents_configuration_says_node_volumes_and_priority(
    replica: Replica, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replica.snapshot()
    config = configured(tmp_path, vm1=replica.path, db1=tmp_path / "db1.img")
    vm1, db1 = look(capsys, config)
    assert vm1.report is not None
    assert (vm1.node, vm1.volume, vm1.report.priority) == ("alpha", "vm1", 7)
    assert (db1.node, db1.volume) == ("alpha", "db1")
    assert [one.volume for one in look(capsys, config, "--volume", "db1")] == ["db1"]
    assert look(capsys, config, "--node", "beta")[0].node == "beta"
    assert not (tmp_path / "state").exists()


def test_several_replicas_in_one_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("vm1", "vm2"):
        (tmp_path / ".resilver" / name).mkdir(parents=True)
        (tmp_path / f"{name}.img").write_bytes(b"x" * 4096)
    assert [one.volume for one in look(capsys, tmp_path)] == ["vm1", "vm2"]
    assert [one.volume for one in look(capsys, tmp_path, "--volume", "vm2")] == ["vm2"]
    assert [one.volume for one in look(capsys, tmp_path, tmp_path / "vm1.img")] == ["vm1", "vm2"]
    (tmp_path / "disk.img").write_bytes(b"x")
    assert main([str(tmp_path / "disk.img")]) == 2
    assert "say which with --volume" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "nothing", ".resilver"])
def test_a_path_that_is_no_replicas(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    path.mkdir(exist_ok=True)
    assert main([str(path)]) == 2
    assert "holds no replica" in capsys.readouterr().err


def test_a_path_that_leads_to_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "vm1.img")]) == 2
    assert f"there is no replica at {tmp_path}/vm1.img" in capsys.readouterr().err


def test_a_replica_whose_records_are_damaged_is_told_and_not_guessed(
    replica: Replica, capsys: pytest.CaptureFixture[str]
) -> None:
    tip = replica.snapshot()
    (replica.root / tip.id / "record.json").write_text("{")
    assert main([str(replica.path), "-o", "json"]) == 1
    (found,) = load(capsys.readouterr().out.encode())
    assert (found.report, found.reason) == (None, "IO_ERROR")
    assert main([str(replica.path)]) == 1
    assert "cannot be read" in capsys.readouterr().out


def test_a_person_reads_it_too(replica: Replica, capsys: pytest.CaptureFixture[str]) -> None:
    tip = replica.snapshot()
    replica.backend.save_record(VolumeRecord("vm1", VOLUME_ID, 1, "E", "a", ("a", "b"), tip.cp, tip.id))
    assert main([str(replica.path), "--node", "a"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("vm1 on a: present\n")
    assert "epoch 1, primary a, newest CP 1-1, members a, b" in said
    assert f"1-1        {tip.id}" in said


def test_the_command_runs_it_and_hands_on_how_it_ended(replica: Replica, tmp_path: Path) -> None:
    replica.snapshot()

    def resilver(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "resilver.cli.main", "inspect", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    looked = resilver(replica.path, "--node", "a", "-o", "json")
    assert looked.returncode == 0, looked.stderr
    (tmp_path / "a.json").write_text(looked.stdout)
    other = Replica(tmp_path / "b")
    other.receive(replica, "")
    looked = resilver(other.directory, "--node", "b", "-o", "json")
    (tmp_path / "b.json").write_text(looked.stdout)
    compared = resilver("--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.startswith("vm1: a would be primary")
    assert resilver(tmp_path).returncode == 2
