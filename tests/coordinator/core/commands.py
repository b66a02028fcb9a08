"""Runs `resilver elect vm1 …` on a view, as its text stands in messages."""

from __future__ import annotations

import shlex

from coordinator.core.cluster import Elected, NotElected, VolumeView
from coordinator.core.election import elect
from tests.coordinator.core.histories import NOW_MS


def run(seen: VolumeView, command: str) -> Elected | NotElected:
    """What `resilver elect vm1 …` decides."""
    words = shlex.split(command)
    assert words[:3] == ["resilver", "elect", "vm1"], command
    pairs = list(zip(words[3::2], words[4::2], strict=True))
    accepted = frozenset(node for option, node in pairs if option == "--accept-loss")
    choose = next((node for option, node in pairs if option == "--choose"), "")
    return elect(seen, accept_loss=accepted, choose=choose, now_ms=NOW_MS)


def elected(seen: VolumeView, options: str = "") -> Elected:
    found = run(seen, f"resilver elect vm1 {options}")
    assert isinstance(found, Elected), found
    return found


def refused(seen: VolumeView, options: str = "") -> NotElected:
    found = run(seen, f"resilver elect vm1 {options}")
    assert isinstance(found, NotElected), found
    return found
