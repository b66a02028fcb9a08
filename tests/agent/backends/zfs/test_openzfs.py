"""What zfs-fuse cannot do: resume tokens, blocks sent as they are stored, `written`, encryption, legacy mounts.

For a machine whose kernel has OpenZFS and that has nothing to lose: `RESILVER_TEST_OPENZFS=1` (docs/backends/zfs.md).
Elsewhere it is no part of the tests.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from agent.backends import zfs_send
from agent.disk import zfs as commands
from agent.disk import zfs_mounts
from resilver.errors import Refused, Unauthenticated
from resilver.volume import LiveState
from tests.agent.backends.crash import Step, killed
from tests.agent.backends.zfs.replica import Replica, equal, make_tree
from tests.loopfs import run
from tests.zfsfs import zfs

MIB = 1 << 20


def transfer(target: Replica, source: Replica, base: str = "", *, stop_at: int = 0, token: str = "", **options):
    """A transfer in the best format that both know; stopped in the middle if `stop_at` bytes have come."""
    lineage = source.lineage
    chosen = next(each for each in source.backend.formats() if each in target.backend.formats())
    stage = target.open_stage(source, base, lineage.tip_id)
    stage.start(chosen, token)
    stream = source.backend.open_send(base, lineage.tip_id, chosen, token)
    view = memoryview(bytearray(MIB))
    came = 0
    try:
        while got := stream.read_into(view):
            stage.feed(view[:got])
            came += got
            if stop_at and came >= stop_at:
                stage.close()
                return came
    finally:
        stream.close()
    stage.finish()
    stage.verify(threading.Event())
    target.backend.commit(stage, target.order(lineage, **options))
    stage.close()
    return came


def fill(replica: Replica, name: str, size_mib: int) -> None:
    (replica.point / name).write_bytes(os.urandom(size_mib * MIB))


def token_of(target: Replica, source: Replica, base: str) -> str:
    stage = target.open_stage(source, base, source.lineage.tip_id)
    assert stage.resumed
    stage.close()
    return stage.resume_token()


def test_what_openzfs_can_do(replica):
    assert commands.features() == commands.Features(
        written=True, estimate=True, send_large=True, resume=True, origin=True, unmounted=True, encryption=True
    )
    assert replica.backend.formats() == (zfs_send.ZSTD, zfs_send.LARGE, zfs_send.PLAIN)


@pytest.mark.parametrize("whole", [True, False])
def test_a_broken_transfer_goes_on_from_its_token(replica, other, whole):
    replica.create()
    base = ""
    if not whole:
        base = replica.snapshot().id
        transfer(other, replica)
    fill(replica, "big", 24)
    replica.snapshot()
    before = other.traces()
    came = transfer(other, replica, base, stop_at=16 * MIB)
    other = other.again()
    other.backend.recover()
    token = token_of(other, replica, base)
    assert token
    assert other.lineage.tip_id == base
    rest = transfer(other, replica, base, token=token)
    assert rest < 24 * MIB - came + 8 * MIB
    assert equal(replica, other)
    assert other.state is LiveState.UNMODIFIED
    assert not [name for name in other.traces() if name not in before and "stage" in name]


def test_a_partial_stage_is_let_go(replica, other):
    replica.create()
    fill(replica, "big", 24)
    replica.snapshot()
    transfer(other, replica, stop_at=16 * MIB)
    other.backend.discard_stage()
    assert not [name for name in other.traces() if name.endswith("/stage")]
    transfer(other, replica, stop_at=16 * MIB)
    transfer(other, replica)
    assert equal(replica, other)


def test_tokens_are_checked(replica, other):
    replica.create()
    fill(replica, "big", 24)
    first = replica.snapshot().id
    transfer(other, replica, stop_at=16 * MIB)
    token = token_of(other, replica, "")
    replica.write(2)
    second = replica.snapshot().id
    for base, target, wrong in ((first, second, token), ("", second, token), ("", first, f"{token[:-4]}0000")):
        with pytest.raises(Unauthenticated) as refused:
            replica.backend.open_send(base, target, zfs_send.PLAIN, wrong)
        assert refused.value.reason == "TICKET_INVALID"


@pytest.mark.parametrize("at_source", ["off", "lz4", "gzip", "zstd"])
@pytest.mark.parametrize("at_target", ["off", "lz4", "zstd"])
def test_whatever_compresses_at_either_end(replica, other, at_source, at_target):
    zfs("set", f"compression={at_source}", replica.pool)
    zfs("set", f"compression={at_target}", other.pool)
    replica.create()
    base = replica.snapshot().id
    transfer(other, replica)
    replica.write(2)
    replica.snapshot()
    transfer(other, replica, base)
    assert equal(replica, other)


def test_large_blocks_after_a_pair_that_had_none(replica, other):
    """Another tool sent without -L: ZFS keeps its small blocks at the target, and nothing of the file is lost."""
    zfs("set", "recordsize=1M", replica.pool)
    replica.create()
    fill(replica, "big", 8)
    zfs("snapshot", f"{replica.dataset}@theirs")
    run("sh", "-c", f"zfs send {replica.dataset}@theirs | zfs receive -u {other.dataset}")
    for at in (3 * MIB + 5, 7 * MIB):
        with (replica.point / "big").open("r+b") as file:
            file.seek(at)
            file.write(b"changed")
        base = replica.lineage.tip_id
        replica.snapshot()
        transfer(other, replica, base)
        assert equal(replica, other)


def test_a_pool_without_zstd(replica, service, tmp_path):
    zfs("set", "compression=zstd", replica.pool)
    zfs("set", "recordsize=1M", replica.pool)
    old = [part for name in ("large_blocks", "lz4_compress") for part in ("-o", f"feature@{name}=enabled")]
    with service.pool(1 << 30, "-d", *old) as pool:
        other = Replica(pool, tmp_path)
        assert other.backend.formats() == (zfs_send.LARGE, zfs_send.PLAIN)
        replica.create()
        fill(replica, "big", 8)
        base = replica.snapshot().id
        transfer(other, replica)
        replica.write(2)
        replica.snapshot()
        transfer(other, replica, base)
        assert equal(replica, other)


def test_what_was_just_written_counts(replica):
    replica.create()
    replica.snapshot()
    assert replica.state is LiveState.UNMODIFIED
    (replica.point / "more").write_text("x")
    assert replica.state is LiveState.MODIFIED


@pytest.mark.parametrize("looked", [True, False])
def test_what_only_the_intent_log_has_is_kept(replica, other, service, *, looked, monkeypatch):
    """Synced before a power cut, and not mounted since: neither a snapshot nor `written` tells of it before that.

    An agent's first look finds it, and so does a commit that comes without one.
    """
    other.create()
    synced(other.point / "first", b"makes the log")
    base = other.snapshot()
    replica.receive(other)
    replica.write(2)
    replica.snapshot()
    run("zpool", "sync", other.pool)
    run("zpool", "freeze", other.pool)  # from now on nothing but the log comes to the disk
    synced(other.point / "second", b"mine")
    zfs("unmount", other.dataset)
    run("umount", other.root)
    run("zpool", "export", other.pool)
    run("zpool", "import", "-N", "-f", "-d", service.work, other.pool)
    again = other.again()
    assert again.state is LiveState.UNMODIFIED, "else this shows nothing"
    if looked:
        again.backend.recover()
        with monkeypatch.context() as failing:
            failing.setattr(zfs_mounts, "MOUNT_AND_UNMOUNT", "echo cannot >&2; false")
            assert again.state is LiveState.UNKNOWN
            assert any("cannot" in problem for problem in again.backend.examine().problems)
        assert again.state is LiveState.MODIFIED
    (copy,) = again.receive(replica, base.id)
    assert equal(again, replica)
    with again.walked(copy.path) as kept:
        assert (kept / "second").read_bytes() == b"mine"
    base = replica.tip
    replica.write(3)
    replica.snapshot()
    assert again.receive(replica, base.id) == (), "to be looked into changes nothing"
    assert equal(again, replica)


def synced(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(fd, data)
    os.fsync(fd)
    os.close(fd)


@pytest.mark.parametrize("where", ["both", "dataset", "target"])
def test_encrypted(node, where, tmp_path):
    key = tmp_path / "key"
    key.write_text("a good key\n")
    options = ("-o", "encryption=on", "-o", "keyformat=passphrase", "-o", f"keylocation=file://{key}")
    replica, other = node(), node()
    if where == "both":
        zfs("create", *options, f"{replica.pool}/safe")
        replica = Replica(f"{replica.pool}/safe", replica.work)
    if where in {"both", "target"}:
        zfs("create", *options, f"{other.pool}/safe")
        other = Replica(f"{other.pool}/safe", other.work)
    if where == "dataset":
        zfs("create", *options, "-o", f"mountpoint={replica.point}", replica.dataset)
        make_tree(replica.point, 1)
    else:
        replica.create()
    base = replica.snapshot().id
    transfer(other, replica)
    replica.write(2)
    second = replica.snapshot().id
    transfer(other, replica, base)
    assert equal(replica, other)
    other.write(3)
    replica.write(4)
    replica.snapshot()
    transfer(other, replica, second, replace_own_data=True)
    assert equal(replica, other)


@pytest.fixture
def raw(node, tmp_path):
    """An encrypted source that is ahead, its copy by a raw stream on a node that has no key, the base, and the key."""
    key = tmp_path / "key"
    key.write_text("a good key\n")
    made, copy = node(), node()
    zfs(
        "create",
        "-o",
        "encryption=on",
        "-o",
        "keyformat=passphrase",
        "-o",
        f"keylocation=file://{key}",
        f"{made.pool}/safe",
    )
    source = Replica(f"{made.pool}/safe", made.work)
    source.create()
    zfs("snapshot", f"{source.dataset}@theirs")
    run("sh", "-c", f"zfs send -w {source.dataset}@theirs | zfs receive -u {copy.dataset}")
    base = source.tip.id
    source.write(2)
    source.snapshot()
    return source, copy, base, key


def test_a_raw_copy_is_given_nothing_that_its_node_could_read(raw):
    source, copy, base, _key = raw
    found = copy.backend.examine()
    assert (found.live.state, found.lineage.tip_id) == (LiveState.UNMODIFIED, base)
    assert [
        problem for problem in found.problems if f"{copy.dataset} is encrypted and its key is not loaded" in problem
    ]
    for below in (base, ""):
        with pytest.raises(Refused, match=f"zfs load-key {copy.dataset}") as refused:
            copy.open_stage(source, below, source.tip.id)
        assert refused.value.reason == "NOT_SUPPORTED"
        assert not (copy.root / "stage").exists()
    assert not [name for name in copy.traces() if "/stage" in name]


def test_a_raw_copy_is_no_source(raw, third):
    _source, copy, base, _key = raw
    with pytest.raises(Refused, match="load-key") as refused:
        transfer(third, copy)
    assert refused.value.reason == "NOT_SUPPORTED"
    assert copy.lineage.tip_id == base


def test_a_raw_copy_whose_key_was_loaded(raw):
    """It goes on by deltas, of which nothing plain is kept on the way; a full copy would be plain, and is refused."""
    source, copy, base, key = raw
    zfs("load-key", "-L", f"file://{key}", copy.dataset)
    with pytest.raises(Refused, match="it would be plain") as refused:
        copy.open_stage(source, "", source.tip.id)
    assert refused.value.reason == "NOT_SUPPORTED"
    assert not copy.open_stage(source, base, source.tip.id).spools
    transfer(copy, source, base)
    assert equal(source, copy)
    assert zfs("get", "-H", "-o", "value", "encryption", copy.dataset).startswith("aes")


@pytest.fixture
def legacy(replica, other, tmp_path, monkeypatch):
    """A source that is ahead, a target at its base that /etc/fstab has mounted, the base, and where it is mounted.

    The target's name is also a path from here, as it can be for a service in /, at which another dataset is mounted.
    """
    replica.create()
    base = replica.snapshot().id
    transfer(other, replica)
    replica.write(2)
    replica.snapshot()
    point = tmp_path / "by fstab"
    point.mkdir()
    zfs("set", "mountpoint=legacy", other.dataset)
    named = tmp_path / other.dataset
    zfs("create", "-o", f"mountpoint={named}", f"{other.pool}/theirs")
    monkeypatch.chdir(tmp_path)
    yield replica, other, base, point
    assert os.path.ismount(named)
    run("umount", point)


def mount_options(point: Path) -> set[str]:
    lines = [line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    (found,) = [line[5] for line in lines if line[4].replace("\\040", " ") == str(point)]
    return set(found.split(","))


@pytest.mark.parametrize("own", [False, True])
def test_a_legacy_mount(legacy, own):
    """A commit mounts it again with its options, and read-only, as a replica is."""
    replica, other, base, point = legacy
    zfs("set", "readonly=off", other.dataset)
    run("mount", "-t", "zfs", "-o", "nosuid,noatime", other.dataset, point)
    if own:
        (point / "own").write_text("x")
    transfer(other, replica, base, replace_own_data=True)
    assert {"ro", "nosuid", "noatime"} <= mount_options(point)
    assert [entry.name for entry in point.iterdir() if entry.name in {"own", "new 2"}] == ["new 2"]
    assert equal(replica, other)


@pytest.mark.parametrize("step", ["commit.aside", "commit.received", "commit.recorded"])
def test_a_legacy_mount_and_a_kill(legacy, step):
    """What is finished is read-only; what is taken back is as it was."""
    replica, other, base, point = legacy
    zfs("set", "readonly=off", other.dataset)
    run("mount", "-t", "zfs", "-o", "nosuid", other.dataset, point)
    lineage = replica.lineage
    stage = other.fill(replica, base, lineage.tip_id)
    stage.close()
    order = other.order(lineage)

    def work(at: Step) -> None:
        other.again(step=at).backend.commit(stage, order)

    assert killed(work, step)
    assert not os.path.ismount(point)
    again = other.again()
    again.backend.recover()
    assert mount_options(point) & {"ro", "rw", "nosuid"} == {"ro" if step == "commit.recorded" else "rw", "nosuid"}
    assert (again.lineage.tip_id == base) is (step != "commit.recorded")


@pytest.mark.parametrize("how", ["held", "cloned"])
def test_what_others_need_is_not_dropped(replica, how):
    replica.create()
    first = replica.snapshot().id
    replica.write(2)
    replica.snapshot()
    name = zfs("list", "-H", "-t", "snapshot", "-o", "name", "-s", "createtxg", replica.dataset).split()[0]
    if how == "held":
        zfs("hold", "theirs", name)
    else:
        zfs("clone", "-o", "mountpoint=none", name, f"{replica.pool}/theirs")
    with pytest.raises(Refused) as refused:
        replica.backend.drop(first)
    assert refused.value.reason == "PINNED"
