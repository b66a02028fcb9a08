"""Whoever comes after an agent that was killed waits for the commands which that agent has left running."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from agent.backends.image_layout import Layout as Files
from agent.backends.lvm_place import Place
from agent.backends.zfs_layout import Layout
from agent.disk import orphans
from agent.disk.zfs_mounts import MOUNT_AND_UNMOUNT
from resilver.errors import Damaged
from tests.cluster import wait_for

NAME = f"renamer-{os.getpid()}"
COMMAND = ["bash", "-c", f"exec -a /usr/sbin/{NAME} sleep 600"]


def left_behind() -> int:
    """A command whose starter has ended; its pid."""
    script = f"exec -a /usr/sbin/{NAME} sleep 600 >/dev/null 2>&1 & echo $!"
    done = subprocess.run(["bash", "-c", f"({script})"], capture_output=True, text=True, check=True, timeout=30)
    pid = int(done.stdout)
    command = Path(f"/proc/{pid}/cmdline")
    wait_for(lambda: command.read_bytes().startswith(f"/usr/sbin/{NAME}\0".encode()), "it has its name")
    return pid


def mine(program: str, arguments: list[str]) -> bool:
    return (program, arguments) == (NAME, ["600"])


def test_a_command_that_was_left_is_waited_for():
    pid = left_behind()
    thread = threading.Thread(target=orphans.wait, args=(mine,), daemon=True)
    try:
        thread.start()
        thread.join(0.5)
        assert thread.is_alive(), "it still runs"
        orphans.wait(lambda _program, _arguments: False)
    finally:
        os.kill(pid, signal.SIGKILL)
    thread.join(30)
    assert not thread.is_alive()


def test_one_that_does_not_end_is_named(monkeypatch):
    pid = left_behind()
    monkeypatch.setattr(orphans, "WAIT_MAX_S", 0.1)
    try:
        with pytest.raises(Damaged, match=NAME):
            orphans.wait(mine)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_what_this_process_has_started_itself_is_its_own_affair():
    with subprocess.Popen(COMMAND) as child:
        try:
            orphans.wait(mine)
        finally:
            child.kill()


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ("zfs rename tank/vm tank/vm.resilver/kept-1", True),
        ("zfs snapshot -o x=y tank/vm@p", True),
        ("zfs set readonly=on tank/vm.resilver/stage", True),
        ("zfs send -i tank/vm@p tank/vm@q", False),
        ("zfs rename tank/vm2 tank/vm3", False),
        ("zfs", False),
        ("umount -t zfs tank/vm", True),
        ("mount -t zfs -- tank/vm /srv", True),
        ("mount -t zfs -- tank/vm2 /srv", False),
        ("sh backup.sh tank/vm", False),
    ],
)
def test_which_commands_change_a_replica(words, ours):
    layout = Layout("vm", "tank/vm", Files("vm", Path("/x"), Path("/y")))
    program, *arguments = words.split()
    assert layout.concerns(program, arguments) is ours


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ("lvm lvrename vg vm1 vm1.r-00000001", True),
        ("lvm lvchange -ay -K vg/vm1", True),
        ("lvm lvcreate -y -s -n vm1.r-00000001 vg/vm1", True),
        ("lvm lvremove -y vg/vm1.r-00000001", True),
        ("lvm lvresize -y -f -L 8388608b vg/vm1.r-00000001", True),
        ("lvm lvchange -ay vg2/vm1", False),
        ("lvm lvpoll --polloperation pvmove --interval 15 vg/pvmove0", False),
        ("lvm lvs -a vg", False),
        ("lvm", False),
        ("lvrename vg vm1 vm2", False),
    ],
)
def test_which_commands_change_a_thin_volume(words, ours):
    place = Place("vm", Path("vg/vm1"), Path("/x"), lambda _step: None)
    program, *arguments = words.split()
    assert place.concerns(program, arguments) is ours


def test_a_mount_for_a_moment_changes_a_replica():
    layout = Layout("vm", "tank/vm", Files("vm", Path("/x"), Path("/y")))
    assert layout.concerns("sh", ["-c", MOUNT_AND_UNMOUNT, "sh", "tank/vm", "/y"])
    assert not layout.concerns("sh", ["-c", MOUNT_AND_UNMOUNT, "sh", "tank/vm2", "/y"])
