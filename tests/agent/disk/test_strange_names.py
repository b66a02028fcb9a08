"""Names that other users choose: a program's, a mount's. None of them stops a look at who uses a volume."""

from __future__ import annotations

import subprocess
import sys

from agent.disk import inuse, loops, mounted

HOLD = """
import ctypes, sys
ctypes.CDLL(None).prctl(15, b"\\xff\\xfe\\n:x", 0, 0, 0)
file = open(sys.argv[1], "rb")
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_program_whose_name_is_no_text_is_named_all_the_same(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"ready\n"
        found = inuse.users_of(path.stat())
        assert [f"pid {holder.pid}" in user.name for user in found] == [True]
        holder.stdin.close()


def test_only_a_new_line_ends_a_line_of_a_mountinfo(tmp_path):
    """A user may mount in a namespace of his own, at a directory that he calls what he likes."""
    path = tmp_path / "mountinfo"
    odd = "/mnt/\x0c\u2028\x85\r x".encode() + b"\xff"
    line = b"36 35 98:0 / %b rw,noatime shared:1 - ext4 /dev/sdb1 rw\n" % odd.replace(b" ", b"\\040")
    path.write_bytes(line + b"torn\n" + b"37 35 98:1 / /mnt/two rw - ext4 /dev/sdc1 rw\n")
    assert [mount.device for mount in loops._parse(path, tmp_path)] == ["98:0", "98:1"]
    assert loops._parse(path, tmp_path)[0].point.encode(errors="surrogateescape") == odd
    assert [place.mount_id for place in mounted._parse(path, "/dev/sdb1", own=True)] == ["36"]
