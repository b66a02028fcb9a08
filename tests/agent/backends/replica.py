"""A replica for tests of the image backend alone: the conformance suite's, and ways that only image files have."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from agent.backends.base import Stage
from agent.delta import DeltaMap
from resilver.lineage import Snapshot
from tests.agent.backends.adapter import BLOCK, SIZE, VOLUME_ID, blocks_of, noise, text
from tests.agent.backends.kinds.image import KINDS, ImageReplica
from tests.agent.backends.transfer import STAGES

__all__ = ["BLOCK", "SIZE", "STAGES", "VOLUME_ID", "Replica", "blocks_of", "digest", "noise", "text"]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Replica(ImageReplica):
    """One node's volume `vm1`."""

    kind = KINDS[0]

    @property
    def content(self) -> bytes:
        return self.path.read_bytes()

    def open_stage(self, base: str, target: str, size: int) -> Stage:
        stage = self.backend.open_stage(base, target, size)
        STAGES.append(stage)
        return stage

    def stage_from(self, source: Any, base: str, target: Snapshot) -> tuple[Stage, DeltaMap]:
        """A stage that is filled with what the source's delta map names, and that map."""
        return self.fill(source, base, target), source.backend.delta_map(base, target.id)
