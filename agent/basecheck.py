"""Whether the base here is the base there, before the first byte moves.

Identity and size come from the two lineages. Then a random sample of blocks is digested on both sides: half of it
anywhere, half where the base has data, because most of a sparse image is a hole that proves nothing. The sample is new
for every run. It finds a base that is another altogether, or damaged at large; a single rotten block it does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from blake3 import blake3

from agent.delta import DeltaRange
from resilver.errors import Damaged, Refused

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from agent.backends.base import BlockBackend
    from agent.delta import DeltaMap
    from resilver.lineage import Lineage

BLOCK_BYTES: Final = 4096
BLOCKS_MAX: Final = 64


def check_lineages(base: str, mine: Lineage, theirs: Lineage) -> None:
    """The base must be in both lineages, of one size, and its data must be here."""
    here, there = mine.find(base), theirs.find(base)
    if here is None or not here.present:
        raise Refused("BASE_GONE", f"the base {base} is not here any more")
    if there is None:
        raise Refused("BASE_GONE", f"the base {here.name} ({base}) is not in the lineage of the target")
    if (here.size_bytes, here.cp) != (there.size_bytes, there.cp):
        raise Damaged(
            "BASE_MISMATCH",
            f"the base {base} is {here.cp} of {here.size_bytes} bytes here, "
            f"and {there.cp} of {there.size_bytes} bytes at the source",
        )


def pick_blocks(size_bytes: int, allocated: DeltaMap, chance: random.Random) -> list[DeltaRange]:
    """Up to 64 blocks of the base, in order and without repetition."""
    picked = {chance.randrange(size_bytes) // BLOCK_BYTES for _ in range(BLOCKS_MAX // 2)} if size_bytes else set()
    data = ~allocated.zeros
    ends = np.cumsum(allocated.lengths[data])
    if len(ends):
        starts, lengths = allocated.offsets[data], allocated.lengths[data]
        for _ in range(BLOCKS_MAX // 2):
            at = chance.randrange(int(ends[-1]))
            row = int(np.searchsorted(ends, at, side="right"))
            picked.add((int(starts[row]) + at - int(ends[row] - lengths[row])) // BLOCK_BYTES)
    starts_at = (number * BLOCK_BYTES for number in sorted(picked))
    return [DeltaRange(start, min(BLOCK_BYTES, size_bytes - start)) for start in starts_at if start < size_bytes]


def digest_ranges(backend: BlockBackend, snapshot: str, ranges: Sequence[DeltaRange]) -> list[bytes]:
    """The BLAKE3 of some stretches of a snapshot, each as long as it says."""
    reader = backend.open_reader(snapshot)
    try:
        reader.announce(ranges)
        buffer = memoryview(bytearray(max((each.length for each in ranges), default=0)))
        digests = []
        for each in ranges:
            if each.offset + each.length > reader.size_bytes:
                raise Refused("TARGET_CHANGED", f"snapshot {snapshot} ends at {reader.size_bytes}")
            view = buffer[: each.length]
            reader.read_into(each.offset, view)
            digests.append(blake3(view).digest())
        return digests
    finally:
        reader.close()


def compare(base: str, ranges: Sequence[DeltaRange], mine: Sequence[bytes], theirs: Sequence[bytes]) -> None:
    """`Damaged("BASE_MISMATCH")` names the first block that differs."""
    differing = [each.offset for each, here, there in zip(ranges, mine, theirs, strict=True) if here != there]
    if differing:
        raise Damaged(
            "BASE_MISMATCH",
            f"{len(differing)} of {len(ranges)} blocks of the base {base} that were compared differ from the source's, "
            f"the first at byte {differing[0]}; nothing was changed, a full copy would set it right",
            offset=str(differing[0]),
        )
