"""The two TOML files, as frozen classes.

The file says what is true of this machine; the store says what is true of the volume. The rules:

* Unknown keys are errors, and the nearest key is named. Every error names file and key and says what would be right.
* What is loaded is whole: names, addresses, paths and ports have been checked against each other, `auto` and empty
  values that depend on this file alone have been resolved. Nothing here opens a socket or creates a file.
* Without [tls] everything is plaintext, which is for loopback, or for those who wrote `insecure = true`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from resilver.address import Address, parse_address
from resilver.config_hooks import NO_HOOKS, Hooks, hook_faults
from resilver.config_rules import (
    AUTO,
    NAME,
    NAME_RULE,
    Fault,
    absolute_faults,
    advertise_faults,
    clash_faults,
    clear_faults,
    dial_faults,
    name_faults,
    tls_faults,
)
from resilver.limits import rate_fault
from resilver.toml import convert, invalid, read_toml

__all__ = [
    "AUTO",
    "NAME",
    "NAME_RULE",
    "NO_HOOKS",
    "Address",
    "AgentConfig",
    "CoordinatorConfig",
    "EtcdConfig",
    "Hooks",
    "Limits",
    "Space",
    "Tls",
    "VolumeConfig",
    "load_agent_config",
    "load_coordinator_config",
    "parse_address",
    "parse_store",
]


LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "json", "console"]
IoPriority = Literal["normal", "idle"]

Count = Annotated[int, Meta(ge=1, le=1024)]
Bytes = Annotated[int, Meta(ge=0, le=1 << 62)]
Priority = Annotated[int, Meta(ge=-1_000_000, le=1_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=3600)]


class Tls(Struct, frozen=True, kw_only=True):
    """PEM files: whom to trust, who this process is, and its key. All three, or none for plaintext."""

    ca: str = ""
    cert: str = ""
    key: str = ""

    @property
    def on(self) -> bool:
        return bool(self.ca)


class Limits(Struct, frozen=True, kw_only=True):
    """What mirroring may take of this machine; a rate of 0 is no limit.

    The counts are of replicas that are received, or served, at once.
    """

    receive_max_bytes_s: Bytes = 0
    send_max_bytes_s: Bytes = 0
    receive_max_count: Count = 2
    send_max_count: Count = 4
    disk_threads: Count = 4
    io_priority: IoPriority = "normal"


class Space(Struct, frozen=True, kw_only=True):
    """What stays free of a file system: the larger of the two.

    `spool_max_bytes`: how much of a file system's own stream is kept until it is in place, so as not to be sent again.
    """

    reserve_ratio: Annotated[float, Meta(ge=0, le=0.9)] = 0.05
    reserve_min_bytes: Bytes = 1 << 30
    spool_max_bytes: Bytes = 16 << 30


class VolumeConfig(Struct, frozen=True, kw_only=True):
    """One volume as it lies on this node. `snapshot_dir` is absolute once loaded.

    `path` is what the backend calls the live copy: a file, a subvolume, `pool/dataset`, `vg/lv`. `adopt` are patterns
    of snapshots that other tools have made or received, beside those that the live copy itself shows.
    Volumes of one node with the same `group` are snapshotted together. `priority` is the node's in an election,
    `resync_priority` the volume's among resyncs that wait for a place: the highest that any of its nodes says.
    """

    name: str
    backend: str
    path: Path
    priority: Priority = 0
    snapshot_dir: Path = Path()
    keep_last: Annotated[int, Meta(ge=1, le=10_000)] = 16
    adopt: tuple[str, ...] = ()
    group: str = ""
    resync_priority: Priority = 0
    hooks: Hooks = NO_HOOKS


class EtcdConfig(Struct, frozen=True, kw_only=True):
    """How to reach etcd; TLS if `ca` is set."""

    ca: str = ""
    cert: str = ""
    key: str = ""
    username: str = ""
    password_file: str = ""
    timeout_s: Annotated[float, Meta(ge=0.1, le=60)] = 2.0


def _hostname() -> str:
    return socket.gethostname()


def _address(text: str) -> Any:
    # Any, because a mutable-looking default needs a factory and msgspec types it as the field.
    return msgspec.field(default_factory=lambda: parse_address(text))


class AgentConfig(Struct, frozen=True, kw_only=True):
    """agent.toml. `stated` holds the top-level keys that the file itself sets."""

    node: str = msgspec.field(default_factory=_hostname)
    cluster: str
    coordinators: tuple[Address, ...]
    listen: Address = _address("[::]:7401")
    stream_listen: Address = _address("[::]:7402")
    metrics_listen: Address = _address("127.0.0.1:7403")
    advertise: str = AUTO
    stream_advertise: str = AUTO
    state_dir: Path = Path("/var/lib/resilver")
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    include: tuple[str, ...] = ("/etc/resilver/agent.d/*.toml",)
    insecure: bool = False
    limits: Limits = Limits()
    space: Space = Space()
    tls: Tls = Tls()
    volumes: tuple[VolumeConfig, ...] = ()
    stated: frozenset[str] = frozenset()


class CoordinatorConfig(Struct, frozen=True, kw_only=True):
    """coordinator.toml. `stated` holds the top-level keys that the file itself sets."""

    name: str = msgspec.field(default_factory=_hostname)
    cluster: str
    listen: Address = _address("[::]:7400")
    advertise: str = AUTO
    metrics_listen: Address = _address("127.0.0.1:7404")
    state_dir: Path = Path("/var/lib/resilver")
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    insecure: bool = False
    store: str = "sqlite:///var/lib/resilver/store.db"
    etcd: EtcdConfig = EtcdConfig()
    tls: Tls = Tls()
    lease_ttl_s: Annotated[int, Meta(ge=2, le=600)] = 10
    heartbeat_s: Seconds = 2.0
    node_timeout_s: Seconds = 10.0
    examine_timeout_s: Seconds = 10.0
    resyncs_max: Count = 16
    stated: frozenset[str] = frozenset()

    def advertised(self, port: int) -> Address:
        """What agents and commands are told to dial, once the port is known.

        Where `auto` meets every interface there is no better guess than this machine's name.
        """
        if self.advertise != AUTO:
            return parse_address(self.advertise)
        return Address(_hostname() if self.listen.every_interface else self.listen.host, port)


# Backends whose live copy is named in a pool; what stands beside the snapshots is mounted below _META.
_NAMED: Final = {
    "zfs": 'a dataset, such as "tank/vm1"',
    "lvm-thin": 'a volume group and a thin volume, such as "vg/vm1"',
}
_POOLED: Final = re.compile(r"[A-Za-z0-9][^/\x00-\x1f@#]*(?:/[^/\x00-\x1f@#]+)+")
_META: Final = Path("/var/lib/resilver/volumes")

_CHOICES: Final = {
    "log_level": get_args(LogLevel),
    "log_format": get_args(LogFormat),
    "io_priority": get_args(IoPriority),
}
_STORES: Final = "sqlite:///var/lib/resilver/store.db or etcd://h1:2379,h2:2379"


def load_agent_config(path: str | Path) -> AgentConfig:
    """Reads agent.toml and the files it includes; raises `Invalid("CONFIG_INVALID")`."""
    file = Path(path)
    raw = read_toml(file)
    config = convert(file, raw, AgentConfig, _decode, _CHOICES)
    volumes = [*config.volumes, *_included(file, config.include)]
    config = msgspec.structs.replace(
        config, volumes=tuple(_resolved(volume) for volume in volumes), stated=frozenset(raw)
    )
    _refuse_first(file, _agent_faults(config))
    return config


def load_coordinator_config(path: str | Path) -> CoordinatorConfig:
    """Reads coordinator.toml; raises `Invalid("CONFIG_INVALID")`."""
    file = Path(path)
    raw = read_toml(file)
    config = convert(file, raw, CoordinatorConfig, _decode, _CHOICES)
    config = msgspec.structs.replace(config, stated=frozenset(raw))
    _refuse_first(file, _coordinator_faults(config))
    return config


def parse_store(url: str) -> Path | tuple[Address, ...]:
    """`sqlite:///var/lib/resilver/store.db` -> the path; `etcd://h1:2379,h2` -> the endpoints; else ValueError."""
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite":
        path = Path(rest)
        if not path.is_absolute() or len(path.parts) < 2:
            raise ValueError(f"{url!r} names no absolute path: write sqlite:///var/lib/resilver/store.db")
        return path
    if scheme == "etcd" and rest.strip("/"):
        endpoints = tuple(parse_address(part.strip(), default_port=2379) for part in rest.strip("/").split(","))
        if not all(endpoint.host and endpoint.port for endpoint in endpoints):
            raise ValueError(f"{url!r} does not name the host and port of each member: write {_STORES}")
        return endpoints
    raise ValueError(f"{url!r} is no store: write {_STORES}")


def _decode(kind: type, value: Any) -> Any:
    """The hook of msgspec for the types of our own; a ValueError comes back with the key's path."""
    if not isinstance(value, str):
        raise ValueError('should be a text in "quotes"')  # noqa: TRY004 - msgspec adds the path to a ValueError only
    if kind is Address:
        return parse_address(value)
    if kind is Path:
        return Path(value)
    raise NotImplementedError(f"no decoder for {kind}")


