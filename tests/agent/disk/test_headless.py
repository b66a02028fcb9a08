"""A process whose first thread has ended is seen to use what its other threads have: files, mounts, devices."""

from __future__ import annotations

import pytest

from agent.disk import blockdev, btrfs_use, inuse, loops, mounted, proc
from tests.headless import headless
from tests.loopfs import attached, needs_root, run
from tests.loopfs import mounted as file_system


@pytest.mark.parametrize(
    ("hold", "writes"),
    [
        ("held = open(sys.argv[1], 'r+b')", True),
        ("held = open(sys.argv[1], 'rb')", False),
        ("f = open(sys.argv[1], 'r+b'); held = mmap.mmap(f.fileno(), 0); f.close()", True),
    ],
)
def test_a_file(tmp_path, hold, writes):
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    with headless(hold, path) as process:
        [found] = inuse.users_of(path.stat())
    assert found.name.endswith(f" pid {process.pid}")
    assert found.writes is writes
    assert inuse.users_of(path.stat()) == []


@needs_root
@pytest.mark.parametrize(
    "hold",
    [
        "held = open(sys.argv[1] + '/new', 'w')",
        "os.chdir(sys.argv[1])",
        "os.chroot(sys.argv[1])",
        "f = open(sys.argv[1] + '/new', 'w+b'); f.truncate(4096); held = mmap.mmap(f.fileno(), 0); f.close()",
    ],
)
def test_a_mount(hold):
    with file_system("ext4", 64 << 20) as point:
        source = run("findmnt", "-n", "-o", "SOURCE", point).strip()
        with headless(hold, point) as process:
            [found] = mounted.users(mounted.places(source))
        assert found.endswith(f" pid {process.pid}")


@needs_root
def test_a_mount_in_a_namespace_of_its_own(tmp_path):
    """Nobody else lives in it: the namespace is found by the threads that are left."""
    hold = (
        "libc = ctypes.CDLL(None); assert libc.unshare(0x20000) == 0; "
        "assert libc.mount(b'none', b'/', None, (1 << 14) | (1 << 18), None) == 0; "
        "assert libc.mount(b'its-own', sys.argv[1].encode(), b'tmpfs', 0, None) == 0; "
        "held = open(sys.argv[1] + '/new', 'w')"
    )
    with headless(hold, tmp_path) as process:
        [place] = mounted.places("its-own")
        assert (place.point, place.own) == (str(tmp_path), False)
        assert [name.rpartition(" ")[2] for name in mounted.users([place])] == [str(process.pid)]
        assert [mount.point for mount in loops.all_mounts() if mount.source == "its-own"] == [str(tmp_path)]
    assert mounted.places("its-own") == []


@needs_root
@pytest.mark.parametrize(("mode", "writes"), [("r+b", True), ("rb", False)])
def test_a_block_device(tmp_path, mode, writes):
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    with attached(tmp_path / "disk") as device:
        number = device.stat().st_rdev
        with headless(f"held = open(sys.argv[1], {mode!r})", device) as process:
            [found] = blockdev.users_of(number)
        assert found.name.endswith(f" pid {process.pid}")
        assert found.writes is writes


@needs_root
@pytest.mark.parametrize(
    ("hold", "writes"),
    [
        ("held = open(sys.argv[1] + '/a', 'r+b')", True),
        ("f = open(sys.argv[1] + '/a', 'r+b'); held = mmap.mmap(f.fileno(), 0); f.close()", True),
        ("os.chdir(sys.argv[1])", False),
    ],
)
def test_a_subvolume(hold, writes):
    with file_system("btrfs", 256 << 20) as point:
        live = point / "live"
        run("btrfs", "subvolume", "create", live)
        (live / "a").write_bytes(bytes(4096))
        with headless(hold, live) as process:
            [found] = btrfs_use.users_of(live)
        assert found.name.endswith(f" pid {process.pid}")
        assert found.writes is writes
        assert btrfs_use.users_of(live) == []


def test_what_a_thread_of_the_kernel_is():
    assert not proc.is_kernel("/proc/self")
    assert list(proc.bearers("/proc/self")) == ["/proc/self"]
    with headless("pass") as process:
        assert not proc.is_kernel(f"/proc/{process.pid}")
        first, *others = proc.bearers(f"/proc/{process.pid}")
        assert first == f"/proc/{process.pid}"
        assert first not in others
        assert [len(proc.descriptors(other)) > 0 for other in others] == [True]
    if proc.command_of("/proc/2") == "kthreadd":  # elsewhere than in a container
        assert proc.is_kernel("/proc/2")
