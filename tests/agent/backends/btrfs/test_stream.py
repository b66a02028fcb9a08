"""Reading send streams: what is sound, what is not, and that what is noted of one is read back from the right files."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.backends.btrfs_stream import COMMAND_BYTES_MAX, MAGIC, Attribute, Kind, Parser, _crc32c, root_times
from agent.backends.btrfs_verify import Recorder, verify
from resilver.errors import Damaged
from tests.agent.backends.btrfs.nodes import Node, never, pour, same
from tests.loopfs import run

HEAD = MAGIC + struct.pack("<I", 1)


def command(kind: int, *attributes: tuple[int, bytes], version: int = 1) -> bytes:
    body = b""
    for which, value in attributes:
        if which == Attribute.DATA and version > 1:
            body += struct.pack("<H", which) + value
        else:
            body += struct.pack("<HH", which, len(value)) + value
    return struct.pack("<IHI", len(body), kind, 0) + body


def write(path: bytes, offset: int, data: bytes) -> bytes:
    return command(
        Kind.WRITE, (Attribute.PATH, path), (Attribute.OFFSET, struct.pack("<Q", offset)), (Attribute.DATA, data)
    )


def kinds(raw: bytes, cuts: list[int]) -> list[int]:
    parser = Parser()
    found = []
    edges = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(edges):
        found += [one.kind for one in parser.feed(memoryview(raw)[start:end])]
    assert parser.whole
    return found


@given(st.lists(st.integers(0, 10_000), max_size=40))
@settings(max_examples=50, deadline=None)
def test_in_pieces_of_any_length(cuts):
    raw = HEAD + command(Kind.SUBVOL, (Attribute.PATH, b"x")) + write(b"a", 0, b"z" * 5000) + command(Kind.END)
    assert kinds(raw, cuts) == [Kind.SUBVOL, Kind.WRITE, Kind.END]


def test_the_data_of_version_2_has_no_length():
    raw = MAGIC + struct.pack("<I", 2) + command(Kind.WRITE, (Attribute.DATA, b"z" * 100_000), version=2)
    (found,) = Parser().feed(raw)
    assert len(found.data()) == 100_000


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_noise_is_damage_or_nothing(noise):
    parser = Parser()
    with contextlib.suppress(Damaged):
        for one in parser.feed(HEAD + noise):
            one.path()
            one.number(Attribute.OFFSET)


@pytest.mark.parametrize(
    "raw",
    [
        b"x" * 17,
        MAGIC + struct.pack("<I", 9),
        HEAD + struct.pack("<IHI", COMMAND_BYTES_MAX + 1, 1, 0),
        HEAD + struct.pack("<IHI", 6, 1, 0) + struct.pack("<HH", 15, 3) + b"ab",
        HEAD + struct.pack("<IHI", 1, 1, 0) + b"a",
        HEAD + command(Kind.END) + command(Kind.END),
    ],
)
def test_what_makes_no_sense(raw):
    with pytest.raises(Damaged):
        list(Parser().feed(raw))


@pytest.mark.parametrize("path", [b"/etc/passwd", b"../x", b"a/../../x", b"a\0b", b"x" * 5000])
def test_paths_that_lead_out(path):
    (found,) = Parser().feed(HEAD + command(Kind.MKFILE, (Attribute.PATH, path)))
    with pytest.raises(Damaged):
        found.path()


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in {Kind.END, Kind.UPDATE_EXTENT}])
def test_no_path_of_any_command_leads_out(node, other, kind):
    """Whatever it would do there; where a symbolic link leads is part of what it is."""
    node.create()
    target = node.snapshot()
    stage = other.backend.open_stream_stage("", target.id, node.origin("", target.id))
    for which in (Attribute.PATH, Attribute.PATH_TO, Attribute.PATH_LINK, Attribute.CLONE_PATH):
        stage.start("btrfs-1")
        raw = HEAD + command(kind, (which, b"a/../../x"))
        said = "begins with" if (kind, which) == (Kind.SYMLINK, Attribute.PATH_LINK) else "no path within"
        with pytest.raises(Damaged, match=said):
            stage.feed(memoryview(raw))
    stage.close()


def test_the_command_that_is_added_is_as_the_kernel_makes_it(node):
    node.create()
    first = node.snapshot()
    raw: list[bytes] = []
    pour(node, "", first.id, "btrfs-1", lambda data: raw.append(bytes(data)))
    stat = node.data(first.id).lstat()
    made = root_times(stat.st_atime_ns, stat.st_mtime_ns)
    theirs = [one for one in Parser().feed(b"".join(raw)) if one.kind == Kind.UTIMES and not one.path()]
    (mine,) = Parser().feed(HEAD + made)
    for which in (Attribute.ATIME, Attribute.MTIME):
        assert mine.time_ns(which) == theirs[-1].time_ns(which)
    # Its checksum is the kernel's own, of one that has the same times in the same order.
    at = b"".join(raw).rindex(struct.pack("<IHI", 52, Kind.UTIMES, 0)[:6])
    kernels = b"".join(raw)[at : at + 62]
    assert crc_of(kernels) == struct.unpack_from("<I", kernels, 6)[0]
    assert crc_of(made) == struct.unpack_from("<I", made, 6)[0]


def crc_of(raw: bytes) -> int:
    return _crc32c(raw[:6] + bytes(4) + raw[10:])


def test_a_delta_below_the_top_leaves_the_times_of_the_top(node, other):
    """`btrfs receive` alone does not: new files come by way of the subvolume's own directory."""
    node.create()
    base = node.snapshot()
    other.receive(node)
    node.write("d/new", b"1")
    node.snapshot()
    other.receive(node, base.id)
    assert other.path.stat().st_mtime_ns == node.path.stat().st_mtime_ns
    same(node.path, other.path)