class _Included(Struct, frozen=True, kw_only=True):
    """An included file adds volumes and nothing else."""

    volumes: tuple[VolumeConfig, ...] = ()


def _included(file: Path, patterns: Iterable[str]) -> Iterator[VolumeConfig]:
    for pattern in patterns:
        start = Path(Path(pattern).anchor) if Path(pattern).is_absolute() else file.absolute().parent
        found = sorted(start.glob(str(Path(pattern).relative_to(start)) if Path(pattern).is_absolute() else pattern))
        if not found and not set(pattern) & set("*?["):
            raise invalid(
                file, "include", f"{pattern!r} does not exist; take it out, or write a pattern such as *.toml"
            )
        for one in found:
            yield from convert(one, read_toml(one), _Included, _decode, _CHOICES).volumes


def _resolved(volume: VolumeConfig) -> VolumeConfig:
    beside = volume.path.parent / ".resilver" / volume.name
    if volume.backend in _NAMED:
        beside = _META / volume.name
    unset = volume.snapshot_dir == Path()
    return msgspec.structs.replace(volume, snapshot_dir=beside if unset else volume.snapshot_dir)


def _refuse_first(file: Path, faults: Iterator[Fault]) -> None:
    for field, message in faults:
        raise invalid(file, field, message)


def _agent_faults(config: AgentConfig) -> Iterator[Fault]:
    yield from name_faults(node=config.node, cluster=config.cluster)
    if not config.coordinators:
        yield "coordinators", 'is empty: name at least one, such as ["127.0.0.1:7400"]'
    for index, address in enumerate(config.coordinators):
        yield from dial_faults(f"coordinators[{index}]", address)
    yield from advertise_faults("advertise", config.advertise)
    yield from advertise_faults("stream_advertise", config.stream_advertise)
    yield from absolute_faults("state_dir", config.state_dir)
    yield from clash_faults(
        listen=config.listen, stream_listen=config.stream_listen, metrics_listen=config.metrics_listen
    )
    for key in ("receive_max_bytes_s", "send_max_bytes_s"):
        if fault := rate_fault(getattr(config.limits, key)):
            yield f"limits.{key}", fault
    yield from tls_faults(config.tls.ca, config.tls.cert, config.tls.key, insecure=config.insecure)
    clear = {"listen": config.listen, "stream_listen": config.stream_listen}
    clear |= {f"coordinators[{index}]": address for index, address in enumerate(config.coordinators)}
    yield from clear_faults(clear, allowed=config.insecure or config.tls.on)
    yield from _volume_faults(config.volumes)
    yield from hook_faults(config.volumes)


