"""The kinds of volume that there are: the only place that names them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from agent.backends.btrfs import BtrfsBackend
from agent.backends.image import ImageBackend
from agent.backends.lvm import LvmBackend
from agent.backends.zfs import ZfsBackend
from resilver.errors import Invalid

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from agent.backends.base import Backend
    from resilver.config import AgentConfig, VolumeConfig


def make_backend(volume: VolumeConfig, config: AgentConfig) -> Backend:
    """The backend of a volume; a kind that is not there is told with those that are."""
    make = KINDS.get(volume.backend)
    if make is None:
        raise Invalid(
            "CONFIG_INVALID",
            f"volume {volume.name}: there is no backend {volume.backend!r}; use one of {', '.join(sorted(KINDS))}",
            field="volumes.backend",
        )
    return make(volume, config)


def _image(volume: VolumeConfig, config: AgentConfig) -> Backend:
    return ImageBackend(
        volume.name,
        volume.path,
        volume.snapshot_dir,
        keep_last=volume.keep_last,
        reserve_ratio=config.space.reserve_ratio,
        reserve_min_bytes=config.space.reserve_min_bytes,
        state_dir=config.state_dir,
    )


def _btrfs(volume: VolumeConfig, config: AgentConfig) -> Backend:
    return BtrfsBackend(
        volume.name,
        volume.path,
        volume.snapshot_dir,
        adopt=volume.adopt,
        keep_last=volume.keep_last,
        reserve_ratio=config.space.reserve_ratio,
        reserve_min_bytes=config.space.reserve_min_bytes,
        state_dir=config.state_dir,
    )


def _zfs(volume: VolumeConfig, config: AgentConfig) -> Backend:
    return ZfsBackend(
        volume.name,
        volume.path,
        volume.snapshot_dir,
        reserve_ratio=config.space.reserve_ratio,
        reserve_min_bytes=config.space.reserve_min_bytes,
        state_dir=config.state_dir,
    )


def _lvm_thin(volume: VolumeConfig, config: AgentConfig) -> Backend:
    return LvmBackend(
        volume.name,
        volume.path,
        volume.snapshot_dir,
        keep_last=volume.keep_last,
        reserve_ratio=config.space.reserve_ratio,
        reserve_min_bytes=config.space.reserve_min_bytes,
        state_dir=config.state_dir,
    )


KINDS: Final[Mapping[str, Callable[[VolumeConfig, AgentConfig], Backend]]] = {
    "btrfs": _btrfs,
    "image": _image,
    "lvm-thin": _lvm_thin,
    "zfs": _zfs,
}
