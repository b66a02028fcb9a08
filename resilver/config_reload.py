"""What a running process takes on of its file at SIGHUP; every other change is refused whole."""

from __future__ import annotations

from typing import Final, TypeVar

from msgspec import Struct

from resilver.config import AgentConfig, CoordinatorConfig, VolumeConfig
from resilver.errors import Invalid

# What a running process takes on at SIGHUP, by dotted key. Everything else names things, binds ports or opens files.
RELOADABLE_AGENT: Final = frozenset(
    {
        "log_level",
        "limits.receive_max_bytes_s",
        "limits.send_max_bytes_s",
        "limits.receive_max_count",
        "limits.send_max_count",
        "limits.io_priority",
        "space.reserve_ratio",
        "space.reserve_min_bytes",
        "volumes.priority",
        "volumes.keep_last",
        "volumes.group",
        "volumes.resync_priority",
        "volumes.hooks",
    }
)
RELOADABLE_COORDINATOR: Final = frozenset({"log_level", "node_timeout_s", "examine_timeout_s", "resyncs_max"})

Config = TypeVar("Config", AgentConfig, CoordinatorConfig)


def changed_keys(old: Config, new: Config) -> frozenset[str]:
    """The dotted keys in which two configurations differ; `volumes` alone if volumes came or went."""
    changed = set()
    for key in old.__struct_fields__:
        before, after = getattr(old, key), getattr(new, key)
        if key == "stated" or before == after:
            continue
        if key == "volumes":
            changed |= _changed_volumes(before, after)
        elif isinstance(before, Struct):
            changed |= {f"{key}.{name}" for name in _differing(before, after)}
        else:
            changed.add(key)
    return frozenset(changed)


def reload_of(old: Config, new: Config) -> frozenset[str]:
    """What changes with `new`; raises Invalid if any of it needs a restart, so that a reload is taken whole or not."""
    changed = changed_keys(old, new)
    fixed = sorted(changed - (RELOADABLE_AGENT if isinstance(old, AgentConfig) else RELOADABLE_COORDINATOR))
    if fixed:
        raise Invalid(
            "CONFIG_INVALID",
            f"{', '.join(fixed)} cannot be changed while running: nothing was reloaded; undo it, or restart",
            field=fixed[0],
        )
    return changed


def _differing(before: Struct, after: Struct) -> set[str]:
    return {name for name in before.__struct_fields__ if getattr(before, name) != getattr(after, name)}


def _changed_volumes(before: tuple[VolumeConfig, ...], after: tuple[VolumeConfig, ...]) -> set[str]:
    old = {volume.name: volume for volume in before}
    new = {volume.name: volume for volume in after}
    if old.keys() != new.keys():
        return {"volumes"}
    return {f"volumes.{key}" for name, volume in old.items() for key in _differing(volume, new[name])}
