"""A small machine for what this host's kernel does not have: boots, runs one command, and is gone.

It is a kernel that runs as an ordinary process (User Mode Linux, Debian's `user-mode-linux`): its root is the host's,
read-only, so that the project, this very interpreter and every tool are there as they are; it has a disk of its own for
tests, another one with a file system on /mnt, and one directory of the host that results go to. It starts in two
seconds and computes nearly as fast as the host, which an emulated processor does not. Everything has a deadline.

It keeps to one of the host's processors: each of its system calls is a word between two processes, which costs ten
times as much where one processor has to wake another.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
KERNEL: Final = "linux.uml"
MODULES: Final = Path("/usr/lib/uml/modules")
TOOLS: Final = (
    KERNEL, "taskset", "setpriv", "lvm", "dmsetup", "thin_delta", "thin_dump", "thin_check", "mkfs.xfs", "mkfs.ext4",
    "modprobe", "losetup",
)  # fmt: skip
MEMORY: Final = Path("/dev/shm")
"""Where its disks are: they need not outlive it, and waiting for a real disk would double its time."""
MEMORY_MIB: Final = 1536
DISK_BYTES: Final = 8 << 30

LVM_CONF: Final = """\
devices { obtain_device_list_from_udev=0 external_device_info_source="none" use_devicesfile=0 scan_lvs=0
    types=["ubd", 16] filter=["a|^/dev/ubda$|", "r|.*|"] }
activation { udev_sync=0 udev_rules=0 verify_udev_operations=0 monitoring=0
    reserved_memory=256 reserved_stack=64 }
global { use_lvmpolld=0 event_activation=0 }
backup { backup=0 archive=0 }
"""

INIT: Final = """\
#!/bin/sh
export PATH={path} HOME=/root TMPDIR=/dev/shm PYTHONUTF8=1 PYTHONDONTWRITEBYTECODE=1 RESILVER_MACHINE=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o mode=755 run /run
mkdir -p /dev/shm /run/kernel/lib /run/results
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t ext4 -o noatime /dev/ubdb /mnt
mount -t hostfs -o {work}/results none /run/results
mount --bind {work}/lvm /etc/lvm
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
ln -s {modules} /run/kernel/lib/modules
modprobe -d /run/kernel -a dm_thin_pool dm_snapshot loop
ip link set lo up
cd {root} && {{ bash {work}/command </dev/null 2>&1; echo $? >/run/results/status; }} | tee /run/results/output
sync
echo o >/proc/sysrq-trigger
sleep 60
"""


@dataclass(frozen=True)
class Outcome:
    """What a run ended with; `files` are those that the command left in /run/results."""

    status: int
    output: str
    console: str
    files: dict[str, bytes]


def why_not() -> str:
    """Why no machine can run here; empty if one can."""
    missing = [name for name in TOOLS if shutil.which(name, path=_path()) is None]
    if missing or not MODULES.exists():
        return f"{', '.join(missing) or MODULES} is not installed: run deploy/setup.sh as root"
    return ""


def run(command: str, deadline_s: float, *, show: bool = False) -> Outcome:
    """Runs a shell command in a fresh machine, in the project's directory; results come from its /run/results."""
    with (
        tempfile.TemporaryDirectory(prefix="machine-") as name,
        tempfile.TemporaryDirectory(prefix="machine-", dir=MEMORY if MEMORY.is_dir() else None) as disks,
    ):
        work = Path(name)
        results, console = work / "results", work / "console"
        results.mkdir()
        (work / "lvm").mkdir()
        (work / "lvm/lvm.conf").write_text(LVM_CONF)
        (work / "command").write_text(command + "\n")
        init = work / "init"
        init.write_text(INIT.format(path=_path(), work=work, modules=MODULES, root=ROOT))
        init.chmod(0o755)
        for disk in ("disk", "files"):
            with (Path(disks) / disk).open("wb") as file:
                file.truncate(DISK_BYTES)
        mkfs = [shutil.which("mkfs.ext4", path=_path()) or "mkfs.ext4", "-q", "-F", f"{disks}/files"]
        subprocess.run(mkfs, check=True, timeout=60, capture_output=True)
        if show:
            sys.stdout.write(f"tail -f {results / 'output'}\n")
            sys.stdout.flush()
        with console.open("wb") as out:
            started = subprocess.Popen(
                _machine(work, Path(disks)), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        late = ""
        try:
            started.wait(deadline_s)
        except subprocess.TimeoutExpired:
            late = f"not done within {deadline_s:g} s\n"
        finally:
            # Its processes are processes of the host, in a group of their own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        files = {path.name: path.read_bytes() for path in results.iterdir()}
        output = files.pop("output", b"").decode(errors="replace") + late
        status = -1 if late else int(files.pop("status", b"-1"))
        return Outcome(status, output, console.read_text(errors="replace"), files)


def _machine(work: Path, disks: Path) -> list[str]:
    return [
        "taskset", "-c", str(max(os.sched_getaffinity(0))), "setpriv", "--pdeathsig", "KILL",
        KERNEL, f"mem={MEMORY_MIB}M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet",
        f"init={work}/init", f"ubd0={disks}/disk", f"ubd1={disks}/files", "con=null", "con0=null,fd:1", "panic=-1",
    ]  # fmt: skip


def _path() -> str:
    return os.pathsep.join(dict.fromkeys([*os.environ.get("PATH", "").split(os.pathsep), "/usr/sbin", "/sbin"]))


def inside(*options: str) -> str:
    """The command that runs tests in there, with a report in /run/results/junit.xml."""
    fixed = "-p no:hypothesispytest -p no:xdist -p no:anyio -p no:cacheprovider --junitxml=/run/results/junit.xml"
    return f"{sys.executable} -m pytest {fixed} --timeout=900 {' '.join(options)}"
