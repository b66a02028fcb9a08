"""The systemd units: that systemd takes them, and that the agent's rights are enough for `image`, none too many."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.acceptance import images
from tests.agent.capable import NUMBERS, OWNER
from tests.cluster import Cluster, wait_for
from tests.loopfs import mounted, needs_root

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
AGENT = (DEPLOY / "resilver-agent.service").read_text()
PAGE = (DEPLOY.parent / "docs" / "reference" / "systemd.md").read_text()
MIB = 1 << 20


def listed(text: str) -> list[str]:
    """The capabilities of a part of a unit, as it lists them."""
    return [name for line in re.findall(r"^CapabilityBoundingSet=(.*)$", text, re.MULTILINE) for name in line.split()]


OF_IMAGE = listed(AGENT.split("# ---- capabilities, for `image`", 1)[1].split("# ---- for `btrfs`", 1)[0])
OF_BTRFS = listed(AGENT.split("# ---- for `btrfs`", 1)[1].split("# ---- for `lvm-thin`", 1)[0])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
@pytest.mark.parametrize("unit", UNITS, ids=[unit.name for unit in UNITS])
def test_systemd_takes_the_unit(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text()
    program = re.search(r"^ExecStart=(\S+)", text, re.MULTILINE)
    assert program is not None
    copy = tmp_path / unit.name
    # The program and the user are there where it is installed.
    copy.write_text(text.replace(program[1], "/bin/true").replace("=resilver\n", "=daemon\n"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    about = [line for line in (done.stderr + done.stdout).splitlines() if unit.name in line]
    assert not about
    assert "Failed" not in done.stderr, done.stderr


def test_the_units_say_what_they_mean() -> None:
    assert {unit.name for unit in UNITS} == {"resilver-agent.service", "resilver-coordinator.service"}
    for unit in UNITS:
        for line in unit.read_text().splitlines():
            assert not line or line[0] in "#[" or re.fullmatch(r"[A-Z][A-Za-z]+=.*", line), line
    assert set(listed(AGENT)) <= set(NUMBERS)
    assert len(OF_IMAGE) == len(set(OF_IMAGE)) == 9
    assert listed((DEPLOY / "resilver-coordinator.service").read_text()) == []
    # What would hide mounts from the agent, or its own from everybody else, is not in its unit.
    assert not re.search(r"^(Protect|Private|ReadOnly|Inaccessible|Bind|Mount|Root)\w*=", AGENT, re.MULTILINE)


def test_the_page_has_a_word_on_each_right() -> None:
    assert not {name for name in listed(AGENT) if f"`{name}`" not in PAGE}
    keys = {key for unit in UNITS for key in re.findall(r"^([A-Z]\w+)=", unit.read_text(), re.MULTILINE)}
    sandboxing = {key for key in keys if re.match(r"Protect|Private|Restrict|Lock|System|NoNew|KillMode|Keyring", key)}
    assert not {key for key in sandboxing if f"`{key}" not in PAGE}


def missed(how: str) -> dict[str, dict[str, str]]:
    """For each right that is taken away, what fails without it; "" for none."""
    with mounted("xfs", 1 << 30) as disk:
        done = subprocess.run(
            [sys.executable, "-m", "tests.agent.capable", how, str(disk), *OF_IMAGE],
            capture_output=True, text=True, timeout=110, check=False, cwd=DEPLOY.parent,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_root
def test_with_those_that_are_listed_everything_works() -> None:
    assert missed("enough") == {"": {}}


@needs_root
def test_without_any_one_of_them_something_fails() -> None:
    found = missed("each")
    assert found.pop("") == {}
    assert set(found) == set(OF_IMAGE)
    assert not {name for name, failed in found.items() if not failed}, "a right that nothing misses is taken off"


class Bounded(Cluster):
    """A cluster whose agents have these capabilities, and no others."""

    rights: Sequence[str] = OF_IMAGE

    def within(self, name: str, command: list[str]) -> list[str]:
        if name not in ("a", "b"):
            return command
        bound = ",".join(["-all", *(f"+{one.removeprefix('CAP_').lower()}" for one in self.rights)])
        return ["setpriv", f"--bounding-set={bound}", "--inh-caps=-all", *command]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Bounded]:
    made = Bounded(tmp_path, "sqlite")
    try:
        made.start_coordinator()
        yield made
    finally:
        made.close()


@needs_root
def test_an_agent_mirrors_another_users_image_under_exactly_these(cluster: Cluster) -> None:
    with mounted("xfs", 1 << 30) as disk:
        for node in ("a", "b"):
            (disk / node).mkdir()
        image = disk / "a" / "vm1.img"
        images.make(image, 16 * MIB, 8 * MIB, seed=1, stripe_bytes=MIB)
        for node in ("a", "b"):
            os.chown(disk / node, OWNER, OWNER)
            (disk / node).chmod(0o700)
        os.chown(image, OWNER, OWNER)
        image.chmod(0o600)
        for node in ("a", "b"):
            cluster.start_agent(node, {"vm1": disk / node / "vm1.img"})
        cluster.wait_reachable("vm1", "a", "b")
        wanted = sum(1 << NUMBERS[name] for name in OF_IMAGE)
        for node in ("a", "b"):
            status = Path(f"/proc/{cluster.processes[node].pid}/status").read_text()
            has = re.findall(r"^Cap(?:Prm|Eff|Bnd):\s+(\w+)", status, re.MULTILINE)
            assert [int(one, 16) for one in has] == [wanted] * 3
        cluster.ok("resync", "vm1")
        with image.open("r+b") as file:
            file.seek(3 * MIB)
            file.write(os.urandom(MIB))
        cluster.ok("resync", "vm1")
        copy = disk / "b" / "vm1.img"
        assert copy.read_bytes() == image.read_bytes()
        holder = subprocess.Popen(["sleep", "60"], stdin=copy.open("rb"), user=OWNER, group=OWNER, extra_groups=[])
        try:
            wait_for(
                lambda: f"pid {holder.pid}" in str([one["live"] for one in cluster.replicas("vm1").values()]),
                "the one who has it open is named",
            )
        finally:
            holder.kill()
            holder.wait()
        cluster.close()


def tree_with_everything(tree: Path) -> None:
    """A subvolume with what takes a right to be made."""
    subprocess.run(["btrfs", "-q", "subvolume", "create", tree], check=True, timeout=30)
    for name, mode in (("file", 0o600), ("set-id", 0o6755), ("capable", 0o755)):
        (tree / name).write_bytes(os.urandom(64 << 10))
        os.chown(tree / name, OWNER, OWNER)
        (tree / name).chmod(mode)
    os.mknod(tree / "null", 0o20666, os.makedev(1, 3))
    os.setxattr(tree / "file", "trusted.word", b"1")
    os.setxattr(tree / "capable", "security.capability", struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0))


def seen_in(tree: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(tree.iterdir()) if tree.is_dir() else ():
        at = path.lstat()
        attributes = {name: os.getxattr(path, name) for name in os.listxattr(path)}
        content = path.read_bytes() if path.is_file() else b""
        found[path.name] = (at.st_mode, at.st_uid, at.st_gid, at.st_rdev, attributes, content)
    return found


@needs_root
@pytest.mark.parametrize("missing", ["", *OF_BTRFS])
def test_an_agent_mirrors_a_tree_under_these_and_not_with_one_less(cluster: Bounded, missing: str) -> None:
    cluster.rights = [one for one in (*OF_IMAGE, *OF_BTRFS) if one != missing]
    with mounted("btrfs", 1 << 30) as disk:
        for node in ("a", "b"):
            (disk / node).mkdir()
        tree, copy = disk / "a" / "data", disk / "b" / "data"
        tree_with_everything(tree)
        for node in ("a", "b"):
            cluster.start_agent(node, {"data": disk / node / "data"}, backend="btrfs")
        cluster.wait_reachable("data", "a", "b")
        cluster.cli("resync", "data", timeout_s=60)
        assert (seen_in(copy) == seen_in(tree)) is (missing == "")
        cluster.close()
