"""A transfer, without the wire: what a source tells goes into a target's stage, and nothing else does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from agent.backends.base import AnyStage, Stage, StreamOrigin
from resilver.lineage import Snapshot

if TYPE_CHECKING:
    from tests.agent.backends.adapter import Replica

FRAME_BYTES = 1 << 20
STAGES: list[AnyStage] = []  # those that a test has opened; closed at its end, or their mount stays busy


def open_stage(target: Replica, source: Replica, base: str, snapshot: Snapshot) -> AnyStage:
    """The stage of (base, snapshot), checked as the agent would before the first byte."""
    backend: Any = target.backend
    if target.kind.shape == "blocks":
        stage: AnyStage = backend.open_stage(base, snapshot.id, snapshot.size_bytes)
    else:
        origin = origin_of(source, base, snapshot.id)
        if base:
            backend.check_base(base, origin.native_base)
        backend.check_stream_space(origin.stream_bytes)
        stage = backend.open_stream_stage(base, snapshot.id, origin)
    STAGES.append(stage)
    return stage


def origin_of(source: Replica, base: str, target: str) -> StreamOrigin:
    backend: Any = source.backend
    stream_bytes = backend.delta_bytes(base, target)  # first: it tells a base that is gone from a target
    return StreamOrigin(
        native_base=backend.native_id(base) if base else "",
        native_target=backend.native_id(target),
        formats=backend.formats(),
        stream_bytes=stream_bytes,
    )


def transfer(source: Replica, target: Replica, stage: AnyStage, frame_bytes: int = FRAME_BYTES) -> None:
    """Fills a stage with what the source's delta names, and nothing else."""
    if target.kind.shape == "blocks":
        assert hasattr(stage, "write")
        _transfer_blocks(source, stage)
        return
    assert hasattr(stage, "feed")
    stage.start(format_for(source, target))
    for frame in stream_of(source, stage.base, stage.target, format_for(source, target), frame_bytes):
        stage.feed(memoryview(frame))
    assert not stage.complete
    stage.finish()
    assert stage.complete
    stage.verify(threading.Event())


def _transfer_blocks(source: Replica, stage: Stage) -> None:
    backend: Any = source.backend
    with contextlib.closing(backend.open_reader(stage.target)) as reader:
        for row in backend.delta_map(stage.base, stage.target):
            if row.zero:
                stage.zero(row.offset, row.length)
                continue
            for offset in range(row.offset, row.offset + row.length, FRAME_BYTES):
                data = memoryview(bytearray(min(FRAME_BYTES, row.offset + row.length - offset)))
                reader.read_into(offset, data)
                stage.write(offset, data)
    stage.sync()


def format_for(source: Any, target: Any) -> str:
    """The best format that both ends have."""
    return next(form for form in target.backend.formats() if form in source.backend.formats())


def stream_of(
    source: Any, base: str, target: str, stream_format: str, frame_bytes: int = FRAME_BYTES
) -> Iterator[bytes]:
    """A stream, in full frames but for the last."""
    stream = source.backend.open_send(base, target, stream_format)
    try:
        while True:
            view = memoryview(bytearray(frame_bytes))
            have = 0
            while have < frame_bytes and (got := stream.read_into(view[have:])):
                have += got
            if have:
                yield bytes(view[:have])
            if have < frame_bytes:
                return
    finally:
        stream.close()


def close_stages() -> None:
    while STAGES:
        STAGES.pop().close()
