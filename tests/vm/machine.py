"""A small virtual machine for what this host's kernel does not have: boots, runs one command, and is gone.

It has four disks: the image that it starts from (writes to it are thrown away), a tar archive with the project and the
command, a disk that its results are written to as a tar archive, and an empty one for tests. Everything has a deadline.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.vm.image import Kernel, Missing, base_image, compile_below, initramfs

ROOT: Final = Path(__file__).parents[2]
SOURCES: Final = ("agent", "coordinator", "resilver", "tests/vm", "tests/agent/backends", "pyproject.toml")
MEMORY_MIB: Final = 1536
RESULT_BYTES: Final = 32 << 20
DISK_BYTES: Final = 2 << 30


@dataclass(frozen=True)
class Outcome:
    """What a run ended with; `files` are those that the command left in /results."""

    status: int
    output: str
    console: str
    files: dict[str, bytes]


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resilver-tests"


def why_not() -> str:
    """Why no machine can run here; empty if one can."""
    if shutil.which("qemu-system-x86_64") is None:
        return "qemu-system-x86_64 is not installed: run deploy/setup.sh as root"
    try:
        Kernel.find()
    except Missing as missing:
        return str(missing)
    return ""


def run(command: str, deadline_s: float, *, show: bool = False) -> Outcome:
    """Runs a shell command in a fresh machine, in the project's directory; results come from its /results."""
    kernel = Kernel.find()
    image = base_image(kernel, cache())
    with tempfile.TemporaryDirectory(prefix="machine-") as name:
        work = Path(name)
        if show:
            sys.stdout.write(f"tail -f {work / 'console'}\n")
            sys.stdout.flush()
        (work / "initrd").write_bytes(initramfs(kernel))
        _pack(work / "in", command)
        _sparse(work / "out", RESULT_BYTES)
        _sparse(work / "disk", DISK_BYTES)
        console = work / "console"
        started = subprocess.Popen(
            _qemu(kernel, image, work), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            _, said = started.communicate(timeout=deadline_s)
            late = ""
        except subprocess.TimeoutExpired:
            late = f"not done within {deadline_s:g} s\n"
        finally:
            started.kill()
            started.wait()
        text = console.read_text(errors="replace") if console.exists() else ""
        if late:
            return Outcome(-1, late, text, {})
        return _unpack(work / "out", text + said.decode(errors="replace"))


def _qemu(kernel: Kernel, image: Path, work: Path) -> list[str]:
    # An old processor and fixed addresses: what is emulated is three times as fast as with all that there is.
    disks = [(image, "raw", "snapshot=on")]
    disks += [(work / name, "raw", "discard=unmap,detect-zeroes=off") for name in ("in", "out", "disk")]
    command = [
        "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "Nehalem",
        "-smp", "2", "-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-serial", f"file:{work / 'console'}", "-kernel", str(kernel.image), "-initrd", str(work / "initrd"),
        "-append", "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off norandmaps no_timer_check nowatchdog",
    ]  # fmt: skip
    for number, (path, kind, options) in enumerate(disks):
        command += ["-drive", f"if=none,id=d{number},file={path},format={kind},cache=unsafe,{options}"]
        command += ["-device", f"virtio-blk-pci,drive=d{number}"]
    return command


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _pack(path: Path, command: str) -> None:
    """The project where it is on the host, compiled: that is what would take longest in there."""
    tree = path.with_name("project")
    for name in (*SOURCES, *(f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py"))):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, tree / name)
    compile_below(tree, ROOT)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(tree, str(ROOT).lstrip("/"))
        script = f"cd {ROOT}\n{command}\n".encode()
        entry = tarfile.TarInfo("task/run")
        entry.size = len(script)
        archive.addfile(entry, io.BytesIO(script))


def _unpack(path: Path, console: str) -> Outcome:
    try:
        with tarfile.open(path) as archive:
            files = {
                entry.name.removeprefix("./"): archive.extractfile(entry).read()  # type: ignore[union-attr]
                for entry in archive
                if entry.isfile()
            }
    except tarfile.ReadError:
        return Outcome(-1, "the machine ended without a result\n", console, {})
    return Outcome(int(files.pop("status", b"-1")), files.pop("output", b"").decode(errors="replace"), console, files)


def inside(*options: str) -> str:
    """The command that runs tests in there, with a report in /results/junit.xml."""
    fixed = "-p no:hypothesispytest -p no:xdist -p no:anyio --junitxml=/results/junit.xml --timeout=900"
    return f"RESILVER_MACHINE=1 {sys.executable} -m pytest {fixed} {' '.join(options)}"
