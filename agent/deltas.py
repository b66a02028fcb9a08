"""Delta maps that were worked out lately, because a plan, an order and a stream ask for the same one.

A snapshot never changes, so a map holds as long as both snapshots are there. Where somebody may have written to one all
the same (`Checking`), that is asked each time.
Kept are as many maps as have a million ranges together (17 MB), and the sizes of more. Called on the volume's reading
thread alone, so that nobody works out what another is at.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from agent.backends.base import Checking

if TYPE_CHECKING:
    from agent.backends.base import Backend, BlockBackend
    from agent.delta import DeltaMap

RANGES_KEPT_MAX: Final = 1_000_000
SIZES_KEPT_MAX: Final = 256

_Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class DeltaSize:
    """What a delta costs. `range_count` counts zero ranges too: they travel as a header each, and take an extent.

    Of a file system's own stream only `delta_bytes` is said, and not even that where nobody knows.
    """

    delta_bytes: int | None
    range_count: int
    capacity_bytes: int


class Deltas:
    """The maps of one volume."""

    def __init__(self, backend: Backend) -> None:
        self._backend: Final = backend
        self._maps: OrderedDict[_Key, DeltaMap] = OrderedDict()
        self._sizes: OrderedDict[_Key, DeltaSize] = OrderedDict()

    def map(self, base: str, target: str) -> DeltaMap:
        """The delta map of a volume of blocks; BASE_GONE, TARGET_GONE, BASE_MISMATCH."""
        assert self._backend.shape == "blocks", "a stream has no map"
        return self._map(self._backend, base, target)

    def size(self, base: str, target: str) -> DeltaSize:
        """What a delta costs; BASE_GONE, TARGET_GONE, BASE_MISMATCH."""
        key = (base, target)
        if key in self._sizes:
            self._check(base, target)
        elif self._backend.shape == "stream":
            self._keep(key, DeltaSize(self._backend.delta_bytes(base, target), 0, 0))
        else:
            self._map(self._backend, base, target)
        self._sizes.move_to_end(key)
        return self._sizes[key]

    def _map(self, backend: BlockBackend, base: str, target: str) -> DeltaMap:
        key = (base, target)
        known = self._maps.get(key)
        if known is not None:
            self._check(base, target)
            self._maps.move_to_end(key)
            return known
        made = backend.delta_map(base, target)
        self._keep(key, DeltaSize(made.data_bytes, len(made), made.capacity_bytes))
        self._maps[key] = made
        while self._maps and sum(len(each) for each in self._maps.values()) > RANGES_KEPT_MAX:
            self._maps.popitem(last=False)
        return made

    def _check(self, base: str, target: str) -> None:
        if isinstance(self._backend, Checking):
            self._backend.check_untouched(base, target)

    def _keep(self, key: _Key, size: DeltaSize) -> None:
        self._sizes[key] = size
        while len(self._sizes) > SIZES_KEPT_MAX:
            self._sizes.popitem(last=False)
