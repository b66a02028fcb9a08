"""Orders for snapshots, handed to the threads of their volumes, and what came of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from resilver.errors import ResilverError, Unavailable, error_for
from resilver.fields import NOTE_CHARS_MAX, check_id, check_text
from resilver.v1 import agent_pb2
from resilver.wire import snapshot_to_proto

if TYPE_CHECKING:
    from agent.replica import Replica
    from agent.together import Together
    from resilver.lineage import Snapshot
    from resilver.volume import Order

    Take = Callable[[], tuple[Snapshot, bool]]
    Ended = tuple[Snapshot, bool] | BaseException


def take_job(
    replica: Replica,
    order: Order,
    request: agent_pb2.TakeSnapshotRequest,
    field: str = "",
    together: Together | None = None,
) -> Take:
    return partial(
        replica.take_snapshot,
        order,
        check_id(request.request_id, f"{field}request_id", required=False),
        only_if_modified=request.only_if_modified,
        opening=request.opening,
        note=check_text(request.note, f"{field}note", chars_max=NOTE_CHARS_MAX),
        together=together,
    )


def on_all_threads(takes: list[tuple[Replica, Take]], together: Together) -> asyncio.Future[list[Ended]]:
    """Hands them over at once, so that no other order comes between: two groups never wait for each other."""
    futures: list[asyncio.Future[tuple[Snapshot, bool]]] = []
    for replica, take in takes:
        try:
            futures.append(asyncio.wrap_future(replica.worker.submit(take)))
        except Unavailable as error:
            together.leave(replica.volume, error)
            futures.append(asyncio.get_running_loop().create_future())
            futures[-1].set_exception(error)
    return asyncio.gather(*futures, return_exceptions=True)


def all_or_why(volumes: list[str], ended: list[Ended]) -> list[agent_pb2.TakeSnapshotResponse]:
    """All the answers, or the error of the volume that failed, with what was taken all the same."""
    errors = [one for one in ended if isinstance(one, BaseException)]
    taken = [(volume, *one) for volume, one in zip(volumes, ended, strict=True) if not isinstance(one, BaseException)]
    if not errors:
        return [
            agent_pb2.TakeSnapshotResponse(snapshot=snapshot_to_proto(snapshot), taken=new)
            for _, snapshot, new in taken
        ]
    error = next((one for one in errors if "because" not in getattr(one, "metadata", ())), errors[0])
    those = ", ".join(f"{volume} {snapshot.cp}" for volume, snapshot, new in taken if new)
    if not those or not isinstance(error, ResilverError):
        raise error
    said = f"{error.message}; of this group only this was taken: {those}"
    raise error_for(error.reason, said, **{**error.metadata, "taken": those})
