"""Watching: streams that outlive a coordinator, and resyncs that are shown until all are final.

A stream that breaks is opened anew, with the board as it was, for at most `LOST_MAX_S` without a word from any
coordinator: transfers go on meanwhile, so losing sight is no failure of theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Final, TypeVar

from rich.live import Live

from resilver.cli.progress import Board
from resilver.cli.words import now as wall_clock
from resilver.errors import Superseded, Unavailable
from resilver.v1 import coordinator_pb2 as api

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from grpc.aio import UnaryStreamMultiCallable
    from rich.console import Console

    from resilver.cli.client import Client, Stub
    from resilver.cli.session import Session
    from resilver.v1 import volume_pb2 as pb

LOST_MAX_S: Final = 60.0
RETRY_S: Final = 1.0
REFRESH_HZ: Final = 4

Req = TypeVar("Req")
Res = TypeVar("Res")


async def steady(
    client: Client,
    method: Callable[[Stub], UnaryStreamMultiCallable[Req, Res]],
    request: Callable[[], Req],
    lost: Callable[[str], None],
) -> AsyncIterator[Res]:
    """A stream that outlives the coordinator that serves it; ends when a coordinator ends it.

    `lost` is told, once each time, that it broke and is tried again.
    """
    heard = time.monotonic()
    told = False
    while True:
        try:
            async for answer in client.stream(method, request()):
                heard, told = time.monotonic(), False
                yield answer
        except (Unavailable, Superseded) as error:
            if time.monotonic() - heard > LOST_MAX_S:
                raise
            if not told:
                lost(f"{error.message}; trying again for {LOST_MAX_S:g} s. What runs goes on without it")
                told = True
        else:
            return
        await asyncio.sleep(RETRY_S)


async def follow(
    client: Client, resyncs: Sequence[pb.Resync], changed: Callable[[Board], None], lost: Callable[[str], None]
) -> list[pb.Resync]:
    """Watches these runs until each is final; what they ended as, in the order given."""
    board = Board()
    board.update(resyncs, wall_clock())
    changed(board)
    request = api.WatchResyncsRequest(ids=[resync.id for resync in resyncs])
    while not board.settled():
        try:
            async for answer in steady(client, lambda s: s.WatchResyncs, lambda: request, lost):
                board.update(answer.resyncs, wall_clock())
                changed(board)
                if board.settled():
                    return board.resyncs
        except (Unavailable, Superseded) as error:
            raise Unavailable(
                "NO_LEADER",
                f"lost sight of the resyncs: {error.message}. They go on without being watched",
                next_command="resilver resyncs --active --watch",
            ) from error
        # The watch ended before all were final: a leader that goes away may end it so.
        await asyncio.sleep(RETRY_S)
    return board.resyncs


@contextlib.contextmanager
def display(session: Session) -> Iterator[Callable[[Board], None]]:
    """Where a board is shown: nowhere for JSON, live on a terminal, else in lines."""
    console = session.output.out
    if session.output.json:
        yield lambda _board: None
    elif console.is_terminal:
        with _live(console) as changed:
            yield changed
    else:
        yield lambda board: _print_lines(session, board)


def _print_lines(session: Session, board: Board) -> None:
    for line in board.lines(wall_clock()):
        session.output.say(line)


@contextlib.contextmanager
def _live(console: Console) -> Iterator[Callable[[Board], None]]:
    shown = Board()

    def changed(board: Board) -> None:
        nonlocal shown
        shown = board

    with Live(
        console=console,
        get_renderable=lambda: shown.table(wall_clock()),
        refresh_per_second=REFRESH_HZ,
        vertical_overflow="visible",
    ):
        yield changed


async def watch(client: Client, session: Session, resyncs: Sequence[pb.Resync]) -> list[pb.Resync]:
    """Shows these runs until each is final, or until `--timeout`."""
    with display(session) as changed:
        try:
            async with asyncio.timeout(session.options.timeout_s):
                return await follow(client, resyncs, changed, session.output.aside)
        except TimeoutError:
            raise Unavailable(
                "DEADLINE",
                f"not all resyncs were done within {session.options.timeout_s:g} s; they go on",
                next_command="resilver resyncs --active --watch",
            ) from None
