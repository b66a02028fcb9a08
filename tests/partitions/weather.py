"""A switch with weather: frames are delayed, lost and put into another order, as `tc netem` would.

`python -m tests.partitions.weather SEED DELAY_MS JITTER_MS LOSS REORDER LINK…` in the namespace of the links, which are
in no bridge meanwhile. Says so in one line once it forwards, and does until it is killed.
"""

from __future__ import annotations

import heapq
import itertools
import random
import select
import socket
import sys
import time

ETH_P_ALL = 3
FRAME_BYTES_MAX = 16 << 10
FRAMES_AT_ONCE = 64
QUEUE_FRAMES_MAX = 100_000
BUFFER_BYTES = 16 << 20
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23


def main() -> None:
    seed, delay_ms, jitter_ms, loss, reorder = map(float, sys.argv[1:6])
    chance = random.Random(seed)
    ports = {port.fileno(): port for port in map(_opened, sys.argv[6:])}
    poll = select.poll()
    for number in ports:
        poll.register(number, select.POLLIN)
    where: dict[bytes, int] = {}
    waiting: list[tuple[float, int, bytes, int]] = []
    order = itertools.count()
    sys.stdout.write("forwarding\n")
    sys.stdout.flush()
    while True:
        left_ms = (waiting[0][0] - time.monotonic()) * 1000 if waiting else 1000.0
        for number, _ in poll.poll(max(left_ms, 0.0)):
            for frame in _came(ports[number]):
                where[frame[6:12]] = number
                if chance.random() < loss or len(waiting) >= QUEUE_FRAMES_MAX:
                    continue
                late_ms = 0.0 if chance.random() < reorder else delay_ms + chance.uniform(-jitter_ms, jitter_ms)
                heapq.heappush(waiting, (time.monotonic() + late_ms / 1000, next(order), frame, number))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, frame, came_from = heapq.heappop(waiting)
            known = where.get(frame[:6])
            for number in ports if known is None else (known,):
                if number != came_from:
                    _send(ports[number], frame)


def _opened(link: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    port.bind((link, ETH_P_ALL))
    port.setblocking(False)
    return port


def _came(port: socket.socket) -> list[bytes]:
    frames: list[bytes] = []
    while len(frames) < FRAMES_AT_ONCE:
        try:
            frames.append(port.recv(FRAME_BYTES_MAX))
        except OSError:  # nothing more, or the link is down
            break
    return frames


def _send(port: socket.socket, frame: bytes) -> None:
    try:
        port.send(frame)
    except OSError:  # its queue is full, or the link is down: lost, as on any network
        return


if __name__ == "__main__":
    main()
