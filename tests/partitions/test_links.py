"""Bad links and hung peers: what is slow, lossy or comes and goes costs time alone, and who hangs is left soon."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.acceptance import images
from tests.acceptance.images import MIB, identical
from tests.loopfs import needs_root
from tests.partitions.net import Weather, needs_network
from tests.partitions.scattered import (
    IMAGE_BYTES,
    NODES,
    NOTICED_S,
    SECOND,
    SECOND_BYTES,
    VOLUME,
    Scattered,
    Transfer,
    wait_for,
)

pytestmark = [needs_root, needs_network, pytest.mark.timeout(400)]

SLOW_BYTES_S = 2 * MIB
SLACK_S = 3.0
"""What a loaded machine may take to see what has happened."""
FLAPS = 10 if os.environ.get("RESILVER_THOROUGH") else 4
BLOCKS = 200


def test_a_peer_that_hangs_is_noticed(made: Scattered, tell) -> None:
    """A source stops in the middle: the target goes on with the other one, and the coordinator shows it as away."""
    before = made.epoch
    made.write(seed=10)
    made.ok("resync", VOLUME, "--to", "c")
    transfer = Transfer(made, "b", bytes_s=SLOW_BYTES_S)
    wait_for(lambda: set(transfer.from_each()) == {"a", "c"}, "both send")
    first = "c"
    noticed: dict[str, float] = {}
    made.processes[first].send(signal.SIGSTOP)
    began = time.monotonic()

    def look() -> bool:
        facts = {
            "the coordinator": not made.replicas(VOLUME).get(first, {}).get("reachable", True),
            "the target": first in transfer.left(),
        }
        for who in (who for who, fact in facts.items() if fact):
            noticed.setdefault(who, time.monotonic() - began)
        return len(noticed) == len(facts)

    try:
        wait_for(look, f"both notice that {first} hangs", NOTICED_S + SLACK_S)
        for who, after_s in noticed.items():
            tell(f"{who} noticed a hung agent after {after_s:.1f} s")
        assert not transfer.on_disk()
        transfer.succeeds()
        assert transfer.from_each()[first] > 0
    finally:
        made.processes[first].send(signal.SIGCONT)
    made.wait_reachable(VOLUME, first)
    assert made.epoch == before


def test_the_only_source_hangs_and_wakes(made: Scattered, tell) -> None:
    made.write(seed=20)
    transfer = Transfer(made, "b", bytes_s=SLOW_BYTES_S)
    assert set(transfer.from_each()) == {"a"}
    connected = made.connections("b", "a")
    assert connected
    made.processes["a"].send(signal.SIGSTOP)
    try:
        began = time.monotonic()
        wait_for(
            lambda: not connected & made.connections("b", "a"),
            "the target lets go of the connection", NOTICED_S + SLACK_S,
        )  # fmt: skip
        tell(f"a target let go of its only source, which hung, after {time.monotonic() - began:.1f} s")
        assert transfer.shown()["state"] == "TRANSFERRING"
        assert made.said("b", "stream.source_left")[-1]["source"] == "a"
    finally:
        made.processes["a"].send(signal.SIGCONT)
    run = transfer.succeeds()
    assert run["attempt_count"] == 1
    made.ok("resync", VOLUME)


def test_bad_weather_costs_time_alone(made: Scattered, tell) -> None:
    before, term = made.epoch, made.term()
    elections = len(made.elections())
    made.net.rain(Weather())
    images.write(made.image("a", VOLUME), images.scattered(IMAGE_BYTES, BLOCKS, seed=30), seed=30)
    began = time.monotonic()
    made.ok("resync", VOLUME)
    tell(f"{BLOCKS} blocks came to both through delay, loss and disorder in {time.monotonic() - began:.1f} s")
    began = time.monotonic()
    made.ok("resync", SECOND)
    tell(f"a first copy of {SECOND_BYTES // MIB} MiB did in {time.monotonic() - began:.1f} s")
    (first,) = made.resyncs(SECOND)
    assert (first["action"], first["state"]) == ("FULL", "SUCCEEDED")
    assert first["wire_bytes"] >= SECOND_BYTES
    assert identical(made.image("a", SECOND), made.image("b", SECOND))
    assert made.in_sync()
    made.net.calm()
    assert made.all_identical()
    assert made.epoch == before
    assert len(made.elections()) == elections
    assert made.term() == term


def test_a_link_that_flaps_elects_nobody(made: Scattered, tell) -> None:
    before, elections = made.epoch, len(made.elections())
    away = 0
    for flap in range(FLAPS):
        # Every other time so long that it is noticed.
        made.net.unplug("a")
        if flap % 2:
            made.wait_away(VOLUME, "a")
            away += 1
        else:
            time.sleep(2.0)  # how long a link is down is what is tried
        made.net.plug("a")
        if flap % 2:
            made.wait_reachable(VOLUME, "a")
    tell(f"the primary's link went down {FLAPS} times, {away} of them for so long that it was away")
    made.wait_reachable(VOLUME, *NODES)
    assert made.epoch == before
    assert len(made.elections()) == elections
    images.write(made.image("a", VOLUME), images.scattered(IMAGE_BYTES, BLOCKS, seed=40), seed=40)
    made.ok("resync", VOLUME)
    assert made.epoch == before
