"""What `image` needs of root's rights: `python -m tests.agent.capable each|enough DIRECTORY CAP…`, as root.

Does everything that takes a right, in a process that has these capabilities and no others; with `each`, then again once
without each of them. Prints a JSON object: the capability that was missing ("" for none) -> the steps that failed, why.
DIRECTORY is on a file system that shares extents and may be frozen for a moment.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from agent.disk import freeze
from agent.disk.inuse import Lease, users_of
from agent.hooks import Hooked, HookWatch
from resilver.config import Hooks
from resilver.errors import ResilverError
from tests.agent.backends.kinds.image import ImageReplica
from tests.agent.backends.registry import KINDS

OWNER = 61_234
NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
)  # fmt: skip
NUMBERS = {f"CAP_{name}": number for number, name in enumerate(NAMES)}
LAST = 40
PR_CAPBSET_DROP = 24
VERSION_3 = 0x20080522


def limit_to(names: set[str]) -> None:
    """From here on this process, and whatever it starts, has these capabilities."""
    libc = ctypes.CDLL(None, use_errno=True)
    kept = {NUMBERS[name] for name in names}
    for number in range(LAST + 1):
        if number not in kept:
            libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    bits = sum(1 << number for number in kept)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    header = (ctypes.c_uint32 * 2)(VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    if libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def given_away(*paths: Path, mode: int) -> None:
    """To a user who lets nobody else in."""
    for path in paths:
        os.chown(path, OWNER, OWNER)
        path.chmod(mode)


class Scene:
    """Two replicas of another user's, made with all rights."""

    def __init__(self, directory: Path) -> None:
        kind = next(one for one in KINDS if one.name == "image-xfs")
        self.directory = directory
        self.one, self.other = (ImageReplica(directory / node) for node in ("a", "b"))
        self.one.kind = self.other.kind = kind
        self.one.create()
        self.base = self.one.snapshot()
        self.other.receive(self.one)
        self.one.change(1)
        for each in (self.one, self.other):
            given_away(each.path, mode=0o640)
            given_away(each.directory, mode=0o700)
        self.user = subprocess.Popen(
            ["/bin/sh", "-c", "exec 3<&0; echo; exec sleep 60"],
            stdin=self.one.path.open("rb"),
            stdout=subprocess.PIPE,
            user=OWNER,
            group=OWNER,
            extra_groups=[],
        )
        assert self.user.stdout is not None
        self.user.stdout.readline()

    def close(self) -> None:
        self.user.kill()
        self.user.wait()

    # ------------------------------------------------------------ what takes a right

    def snapshot_and_receive(self) -> None:
        self.one.snapshot()
        self.other.receive(self.one, self.base.id)
        assert self.other.contents() == self.one.contents()
        found = self.other.path.stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (OWNER, OWNER, 0o640)

    def lease(self) -> None:
        with Lease(self.other.path) as lease:
            assert lease.certain

    def who(self) -> None:
        assert any(f"pid {self.user.pid}" in user.name for user in users_of(self.one.path.stat()))

    def frozen(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        freeze.freeze(fd)
        freeze.thaw(fd)
        os.close(fd)

    def hook(self) -> None:
        """One of another user's that hangs: it is started, and ended in time."""
        hooks = Hooks(before=("/bin/sleep", "3"), after=(), timeout_s=0.3, user="nobody")
        records = Path(tempfile.mkdtemp(dir=self.directory))
        why = ""
        try:
            HookWatch.begin(records, "a", "", [Hooked("vm1", hooks)]).end()
        except ResilverError as error:
            why = error.message
        assert "did not end within" in why, why


STEPS: tuple[Callable[[Scene], None], ...] = (
    Scene.lease,
    Scene.who,
    Scene.snapshot_and_receive,
    Scene.frozen,
    Scene.hook,
)


def tried(directory: Path, names: set[str]) -> dict[str, str]:
    """The steps that fail with these capabilities, in a process of its own."""
    directory.mkdir()
    scene = Scene(directory)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        failed = {}
        limit_to(names)
        for step in STEPS:
            try:
                step(scene)
            except (OSError, AssertionError, ResilverError) as error:
                failed[step.__name__] = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(failed).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        said = answer.read()
    os.waitpid(child, 0)
    scene.close()
    return json.loads(said)


def main(directory: Path, names: set[str], *, each: bool) -> None:
    without = ["", *(sorted(names) if each else ())]
    found = {missing: tried(directory / (missing or "all"), names - {missing}) for missing in without}
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[2]), set(sys.argv[3:]), each=sys.argv[1] == "each")