# What is noted.


def noted(directory: Path, *commands: bytes) -> None:
    directory.mkdir()
    recorder = Recorder(directory)
    for one in Parser().feed(HEAD + b"".join(commands)):
        recorder.take(one)
    recorder.finish()


def rename(path: bytes, to: bytes) -> bytes:
    return command(Kind.RENAME, (Attribute.PATH, path), (Attribute.PATH_TO, to))


def test_directories_that_are_renamed_after_their_files(tmp_path):
    root = tmp_path / "root"
    (root / "z" / "y").mkdir(parents=True)
    (root / "z" / "y" / "f").write_bytes(b"1" * 100_000)
    noted(
        tmp_path / "notes",
        write(b"o1/o2/f", 0, b"1" * 50_000),
        write(b"o1/o2/f", 50_000, b"1" * 50_000),
        rename(b"o1/o2", b"y"),
        rename(b"y", b"o1/y"),
        rename(b"o1", b"z"),
    )
    assert verify(root, tmp_path / "notes", never()) == 100_000
    (root / "z" / "y" / "f").write_bytes(b"1" * 99_999 + b"2")
    with pytest.raises(Damaged):
        verify(root, tmp_path / "notes", never())
    (root / "z" / "y" / "f").unlink()
    with pytest.raises(Damaged, match="not there"):
        verify(root, tmp_path / "notes", never())


def test_what_is_cut_off_or_cloned_over_afterwards_does_not_count(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "f").write_bytes(b"2" * 10_000)
    at = (Attribute.OFFSET, struct.pack("<Q", 0))
    noted(
        tmp_path / "notes",
        write(b"f", 0, b"1" * 4096),
        write(b"f", 8192, b"2" * 20_000),
        command(Kind.CLONE, (Attribute.PATH, b"f"), at, (Attribute.CLONE_LEN, struct.pack("<Q", 4096))),
        command(Kind.TRUNCATE, (Attribute.PATH, b"f"), (Attribute.SIZE, struct.pack("<Q", 10_000))),
    )
    assert verify(root, tmp_path / "notes", never()) == 0


def test_long_files_are_noted_in_runs_that_are_bounded(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    data = random.Random(1).randbytes(3 << 20)
    (root / "f").write_bytes(data)
    pieces = [write(b"f", at, data[at : at + 48_000]) for at in range(0, len(data), 48_000)]
    noted(tmp_path / "notes", *pieces)
    assert verify(root, tmp_path / "notes", never()) == len(data)
    assert (tmp_path / "notes" / "runs").stat().st_size < 500


# Against the kernel: whatever is done to a tree, all that is sent is found again.


class Disturber:
    """Creates, writes, renames, links and removes at random; directories are moved into one another."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.dice = random.Random(seed)

    def disturb(self, turns: int) -> None:
        acts = [self.new, self.new, self.mkdir, self.write, self.move, self.move_directory, self.swap, self.link]
        for turn in range(turns):
            self.files = sorted(one for one in self.path.rglob("*") if one.is_file())
            self.directories = [self.path, *sorted(one for one in self.path.rglob("*") if one.is_dir())]
            self.into = self.dice.choice(self.directories)
            self.name = self.into / f"{self.dice.choice('abcdef')}{self.dice.randrange(8)}"
            if self.files:
                self.one = self.dice.choice(self.files)
                self.dice.choice([*acts, self.remove, self.cut])()
            else:
                self.new()
            if turn % 20 == 19:
                run("sync", "-f", self.path)

    def new(self) -> None:
        if not self.name.exists():
            self.name.write_bytes(self.dice.randbytes(self.dice.randrange(200_000)))

    def mkdir(self) -> None:
        if not self.name.exists():
            self.name.mkdir()

    def write(self) -> None:
        with self.one.open("r+b") as file:
            file.seek(self.dice.randrange(300_000))
            file.write(self.dice.randbytes(self.dice.randrange(60_000)))

    def move(self) -> None:
        if not self.name.is_dir():
            self.one.rename(self.name)

    def move_directory(self) -> None:
        moved = self.dice.choice(self.directories)
        if moved not in {self.path, self.into, *self.into.parents} and not self.name.exists():
            moved.rename(self.name)

    def swap(self) -> None:
        other = self.dice.choice(self.files)
        if other != self.one:
            spare = self.path / "spare"
            self.one.rename(spare)
            other.rename(self.one)
            spare.rename(other)

    def link(self) -> None:
        if not self.name.exists():
            os.link(self.one, self.name)

    def remove(self) -> None:
        self.one.unlink()

    def cut(self) -> None:
        os.truncate(self.one, self.dice.randrange(100_000))


def data_bytes(source: Node, base: str, target: str, stream_format: str) -> int:
    """How much data a stream writes."""
    parser, found = Parser(), []

    def count(data: memoryview) -> None:
        for one in parser.feed(data):
            if one.kind == Kind.WRITE:
                found.append(len(one.data()))
            elif one.kind == Kind.ENCODED_WRITE:
                found.append(one.number(Attribute.UNENCODED_FILE_LEN))

    pour(source, base, target, stream_format, count)
    return sum(found)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_was_done_to_a_tree(node, other, seed):
    node.create()
    disturber = Disturber(node.path, seed)
    base = ""
    for stream_format in ("btrfs-1", node.backend.formats()[0]):
        disturber.disturb(80)
        target = node.snapshot().id
        stage = other.stage_from(node, base, stream_format)
        # Nothing that is written is passed over: all of it is found by its last name, and compared.
        compared = verify(other.root / "stage" / "tree" / "data", stage.directory, never())
        assert compared == data_bytes(node, base, target, stream_format) > 0
        other.backend.commit(stage, other.order(node.lineage))
        same(node.path, other.path)
        base = target
