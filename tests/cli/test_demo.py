"""The parts of the demo that need no cluster: the ground it stands on, its programs, and that nothing stays."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from resilver.cli.demo import ground
from resilver.cli.demo.cleanup import Cleanup
from resilver.cli.demo.processes import Program, free_ports, wait_for_port


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_undoing_goes_backwards_and_past_what_fails():
    done = []
    cleanup = Cleanup()

    def broken():
        raise OSError("busy")

    cleanup.add("first", lambda: done.append("first"))
    cleanup.add("second", broken)
    cleanup.add("third", lambda: done.append("third"))
    with pytest.raises(KeyboardInterrupt), cleanup:
        raise KeyboardInterrupt
    assert done == ["third", "first"]
    assert cleanup.failures == ["second: busy"]


def test_ctrl_c_does_not_interrupt_undoing():
    done = []

    def undo():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("undone")

    with Cleanup() as cleanup:
        cleanup.add("it", undo)
    assert done == ["undone"]
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_a_kill_ends_like_ctrl_c():
    with pytest.raises(KeyboardInterrupt), Cleanup():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_demo_in_the_background_can_be_interrupted():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), Cleanup():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_plain_ground_comes_and_goes(scratch, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with Cleanup() as cleanup:
        found = ground.prepare(cleanup)
        assert not found.shares_extents
        assert "not root" in found.kind
        assert found.space.is_dir()
    assert list(scratch.iterdir()) == []
    assert cleanup.failures == []


@pytest.mark.skipif(os.geteuid() != 0 or ground.tool("mkfs.xfs") is None, reason="mounting wants root and mkfs.xfs")
def test_xfs_ground_comes_and_goes(scratch):
    with Cleanup() as cleanup:
        found = ground.prepare(cleanup)
        if not found.shares_extents:
            pytest.skip(f"this machine mounts no loop devices: {found.kind}")
        (found.space / "file").write_bytes(b"x" * 4096)
        subprocess.run(["cp", "--reflink=always", found.space / "file", found.space / "clone"], check=True)
        disk = found.base / "xfs.img"
    assert cleanup.failures == []
    assert list(scratch.iterdir()) == []
    assert str(disk) not in Path("/proc/mounts").read_text()


@pytest.mark.skipif(ground.tool("mkfs.ext4") is None or ground.tool("debugfs") is None, reason="wants e2fsprogs")
def test_the_volume_stays_a_clean_file_system_when_its_files_change(tmp_path, monkeypatch):
    monkeypatch.setattr(ground, "RANDOM_FILES", 2)
    monkeypatch.setattr(ground, "TEXT_BYTES_MAX", 1 << 20)
    monkeypatch.setattr(ground, "VOLUME_BYTES", 128 << 20)
    seed = random.Random(1)
    path = tmp_path / "a" / "vm1.img"
    ground.make_volume(path, tmp_path, seed)
    blocks = ground.data_blocks(path)
    assert len(blocks) == len(set(blocks)) == 2 * ground.RANDOM_FILE_BYTES // ground.BLOCK
    before = ground.sha256(path)
    assert ground.overwrite(path, blocks[:100], seed) == 100 * 4096
    assert ground.sha256(path) != before
    assert ground.file_system_is_clean(path) is not False


def test_a_program_is_stopped_with_the_cleanup(tmp_path):
    port = free_ports(1)[0]
    listen = f"import socket, time; s = socket.socket(); s.bind(('127.0.0.1', {port})); s.listen(); time.sleep(60)"
    with Cleanup() as cleanup:
        program = Program("listener", [sys.executable, "-c", listen], tmp_path, cleanup)
        program.start()
        wait_for_port(program, port)
        pid = program.pid
    assert not Path(f"/proc/{pid}").exists()


def test_a_program_that_ends_by_itself_is_noticed(tmp_path):
    with Cleanup() as cleanup:
        program = Program("short", [sys.executable, "-c", "print('why')"], tmp_path, cleanup)
        program.start()
        with pytest.raises(ground.DemoFailed, match="short ended by itself"):
            wait_for_port(program, free_ports(1)[0])
        assert "why" in program.log_end()
