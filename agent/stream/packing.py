"""Whether what is sent is compressed: only where it has been seen to be faster so, and looked at again and again.

What a way, a source and a target can do is not known beforehand, and changes. So both are tried on the transfer itself:
a round of it without, a round of it with zstd, and the faster of the two goes on. The other one is tried again after a
while, which gets longer each time that it is still the slower. Data that gives nothing ends its round after a MiB.

A round counts everything from the end of the one before, also the wait for requests: whatever it is that holds a
transfer up, packing stays only where the whole of it gains.
"""

from __future__ import annotations

from typing import Final

import zstandard

ROUND_BYTES: Final = 8 << 20
ROUND_S: Final = 1.0
LOOK_BYTES: Final = 1 << 20
HOLD_FIRST: Final = 4
HOLD_MAX: Final = 256
GAIN: Final = 1.1
"""How much faster it must be than without; a packed payload must be shorter by as much."""
LEVEL: Final = 1


class Chooser:
    """`packs` says what to do now. Pure: times are arguments, in monotonic seconds."""

    def __init__(self, now: float) -> None:
        self.packs = False
        self._usual = False
        self._usual_rate = 0.0
        self._left = 1
        self._hold = HOLD_FIRST
        self._began_at = now
        self._raw_bytes = self._stored_bytes = 0

    def sent(self, raw_bytes: int, stored_bytes: int, now: float) -> None:
        """After each buffer: what it held, as it reads and as it was sent."""
        self._raw_bytes += raw_bytes
        self._stored_bytes += stored_bytes
        passed_s = now - self._began_at
        if self.packs and self._raw_bytes >= LOOK_BYTES and self._stored_bytes * GAIN > self._raw_bytes:
            self._end(0.0, now)
        elif self._raw_bytes >= ROUND_BYTES or passed_s >= ROUND_S:
            self._end(self._raw_bytes / max(passed_s, 1e-6), now)

    def _end(self, rate: float, now: float) -> None:
        """A round is over, in which so many bytes per second went."""
        self._began_at, self._raw_bytes, self._stored_bytes = now, 0, 0
        if self.packs is self._usual:
            self._usual_rate = rate
            self._left -= 1
            if self._left <= 0 or (rate == 0.0 and self.packs):
                self.packs = not self._usual
            return
        better = rate > GAIN * self._usual_rate if self.packs else rate * GAIN >= self._usual_rate
        self._hold = HOLD_FIRST if better else min(4 * self._hold, HOLD_MAX)
        if better:
            self._usual, self._usual_rate = self.packs, rate
        self.packs, self._left = self._usual, self._hold


class Packer:
    """One connection's; for one thread."""

    def __init__(self, now: float) -> None:
        self.chooser: Final = Chooser(now)
        self._zstd: Final = zstandard.ZstdCompressor(level=LEVEL)

    def pack(self, body: memoryview) -> bytes | None:
        """The body in less room; None if it is to go as it is."""
        if not self.chooser.packs:
            return None
        packed = self._zstd.compress(body)
        return packed if len(packed) * GAIN < len(body) else None
