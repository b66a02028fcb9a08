"""Every kind of backend on every sort of ground that the conformance suite runs against: the only place to add one."""

from __future__ import annotations

from tests.agent.backends.adapter import Kind
from tests.agent.backends.kinds import btrfs, image, zfs

KINDS: tuple[Kind, ...] = (*image.KINDS, *btrfs.KINDS, *zfs.KINDS)
