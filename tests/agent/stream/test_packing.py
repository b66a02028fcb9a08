"""What is sent is compressed where that is faster, and only there."""

from __future__ import annotations

import random

import pytest

from agent.delta import DeltaMap, DeltaRange
from agent.stream.frame import HEADER_BYTES
from agent.stream.packing import HOLD_MAX, ROUND_BYTES, Chooser
from agent.stream.receiver import verify
from agent.stream.throttle import Throttle
from tests.agent.stream.support import MIB, FileStage, Transfer, at, random_file, serving


class Way:
    """A way to a target of so many bytes per second, for data that shrinks by `ratio` at `pack_rate`."""

    def __init__(self, rate, ratio, pack_rate=1e9):
        self.rate, self.ratio, self.pack_rate = rate, ratio, pack_rate
        self.now = 100.0
        self.chooser = Chooser(self.now)
        self.raw_bytes = self.packed_bytes = 0

    def send(self, total_bytes, step=2 * MIB):
        start = self.now
        for _ in range(total_bytes // step):
            packs = self.chooser.packs
            stored = step * self.ratio if packs else step
            self.now += stored / self.rate + (step / self.pack_rate if packs else 0)
            self.raw_bytes += step
            self.packed_bytes += step if packs else 0
            self.chooser.sent(step, int(stored), self.now)
        return self.now - start


@pytest.mark.parametrize(("rate", "ratio"), [(100e6, 0.5), (1e6, 0.5), (10e6, 0.1)])
def test_a_slow_way_and_data_that_gives_way(rate, ratio):
    way = Way(rate, ratio)
    way.send(4096 * MIB)
    assert way.packed_bytes > 0.9 * way.raw_bytes


@pytest.mark.parametrize(("rate", "ratio"), [(3e9, 0.5), (1e9, 0.95), (100e6, 0.99), (1e6, 1.0)])
def test_elsewhere_it_costs_next_to_nothing(rate, ratio):
    way = Way(rate, ratio)
    assert way.send(4096 * MIB) < 1.02 * 4096 * MIB / rate
    assert way.packed_bytes < 0.02 * way.raw_bytes


def test_what_holds_the_target_up_is_no_reason_to_pack():
    """The way is slow, and no faster for what is packed: a disk that writes what it was sent, as it reads."""
    way = Way(50e6, 0.5)
    for _ in range(2048):
        packs = way.chooser.packs
        way.now += 2 * MIB / way.rate
        way.packed_bytes += 2 * MIB if packs else 0
        way.chooser.sent(2 * MIB, MIB if packs else 2 * MIB, way.now)
    assert way.packed_bytes < 0.05 * 2048 * 2 * MIB


def test_it_follows_a_way_and_data_that_change():
    way = Way(50e6, 0.3)
    way.send(1024 * MIB)
    assert way.chooser.packs
    way.rate = 5e9
    way.send(2 * HOLD_MAX * ROUND_BYTES)
    assert not way.chooser.packs
    way.rate = 50e6
    way.send(2 * HOLD_MAX * ROUND_BYTES)
    assert way.chooser.packs
    way.ratio = 1.0
    before = way.packed_bytes
    way.send(1024 * MIB)
    assert way.packed_bytes - before < 0.05 * 1024 * MIB


def text_file(path, size):
    """Bytes that shrink, and no two blocks alike."""
    words = [
        word.encode() for word in ("resilver", "mirror", "snapshot", "volume", "lineage", "epoch", "delta", "base")
    ]
    chance = random.Random(3)
    path.write_bytes(b" ".join(chance.choices(words, k=size // 4))[:size])
    return path


@pytest.mark.parametrize("scattered", [False, True])
def test_behind_a_cap_text_is_packed_and_comes_as_it_was(tmp_path, scattered):
    image = text_file(tmp_path / "image", 12 * MIB)
    rows = [DeltaRange(at, 4096) for at in range(0, 12 * MIB, 8192)] if scattered else [DeltaRange(0, 12 * MIB)]
    delta = DeltaMap.of(12 * MIB, rows)
    transfer = Transfer(FileStage(tmp_path / "stage", 12 * MIB), delta)
    with serving(image, throttle=Throttle(2 * MIB)) as server:
        counters = transfer.run(at(server.port)).counters
    assert counters.done_bytes == delta.data_bytes
    assert counters.wire_bytes < 0.8 * delta.data_bytes
    verify(transfer.stage, delta, transfer.journal)
    if not scattered:
        assert transfer.stage.path.read_bytes() == image.read_bytes()


def test_what_does_not_shrink_travels_as_it_is(tmp_path):
    image = random_file(tmp_path / "image", 12 * MIB)
    delta = DeltaMap.of(12 * MIB, [DeltaRange(0, 12 * MIB)])
    transfer = Transfer(FileStage(tmp_path / "stage", 12 * MIB), delta)
    with serving(image, throttle=Throttle(8 * MIB)) as server:
        counters = transfer.run(at(server.port)).counters
    assert counters.wire_bytes < delta.data_bytes + 13 * HEADER_BYTES + 4096
    assert transfer.stage.path.read_bytes() == image.read_bytes()
