"""What other programs and the kernel print: mounts, `zfs`, `lvs`, `thin_delta`, a thin pool's status."""

from __future__ import annotations

import contextlib
import os
from xml.parsers import expat

from agent.backends import zfs_send
from agent.disk import loops, lvm, mounted, thin, zfs
from fuzz.target import fresh, target
from resilver.errors import Damaged, Exhausted


@target("mountinfo", form="text")
def mountinfo(data: bytes) -> None:
    """The mounts of a process: whoever may mount in a namespace of his own chooses most of it."""
    with fresh("mounts") as directory:
        path = directory / "mountinfo"
        path.write_bytes(data)
        found = loops._parse(path, directory)  # noqa: SLF001 - the parser itself, here and below
        for mount in found:
            os.path.lexists(mount.reach)
            list(mounted._parse(path, mount.source, own=True))  # noqa: SLF001
        list(mounted._parse(path, "/dev/loop0", own=False))  # noqa: SLF001
        lines = [line for line in data.split(b"\n") if line.count(b" - ") == 1]
        assert len(found) <= len(data.split(b"\n"))
        assert len(found) >= sum(len(line.partition(b" - ")[0].split(b" ")) == 10 for line in lines if _whole(line))
        _again(path, found)


def _whole(line: bytes) -> bool:
    return len(line.partition(b" - ")[2].split(b" ")) >= 3


def _again(path: os.PathLike[str], found: list[loops.Mount]) -> None:
    """As the kernel writes them, and read again."""
    with open(path, "wb") as file:  # noqa: PTH123
        for at, mount in enumerate(found):
            fields = (mount.root, mount.point, mount.source)
            root, point, source = (_escaped(os.fsencode(field)) for field in fields)
            device = os.fsencode(mount.device)
            file.write(b"%d 1 %b %b %b rw shared:1 - ext4 %b rw\n" % (at, device, root, point, source))
    read = loops._parse(loops.Path(path), loops.Path("/"))  # noqa: SLF001
    assert [(one.root, one.point, one.source) for one in read] == [(one.root, one.point, one.source) for one in found]


def _escaped(raw: bytes) -> bytes:
    for code in b"\\ \t\n#":
        raw = raw.replace(bytes([code]), b"\\%03o" % code) if code != ord("\\") else raw.replace(b"\\", b"\\134")
    return raw


@target("zfs_get", form="text")
def zfs_get(data: bytes) -> None:
    """`zfs get -Hp`: nothing that it prints is an error, whatever is no line of it counts as absent."""
    text = data.decode(errors="replace")
    for name, found in zfs.parse_get(text).items():
        assert found.name == name
        assert found.create_txg < 1 << 70
    for one in zfs.snapshots_of(zfs.parse_get(text), "tank/vm1"):
        assert one.snapshot
    zfs.parse_usages(text, text, text)
    zfs.brief(data)


@target("zfs_send_said", form="text")
def zfs_send_said(data: bytes) -> None:
    """`zfs send -nP` and `-nvt`."""
    text = data.decode(errors="replace")
    size = zfs_send.parse_estimate(text)
    assert size is None or 0 <= size < 1 << 63
    for guid in zfs_send.parse_token(text).values():
        assert guid.isdigit()


@target("lvs", form="json")
def lvs(data: bytes) -> None:
    """`lvs --reportformat json`."""
    with contextlib.suppress(Damaged):
        group = lvm.parse_report("vg", data.decode(errors="replace"))
        for lv in group.volumes:
            assert lv.full_name.startswith("vg/")


@target("thin_xml", form="text")
def thin_xml(data: bytes) -> None:
    """`thin_delta` and `thin_dump`; ExpatError is what the caller takes for an answer that was cut off."""
    for row_of in (thin._delta_row, thin._dump_row):  # noqa: SLF001 - the parser itself
        with contextlib.suppress(Damaged, Exhausted, expat.ExpatError):
            found = thin.parse([data], row_of, "thin_delta")
            assert found.chunk_bytes > 0
            assert bool((found.lengths > 0).all())


@target("pool_status", form="text")
def pool_status(data: bytes) -> None:
    """The kernel's line of a thin pool."""
    with contextlib.suppress(Damaged):
        thin.parse_status("thin-pool", data.decode(errors="replace"), "vg/pool")
