"""All targets, by name."""

from __future__ import annotations

from typing import Final

from fuzz import (
    targets_config,
    targets_files,
    targets_store,
    targets_stream,
    targets_tools,
    targets_wire,
)
from fuzz.target import TARGETS, Target

__all__ = ["ALL"]

_MODULES: Final = (targets_config, targets_files, targets_store, targets_stream, targets_tools, targets_wire)
ALL: Final[dict[str, Target]] = dict(sorted(TARGETS.items()))
