"""`python -m agent.inspect PATH…`: what replicas on this machine are, read from their disks with no agent running.

A PATH is a live copy, a snapshot directory (`.resilver/<volume>`), a directory that holds such, or an agent.toml, whose
volumes, node name and priorities then count. Volumes of other kinds than `image` are found by an agent.toml only.
Nothing is changed: no interrupted commit is finished, nothing is swept.

The weak spot: only a running agent remembers what was there. Of the images in an agent.toml, one whose directory is
missing is called LOST and any other that is not there EMPTY. A path by itself must lead to something.

Exit: 0; 1 if a replica could not be read; 2 for a path that is no replica's.
"""

from __future__ import annotations

import argparse
import functools
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.backends.base import Backend, Examined
from agent.backends.image import ImageBackend
from agent.backends.kinds import make_backend
from agent.examiner import now_ms
from resilver.config import load_agent_config
from resilver.errors import Invalid, ResilverError
from resilver.inspection import Inspection, dump
from resilver.lineage import NO_CP
from resilver.volume import Presence, ReplicaReport

HOME: Final = ".resilver"
EXIT_UNREADABLE: Final = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a replica is; `make` is its backend, of an image that no configuration names if it is None."""

    node: str
    volume: str
    live: Path
    snapshots: Path
    priority: int = 0
    make: Callable[[], Backend] | None = None

    def backend(self) -> Backend:
        """Raises what keeps a kind from working here, such as a program that is not installed."""
        return self.make() if self.make is not None else ImageBackend(self.volume, self.live, self.snapshots)


def inspect(place: Place) -> Inspection:
    """Looks, comparing the live copy with its tip; what cannot be read is an inspection without a report."""
    try:
        backend = place.backend()
        examined = backend.examine()
    except ResilverError as error:
        return Inspection(place.node, place.volume, now_ms(), None, error.reason, error.message)
    return Inspection(place.node, place.volume, now_ms(), _report(place, backend.kind, examined))


def places(path: Path, node: str, volume: str) -> Iterator[Place]:
    """The replicas that a path stands for; `volume` narrows them down, or names one that has no name yet."""
    path = path.absolute()
    if path.suffix == ".toml" and path.is_file():
        yield from _configured(path, node, volume)
    elif path.is_dir() and path.parent.name == HOME:
        yield Place(node, path.name, _live_of(path.parent.parent, path.name), path)
    elif path.is_dir():
        yield from _held(path, node, volume)
    else:
        name = volume or _name_of(path)
        snapshots = path.parent / HOME / name
        if not path.exists() and not snapshots.is_dir():
            raise Invalid(
                "INVALID_FIELD", f"there is no replica at {path}: neither that file nor {snapshots}", field="path"
            )
        yield Place(node, name, path, snapshots)


def _configured(path: Path, node: str, volume: str) -> Iterator[Place]:
    config = load_agent_config(path)
    for one in config.volumes:
        if volume in ("", one.name):
            make = functools.partial(make_backend, one, config)
            yield Place(node or config.node, one.name, one.path, one.snapshot_dir, one.priority, make)


def _held(path: Path, node: str, volume: str) -> Iterator[Place]:
    home = path if path.name == HOME else path / HOME
    names = sorted(entry.name for entry in home.iterdir() if entry.is_dir()) if home.is_dir() else []
    chosen = [name for name in names if volume in ("", name)]
    if not chosen:
        said = f"no volume named {volume!r}" if volume else "no replica"
        raise Invalid("INVALID_FIELD", f"{path} holds {said}; name the live copy itself", field="path")
    for name in chosen:
        yield Place(node, name, _live_of(home.parent, name), home / name)


def _live_of(directory: Path, volume: str) -> Path:
    """The live copy beside a snapshot directory: the file of that name, or the only one there is."""
    files = sorted(entry for entry in directory.iterdir() if entry.is_file())
    named = [entry for entry in files if volume in (entry.name, entry.stem)]
    only = named or (files if len(_volumes(directory)) == 1 else [])
    if len(only) == 1:
        return only[0]
    if not only:
        return directory / volume
    raise Invalid(
        "INVALID_FIELD",
        f"several files in {directory} may be the live copy of {volume}: {', '.join(one.name for one in only)}; "
        "name the one that is",
        field="path",
    )


def _name_of(live: Path) -> str:
    """The volume of a live copy: the snapshot directory of its name, the only one there is, or its own name."""
    names = _volumes(live.parent)
    for name in (live.name, live.stem):
        if name in names:
            return name
    if len(names) > 1 and live.exists():
        raise Invalid(
            "INVALID_FIELD", f"{live} may be any of {', '.join(names)}; say which with --volume", field="volume"
        )
    return names[0] if names and live.exists() else live.stem


def _volumes(directory: Path) -> list[str]:
    home = directory / HOME
    return sorted(entry.name for entry in home.iterdir() if entry.is_dir()) if home.is_dir() else []


def _report(place: Place, kind: str, examined: Examined) -> ReplicaReport:
    image = kind == ImageBackend.kind
    gone = image and examined.presence is Presence.EMPTY and not place.live.parent.is_dir()
    return ReplicaReport(
        volume=place.volume,
        presence=Presence.LOST if gone else examined.presence,
        volume_id=examined.volume_id,
        lineage=examined.lineage,
        live=examined.live,
        record=examined.record,
        grant=examined.grant,
        backend=kind,
        priority=place.priority,
        free_bytes=examined.free_bytes,
        reserve_bytes=examined.reserve_bytes,
        reflink=examined.reflink,
        preserved=examined.preserved,
        problems=examined.problems,
        others=examined.others,
        examine_time_ms=now_ms(),
    )


# What an operator reads.


def described(found: Inspection) -> str:
    """One replica in a few lines."""
    report = found.report
    if report is None:
        return f"{found.volume} on {found.node}: cannot be read\n  {found.reason}: {found.message}\n"
    users = f", in use by {', '.join(report.live.in_use_by)}" if report.live.in_use else ""
    lines = [
        f"{found.volume} on {found.node}: {report.presence.value}",
        f"  live copy  {report.live.path}  {report.live.state.value}{users}, {report.live.size_bytes:,} bytes",
        f"  volume_id  {report.volume_id or '-'}",
    ]
    if report.record is not None:
        told = report.record
        newest = told.newest_cp if told.newest_cp != NO_CP else told.newest_id or "none"
        members = ", ".join(told.members) or "none"
        lines.append(f"  was told   epoch {told.epoch}, primary {told.primary}, newest CP {newest}, members {members}")
    if report.grant is not None:
        lines.append(f"  grant      epoch {report.grant.epoch}  {report.grant.epoch_id}")
    for record in report.lineage:
        data = "" if record.present else "  (pruned)"
        lines.append(f"  snapshot   {record.name:<10} {record.id}{data}")
    lines += [f"  another's  {other.name:<10} {other.id}  (not in the lineage)" for other in report.others]
    lines += [f"  preserved  {copy.cp!s:<10} {copy.id}  {copy.size_bytes:,} bytes" for copy in report.preserved]
    lines += [f"  problem    {problem}" for problem in report.problems]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="resilver inspect", description="What replicas on this machine are.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument("--node", default="", help="what to call this machine [its host name]")
    parser.add_argument("--volume", default="", help="the one volume that is meant")
    asked = parser.parse_args(arguments)
    try:
        found = [inspect(place) for place in _all(asked.paths, asked.node, asked.volume)]
    except ResilverError as error:
        sys.stderr.write(f"{error.reason}: {error.message}\n")
        return error.exit_code
    sys.stdout.write(dump(found) if asked.output == "json" else "\n".join(described(one) for one in found))
    return EXIT_UNREADABLE if any(one.report is None for one in found) else 0


def _all(paths: Iterable[Path], node: str, volume: str) -> list[Place]:
    """Every replica once, also if two paths lead to it."""
    name = node or socket.gethostname()
    found: dict[tuple[str, Path], Place] = {}
    for path in paths:
        for place in places(path, node if path.suffix == ".toml" else name, volume):
            found.setdefault((place.volume, place.snapshots), place)
    if not found:
        raise Invalid("INVALID_FIELD", f"no volume named {volume!r} there", field="volume")
    return list(found.values())


if __name__ == "__main__":
    sys.exit(main())
