"""Freezing what is mounted from files and block devices: one at a time, within one another, several together."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.backends.image_copy import opened
from agent.disk import freeze, loops, quiesce
from agent.disk.durable import write_json
from agent.disk.quiesce import _Helper, quiesced, quiesced_together
from agent.hooks import Hooked
from agent.leftovers import look, recover
from agent.together import Member, Together
from resilver.config import Hooks
from resilver.errors import ResilverError
from resilver.lineage import Consistency
from tests.agent.backends.replica import Replica, noise
from tests.loopfs import attached, mounted_image, run


@pytest.fixture(params=["xfs"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


class Guest:
    """An image with a mounted ext4 in it."""

    def __init__(self, image: Path, point: Path, device: Path) -> None:
        self.image = image
        self.point = point
        self.device = device

    @property
    def thawed(self) -> bool:
        """Whether it takes a write at once: a second freeze is refused while it is frozen."""
        helper = _Helper.start(self.point, 10.0)
        return helper is not None and helper.thaw()


@pytest.fixture
def guests(place: Path) -> Iterator[tuple[Guest, Guest]]:
    made = []
    for name in ("one", "two"):
        image = place / f"{name}.img"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        run("mkfs.ext4", "-q", "-F", image)
        made.append((image, place / name))
    with mounted_image(*made[0]) as first, mounted_image(*made[1]) as second:
        yield Guest(*made[0], first), Guest(*made[1], second)


def test_a_block_device(guests, place):
    """As an LV is: the device itself is what is mounted."""
    guest, _ = guests
    record = place / "frozen.json"
    with quiesced(guest.device.stat(), record, others_write=False) as rest:
        assert record.exists()
        assert not guest.thawed
    assert rest.consistency is Consistency.FROZEN
    assert guest.thawed
    assert not record.exists()
    with quiesced(guest.device.stat(), record, others_write=True) as rest:
        pass
    assert rest.consistency is Consistency.CRASH


def test_a_block_device_that_is_not_mounted(place):
    image = place / "raw.img"
    image.write_bytes(bytes(1 << 20))
    with attached(image) as device, quiesced(device.stat(), place / "frozen.json", others_write=False) as rest:
        pass
    assert rest.consistency is Consistency.SYNCED


def test_btrfs(place):
    """A mount of it has a number of its own, which is no device's."""
    image, point = place / "disk.img", place / "point"
    with image.open("wb") as file:
        file.truncate(160 << 20)
    run("mkfs.btrfs", "-q", image)
    with mounted_image(image, point) as device:
        (found,) = loops.mounts_of(loops.Device(device, read_only=False))
        assert found.point == str(point)
        assert found.device.startswith("0:")


def test_one_that_was_let_go_is_not_called_frozen(guests, place):
    guest, _ = guests
    with quiesced(guest.image.stat(), place / "frozen.json", others_write=False, deadline_s=0.2) as rest:
        (guest.point / "waits").write_bytes(b"until the deadline")
    assert rest.consistency is Consistency.SYNCED


