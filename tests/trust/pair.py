"""A coordinator and two agents with certificates, with a volume that has data on one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.acceptance import images
from tests.certificates import Authority
from tests.cluster import Cluster
from tests.loopfs import mounted

MIB = 1 << 20


@contextmanager
def pair(place: Path, authority: Path, image_bytes: int, *, b_limits: str = "") -> Iterator[Cluster]:
    """On an XFS, half of the image or more being data."""
    made = Cluster(place, "sqlite", authority=Authority(authority))
    try:
        made.start_coordinator()
        with mounted("xfs", 1 << 30) as disk:
            for node in ("a", "b"):
                (disk / node).mkdir()
            images.make(disk / "a" / "vm1.img", image_bytes, image_bytes * 3 // 4, seed=1, stripe_bytes=MIB)
            made.start_agent("a", {"vm1": disk / "a" / "vm1.img"})
            made.start_agent("b", {"vm1": disk / "b" / "vm1.img"}, b_limits)
            try:
                yield made
            finally:
                made.close()
    finally:
        made.close()
