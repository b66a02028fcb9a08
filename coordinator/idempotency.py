"""Answers that are given again: a changing request with a `request_id` is carried out once.

The rules:

* The same id with the same body gets the same answer, for 24 h, and joins the first one while that still runs, also
  when the first caller has gone. With another body it is `REQUEST_ID_REUSED`.
* Errors are not kept: whatever failed may be asked again under its id. That a caller has waited long enough is no error
  of the work: it goes on, and is joined by whoever asks again.
* The table is one leader's, in memory, and bounded; the oldest answers go first. After a change of leader a request
  that is asked again is carried out again, which the volume's own preconditions (epochs, tips, etags) make safe.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar, cast

from google.protobuf.message import Message

from resilver.errors import Exhausted, Invalid

KEPT_MS: Final = 24 * 3600 * 1000
ENTRIES_MAX: Final = 10_000
ANSWER_BYTES_MAX: Final = 16 << 20

M = TypeVar("M", bound=Message)


@dataclass(slots=True)
class _Entry:
    digest: bytes
    task: asyncio.Task[Message]
    time_ms: int
    answer_bytes: int = 0


class Answered:
    """The table. One event loop's."""

    def __init__(self, now_ms: Callable[[], int], *, entries_max: int = ENTRIES_MAX) -> None:
        self._now_ms = now_ms
        self._entries_max = entries_max
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._answer_bytes = 0

    async def once(self, request_id: str, body: Message, run: Callable[[], Awaitable[M]]) -> M:
        """What `run` answers, or what it answered when this was first asked. Without an id it is just run."""
        if not request_id:
            return await run()
        digest = hashlib.sha256(
            type(body).__name__.encode() + b"\0" + body.SerializeToString(deterministic=True)
        ).digest()
        self._forget_old()
        entry = self._entries.get(request_id)
        if entry is None:
            entry = self._begin(request_id, digest, run)
        elif entry.digest != digest:
            message = f"request_id {request_id} was already used with another request; use a new one"
            raise Invalid("REQUEST_ID_REUSED", message, field="request_id")
        # Shielded: a caller that goes away takes nothing back, and its retry finds the answer.
        return cast("M", await asyncio.shield(entry.task))

    def _begin(self, request_id: str, digest: bytes, run: Callable[[], Awaitable[M]]) -> _Entry:
        while len(self._entries) >= self._entries_max:
            if not self._drop_oldest():
                raise Exhausted("TOO_LARGE", f"{len(self._entries)} requests are being carried out; try again later")

        async def carried_out() -> Message:
            return await run()

        task = asyncio.get_running_loop().create_task(carried_out())
        entry = _Entry(digest, task, self._now_ms())
        self._entries[request_id] = entry
        task.add_done_callback(lambda done: self._note(request_id, entry, done))
        return entry

    def _note(self, request_id: str, entry: _Entry, done: asyncio.Task[Message]) -> None:
        if self._entries.get(request_id) is not entry:
            return
        if done.cancelled() or done.exception() is not None:
            del self._entries[request_id]
            return
        entry.answer_bytes = done.result().ByteSize()
        self._answer_bytes += entry.answer_bytes
        while self._answer_bytes > ANSWER_BYTES_MAX and self._drop_oldest():
            pass

    def _forget_old(self) -> None:
        before = self._now_ms() - KEPT_MS
        while self._entries:
            oldest = next(iter(self._entries.values()))
            if oldest.time_ms > before or not oldest.task.done():
                return
            self._drop_oldest()

    def _drop_oldest(self) -> bool:
        """Drops the oldest answer; False if all are still awaited."""
        for request_id, entry in self._entries.items():
            if entry.task.done():
                self._answer_bytes -= entry.answer_bytes
                del self._entries[request_id]
                return True
        return False
