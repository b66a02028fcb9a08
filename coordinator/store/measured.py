"""A store whose every request is timed, and which tells whether the store answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

from coordinator.counters import STORE_SECONDS, STORE_UP
from coordinator.store.base import Health, Leader, Reign, Store, Stored, Write
from resilver.errors import Unavailable


class MeasuredStore:
    """A `Store` around another one."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def open(self) -> str:
        with _timed("open"):
            return await self._store.open()

    async def campaign(self, name: str, address: str, *, above_term: int = 0) -> Reign | Leader:
        with _timed("campaign"):
            return await self._store.campaign(name, address, above_term=above_term)

    async def renew(self, reign: Reign) -> Reign:
        with _timed("renew"):
            return await self._store.renew(reign)

    async def resign(self, reign: Reign) -> None:
        with _timed("resign"):
            await self._store.resign(reign)

    async def leader(self) -> Leader | None:
        with _timed("leader"):
            return await self._store.leader()

    async def read_all(self) -> Mapping[str, Stored]:
        with _timed("read_all"):
            return await self._store.read_all()

    async def commit(self, reign: Reign, writes: Sequence[Write]) -> int:
        with _timed("commit"):
            return await self._store.commit(reign, writes)

    async def health(self) -> Health:
        return await self._store.health()

    async def close(self) -> None:
        await self._store.close()


@contextlib.contextmanager
def _timed(operation: str) -> Iterator[None]:
    begun = time.monotonic()
    try:
        yield
    except Unavailable:
        STORE_UP.set(0)
        raise
    else:
        STORE_UP.set(1)
    finally:
        STORE_SECONDS.labels(operation).observe(time.monotonic() - begun)
