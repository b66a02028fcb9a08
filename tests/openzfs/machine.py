"""A machine with the kernel's OpenZFS: boots, runs one command, and is gone.

An emulated one (qemu without the help of the host's processor, so that it runs anywhere), ten times slower than the
host. Its root is the host's, read-only, under a layer in memory: the project, this very interpreter and every tool are
there as they are, and OpenZFS' tools besides. `deploy/openzfs-setup.sh` makes what it boots. Everything has a deadline,
and every process of it dies with this one.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.vm.machine import Outcome

ROOT: Final = Path(__file__).parents[2]
BOOTED: Final = ROOT / ".openzfs"
FILE_SERVERS: Final = (Path("/usr/lib/qemu/virtiofsd"), Path("/usr/libexec/virtiofsd"))
MEMORY_MIB: Final = 6144
START_S: Final = 20.0

COMMAND: Final = """\
export PATH={path} HOME=/root TMPDIR=/dev/shm PYTHONUTF8=1 PYTHONDONTWRITEBYTECODE=1
export RESILVER_MACHINE=1 RESILVER_TEST_OPENZFS=1 RESILVER_THOROUGH={thorough}
ip link set lo up
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
cd {root}
{{ {command} </dev/null 2>&1; echo $? >/run/results/status; }} | tee /run/results/output
"""


def why_not() -> str:
    """Why no machine can run here; empty if one can."""
    if os.geteuid() != 0:
        return "only root can show the machine the host's files"
    missing = [str(path) for path in (BOOTED / "vmlinuz", BOOTED / "initramfs") if not path.exists()]
    missing += [name for name in ("qemu-system-x86_64", "setpriv") if shutil.which(name) is None]
    if not any(path.exists() for path in FILE_SERVERS):
        missing.append("virtiofsd")
    return f"{', '.join(missing)} is not there: run deploy/openzfs-setup.sh" if missing else ""


def run(command: str, results: Path, deadline_s: float) -> Outcome:
    """Runs a shell command in a fresh machine, in the project's directory. Its /run/results is `results`, where its
    output can be followed.
    """
    text = COMMAND.format(
        path=_path(),
        root=shlex.quote(str(ROOT)),
        command=command,
        thorough=shlex.quote(os.environ.get("RESILVER_THOROUGH", "1")),
    )
    (results / "command").write_text(text)
    late = ""
    with (
        tempfile.TemporaryDirectory(prefix="openzfs-") as name,
        _file_server(Path(name), "root", Path("/"), "always") as root,
        _file_server(Path(name), "results", results, "none") as shown,
        (results / "console").open("wb") as console,
        _process(_machine(root, shown), console.fileno()) as machine,
    ):
        try:
            machine.wait(deadline_s)
        except subprocess.TimeoutExpired:
            late = f"not done within {deadline_s:g} s\n"
    files = {path.name: path.read_bytes() for path in results.iterdir()}
    output = files.pop("output", b"").decode(errors="replace") + late
    status = -1 if late else int(files.pop("status", b"-1"))
    return Outcome(status, output, files.pop("console").decode(errors="replace"), files)


@contextlib.contextmanager
def _process(command: list[str], out: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with the block, or with this process, and so is what it started."""
    started = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=out,
        start_new_session=True,
    )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


@contextlib.contextmanager
def _file_server(work: Path, tag: str, directory: Path, cache: str) -> Iterator[list[str]]:
    """Shows a directory to the machine; the options that qemu finds it by."""
    socket, log = work / tag, work / f"{tag}.log"
    server = next(path for path in FILE_SERVERS if path.exists())
    command = [
        str(server), f"--socket-path={socket}", "-o",
        f"source={directory},cache={cache},sandbox=chroot,xattr", "--thread-pool-size=0",
    ]  # fmt: skip
    with log.open("wb") as out, _process(command, out.fileno()) as process:
        deadline = time.monotonic() + START_S
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{server} does not serve {directory}: {log.read_text(errors='replace')}")
            time.sleep(0.05)  # until a deadline: it tells nobody that it listens
        yield [
            "-chardev", f"socket,id={tag},path={socket}",
            "-device", f"vhost-user-fs-pci,queue-size=1024,chardev={tag},tag={tag}",
        ]  # fmt: skip


def _machine(*shares: list[str]) -> list[str]:
    # One of the first processors with all that OpenZFS' checksums want: a newer one is not emulated any faster.
    return [
        "qemu-system-x86_64", "-M", "q35,memory-backend=memory", "-cpu", "Nehalem", "-smp", "2",
        "-accel", "tcg,thread=multi,tb-size=1024", "-m", str(MEMORY_MIB),
        "-object", f"memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on",
        "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
        "-kernel", str(BOOTED / "vmlinuz"), "-initrd", str(BOOTED / "initramfs"),
        "-append", "console=ttyS0 quiet panic=-1 mitigations=off",
        *(word for share in shares for word in share),
    ]  # fmt: skip


def _path() -> str:
    return os.pathsep.join(dict.fromkeys([*os.environ.get("PATH", "").split(os.pathsep), "/usr/sbin", "/sbin"]))