def _coordinator_faults(config: CoordinatorConfig) -> Iterator[Fault]:
    yield from name_faults(name=config.name, cluster=config.cluster)
    yield from advertise_faults("advertise", config.advertise)
    yield from absolute_faults("state_dir", config.state_dir)
    yield from clash_faults(listen=config.listen, metrics_listen=config.metrics_listen)
    yield from tls_faults(config.tls.ca, config.tls.cert, config.tls.key, insecure=config.insecure)
    yield from clear_faults({"listen": config.listen}, allowed=config.insecure or config.tls.on)
    if config.node_timeout_s <= config.heartbeat_s:
        yield "node_timeout_s", f"should be longer than heartbeat_s, which is {config.heartbeat_s:g}"
    try:
        where = parse_store(config.store)
    except ValueError as error:
        yield "store", str(error)
        return
    if isinstance(where, Path):
        return
    if not config.etcd.ca:
        for address in where:
            yield from clear_faults({"store": address}, allowed=config.insecure, without="etcd.ca")
    if config.etcd.timeout_s >= config.lease_ttl_s:
        yield "etcd.timeout_s", f"should be shorter than lease_ttl_s, which is {config.lease_ttl_s}"
    if bool(config.etcd.username) != bool(config.etcd.password_file):
        yield "etcd.password_file", "etcd wants username and password_file together, or neither"
    if bool(config.etcd.cert) != bool(config.etcd.key) or (config.etcd.cert and not config.etcd.ca):
        yield "etcd.cert", "etcd wants cert and key together, and ca with them"


def _volume_faults(volumes: Iterable[VolumeConfig]) -> Iterator[Fault]:
    names: set[str] = set()
    taken: dict[str, str] = {}
    for index, volume in enumerate(volumes):
        at = f"volumes[{index}]"
        yield from name_faults(**{f"{at}.name": volume.name, f"{at}.backend": volume.backend})
        if volume.name in names:
            yield f"{at}.name", f"{volume.name!r} is the name of another volume on this node: give each its own"
        names.add(volume.name)
        for key, path in (("path", volume.path), ("snapshot_dir", volume.snapshot_dir)):
            if key == "path" and volume.backend in _NAMED:
                yield from _named_faults(f"{at}.path", volume, taken)
                continue
            yield from absolute_faults(f"{at}.{key}", path)
            # Compared as the kernel would reach them: a symbolic link must not bring two volumes onto one file.
            real = os.path.realpath(path)
            if real in taken:
                yield f"{at}.{key}", f"{str(path)!r} is the same place as {taken[real]}: give each its own"
            taken[real] = f"the {key} of {volume.name!r}"


def _named_faults(field: str, volume: VolumeConfig, taken: dict[str, str]) -> Iterator[Fault]:
    """A volume whose live copy has a name in a pool, and no path."""
    name = str(volume.path)
    if _POOLED.fullmatch(name) is None:
        yield field, f"{name!r} should be {_NAMED[volume.backend]}"
    key = f"{volume.backend} {name}"
    if key in taken:
        yield field, f"{name!r} is the same as {taken[key]}: give each its own"
    taken[key] = f"the path of {volume.name!r}"