def test_together(guests, place):
    """Both stand still for one deadline, and each one's own snapshot is taken within, from a thread of its own."""
    one, two = guests
    record = place / "frozen.json"
    stats = [one.image.stat(), two.device.stat()]
    inner: dict[str, Consistency] = {}

    def take(guest: Guest) -> None:
        with quiesced(guest.image.stat(), place / f"{guest.image.name}.json", others_write=False) as rest:
            assert not (place / f"{guest.image.name}.json").exists(), "nothing was frozen here"
            assert not guest.thawed
        inner[guest.image.name] = rest.consistency

    with quiesced_together(stats, record, others_write=False) as rest:
        threads = [threading.Thread(target=take, args=(guest,)) for guest in guests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not one.thawed, "an inner block's end thaws nothing that it did not freeze"
        assert not two.thawed
    assert rest.consistency is Consistency.FROZEN
    assert inner == {"one.img": Consistency.FROZEN, "two.img": Consistency.FROZEN}
    assert one.thawed
    assert two.thawed
    assert not record.exists()


def test_an_inner_block_that_outlives_the_outer(guests, place):
    """It was at rest when it began, and no more than that is claimed."""
    guest, _ = guests
    outer = quiesced(guest.image.stat(), place / "outer.json", others_write=False)
    outer.__enter__()
    with quiesced(guest.image.stat(), place / "inner.json", others_write=False) as rest:
        outer.__exit__(None, None, None)
    assert rest.consistency is Consistency.SYNCED
    with quiesced(guest.image.stat(), place / "inner.json", others_write=False) as rest:
        pass
    assert rest.consistency is Consistency.FROZEN, "nothing is joined that has ended"


def test_one_of_them_has_nothing_to_freeze(guests, place):
    one, _ = guests
    plain = place / "plain.img"
    plain.write_bytes(bytes(4096))
    stats = [one.image.stat(), plain.stat()]
    with quiesced_together(stats, place / "frozen.json", others_write=False) as rest:
        assert not one.thawed
    assert rest.consistency is Consistency.CRASH


def test_snapshots_of_two_volumes_at_one_instant(place):
    """What a writer wrote first to one and then to the other is never in the second one's snapshot alone."""
    volumes = [Replica(place / "a"), Replica(place / "b")]
    for volume in volumes:
        volume.create(size=64 << 20, data=0)
        run("mkfs.ext4", "-q", "-F", volume.path)
    points = [place / "pa", place / "pb"]
    code = (
        "import os, sys\n"
        "files = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in sys.argv[1:]]\n"
        "number = 0\n"
        "while True:\n"
        "    number += 1\n"
        "    for fd in files:\n"
        "        os.pwrite(fd, number.to_bytes(8, 'little'), 0)\n"
        "        os.fdatasync(fd)\n"
        "    if number == 20:\n"
        "        print('going', flush=True)\n"
    )
    with mounted_image(volumes[0].path, points[0]), mounted_image(volumes[1].path, points[1]):
        files = [str(point / "number") for point in points]
        writer = subprocess.Popen([sys.executable, "-c", code, *files], stdout=subprocess.PIPE)
        try:
            assert writer.stdout.readline() == b"going\n"
            stats = [volume.path.stat() for volume in volumes]
            taken = []
            for _ in range(4):
                with quiesced_together(stats, place / "group.json", others_write=False) as rest:
                    taken.append([volume.snapshot() for volume in volumes])
                assert rest.consistency is Consistency.FROZEN
        finally:
            writer.kill()
            writer.communicate()
    for pair in taken:
        assert {each.consistency for each in pair} == {Consistency.FROZEN}
        numbers = [number_in(volume.data(each.id), place / "look") for volume, each in zip(volumes, pair, strict=True)]
        assert numbers[0] - numbers[1] in {0, 1}, numbers


def number_in(snapshot: Path, point: Path) -> int:
    copy = snapshot.parent / "look"
    run("cp", snapshot, copy)
    try:
        with mounted_image(copy, point):
            return int.from_bytes((point / "number").read_bytes(), "little")
    finally:
        copy.unlink()


def test_many_open_files(guests, place):
    """A descriptor beyond what select can take."""
    guest, _ = guests
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        with quiesced(guest.image.stat(), place / "frozen.json", others_write=False) as rest:
            (place / "free").write_bytes(noise(1, 10))
        assert rest.consistency is Consistency.FROZEN
    finally:
        for fd in held:
            os.close(fd)


def test_what_an_order_holds_is_not_thawed_for_another(guests, place, capfd):
    """An order for any volume with hooks thaws what was left frozen: one that is under way has left nothing."""
    one, two = guests
    with quiesced(one.image.stat(), place / "G1.frozen", others_write=False) as rest:
        left_behind(two, place / "G2.frozen", also=one)
        recover(place, "vm3")
        assert not one.thawed
        assert two.thawed
        assert [path.name for path in place.glob("*.frozen")] == ["G1.frozen"]
    assert rest.consistency is Consistency.FROZEN
    assert one.thawed
    left_behind(one, place / "G1.frozen")
    recover(place, "vm3")
    assert one.thawed, "once that order has ended, a record by its name is one like any other"
    assert not list(place.glob("*.frozen"))
    assert capfd.readouterr().err == ""


def left_behind(guest: Guest, record: Path, also: Guest | None = None) -> None:
    """What an agent leaves that is killed, with its helper, while it holds a mount. The record names `also` too."""
    write_json(record, {"mounts": [str(each.point) for each in (guest, also) if each is not None]})
    with opened(guest.point, os.O_DIRECTORY) as fd:
        freeze.freeze(fd)


def thawed_by_somebody(guest: Guest) -> None:
    with opened(guest.point, os.O_DIRECTORY) as fd:
        freeze.thaw(fd)


def test_one_that_somebody_else_thawed_is_not_called_frozen(guests, place, capfd):
    guest, _ = guests
    with quiesced(guest.image.stat(), place / "frozen.json", others_write=False) as rest:
        thawed_by_somebody(guest)
    assert not rest.held
    assert rest.consistency is Consistency.SYNCED
    assert guest.thawed
    assert capfd.readouterr().err == "", "the helper says so, and does not die of it"


@pytest.mark.parametrize("disturbed", [False, True])
def test_a_group_that_was_not_held_is_refused_whatever_each_one_claims(guests, place, disturbed):
    """`crash` says little of one snapshot; of a group there must have been one instant all the same."""
    volumes = ("vm1", "vm2")
    group = Together(volumes, "a", place / "hooks", group="g", group_id=str(uuid.uuid4()))
    cloned, found = threading.Barrier(2, timeout=60), dict[str, Consistency | str]()

    def take(volume: str, guest: Guest) -> None:
        try:
            group.arrive(Member(Hooked(volume, Hooks()), str(guest.image)))
            assert not guest.thawed
            cloned.wait()
            if disturbed and volume == "vm2":
                thawed_by_somebody(guest)
            found[volume] = group.settle(volume, Consistency.CRASH)
            group.leave(volume)
        except ResilverError as error:
            found[volume] = error.reason
            group.leave(volume, error)

    threads = [threading.Thread(target=take, args=each) for each in zip(volumes, guests, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == dict.fromkeys(volumes, "HOOK_FAILED" if disturbed else Consistency.CRASH)
    assert all(guest.thawed for guest in guests)


@pytest.mark.parametrize(
    ("limits", "least_s", "most_s"),
    [((60.0, 50.0), quiesce.FREEZE_MAX_S, 50.0), ((4.0, 60.0), 0.0, 4.0), ((), 9.0, quiesce.FREEZE_MAX_S)],
)
def test_a_group_is_frozen_for_what_its_hooks_have_left(guests, place, limits, least_s, most_s):
    """One deadline: of several the shortest, less what has passed. What each helper is told of it is looked at."""
    hooks = [Hooks(after=("/bin/true",), timeout_s=limit) for limit in limits] or [Hooks(freezes=True, timeout_s=1)]
    volumes = ("vm1", "vm2")
    group = Together(volumes, "a", place / "hooks", group="g", group_id=str(uuid.uuid4()))
    told: list[float] = []

    def take(volume: str, guest: Guest, own: Hooks) -> None:
        group.arrive(Member(Hooked(volume, own), str(guest.image)))
        if volume == "vm1":
            told.extend(float(helper._process.args[-1]) for helper in quiesce._helpers.values())
        group.settle(volume, Consistency.CRASH)
        group.leave(volume)

    threads = [
        threading.Thread(target=take, args=each)
        for each in zip(volumes, guests, [*hooks, Hooks(freezes=True)][:2], strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(told) == 2
    assert all(least_s < each < most_s for each in told)


def test_what_was_frozen_in_a_namespace_whose_first_process_has_ended(place):
    """Its path went by way of that process; another one has the same mount."""
    image, point = place / "disk.img", place / "point"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    point.mkdir()
    run("mkfs.ext4", "-q", "-F", image)
    others: list[subprocess.Popen[bytes]] = []
    try:
        with attached(image) as device:
            script = f"mount --make-rprivate / && mount {device} {point} && echo mounted && exec sleep infinity"
            others.append(subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE))
            assert others[0].stdout is not None
            assert others[0].stdout.readline() == b"mounted\n"
            enter = [
                "nsenter",
                f"--mount=/proc/{others[0].pid}/ns/mnt",
                "sh",
                "-c",
                "echo entered; exec sleep infinity",
            ]
            others.append(subprocess.Popen(enter, stdout=subprocess.PIPE))
            assert others[1].stdout is not None
            assert others[1].stdout.readline() == b"entered\n"
            with quiesced(image.stat(), place / "G.frozen", others_write=False) as rest:
                left = (place / "G.frozen").read_bytes()
            assert rest.consistency is Consistency.FROZEN
            one, two = sorted(others, key=lambda other: f"/proc/{other.pid}/".encode() not in left)
            guest = Guest(image, Path(f"/proc/{two.pid}/root{point}"), device)
            with opened(guest.point, os.O_DIRECTORY) as fd:
                freeze.freeze(fd)
            (place / "G.frozen").write_bytes(left)
            one.kill()
            one.wait()
            try:
                assert look(place) == []
                assert guest.thawed
            finally:
                with contextlib.suppress(OSError):
                    thawed_by_somebody(guest)
            for other in others:
                other.kill()
                other.wait()
    finally:
        for other in others:
            other.kill()
            other.communicate()


def test_a_record_that_cannot_be_read_keeps_no_other_from_being_thawed(guests, place):
    one, _ = guests
    damaged = place / "F.frozen"
    damaged.write_bytes(b"{")
    left_behind(one, place / "G.frozen")
    try:
        (left,) = look(place)
        assert str(damaged) in left.damage
        assert one.thawed
    finally:
        with contextlib.suppress(OSError):
            thawed_by_somebody(one)
    assert damaged.exists()
