"""What the agent keeps in files: records of each backend, journals of commits, and what stands in state_dir.

Each is read as it stands, and again with a digest that fits. Only ResilverErrors come out; what was read is written
and reads the same; and reading changes nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from agent import leftovers as hook_records
from agent.backends import (
    btrfs_layout,
    image_layout,
    lvm_place,
    lvm_state,
    mandate,
    zfs_finish,
    zfs_keep,
    zfs_layout,
    zfs_stage,
)
from agent.backends.image_layout import Layout
from agent.disk import quiesce
from agent.disk.durable import Json, read_json, read_log, sealed_line, write_json
from agent.identity import Identity
from agent.limits import Caps
from agent.lineages import lineage_from_json, lineage_to_json
from agent.runfile import run_from_json, run_to_json
from agent.stored import typed
from agent.stream.spool import Spool
from agent.tickets import Tickets
from agent.transfer import LINEAGE_FILE, lineage_left_in
from fuzz.target import as_json, fresh, listing, put, target
from resilver.config import Limits
from resilver.errors import Damaged, Invalid, ResilverError
from resilver.wire import preserved_to_proto, record_to_proto, snapshot_to_proto

Load = Callable[[Path], Any]
Save = Callable[[Path, Any], None]

_STATES_MAX: Final = 64


def _both(data: bytes, name: str, load: Load, save: Save | None = None, check: Callable[[Any], object] = id) -> None:
    """Reads a file of that name as it stands, then sealed; `save` writes what was read."""
    with fresh("files") as directory:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        with contextlib.suppress(Damaged):
            load(directory)
        if not put(path, data):
            return
        before = listing(directory)
        try:
            found = load(directory)
        except Damaged:
            return
        finally:
            assert listing(directory) == before, "reading has changed something"
        check(found)
        if save is not None and found is not None:
            save(directory, found)
            assert load(directory) == found, "what was written reads otherwise"


def _layout(directory: Path) -> Layout:
    return Layout("vm1", directory / "vm1.img", directory)


def _zfs(directory: Path) -> zfs_layout.Layout:
    return zfs_layout.make_layout("vm1", Path("tank/vm1"), directory)


@target("record", form="json")
def record(data: bytes) -> None:
    """`record.json` beside a snapshot."""

    def load(directory: Path) -> Any:
        return image_layout.load_stored(directory / "s1")

    def save(directory: Path, found: Any) -> None:
        image_layout.save_stored(directory / "s1", found)

    _both(data, "s1/record.json", load, save, lambda found: snapshot_to_proto(found.snapshot).SerializeToString())


@target("preserved", form="json")
def preserved(data: bytes) -> None:
    """`preserved.json` of image, Btrfs and LVM; `where.json` of ZFS holds the path too."""

    def load(directory: Path) -> Any:
        return image_layout.load_preserved(directory / "p1")

    def save(directory: Path, found: Any) -> None:
        image_layout.save_preserved(directory / "p1", found)

    _both(data, "p1/preserved.json", load, save, lambda found: preserved_to_proto(found).SerializeToString())
    where = f"preserved/p1/{zfs_keep._WHERE}"  # noqa: SLF001 - its place is nobody else's business
    _both(data, where, lambda directory: zfs_keep.list_preserved(_zfs(directory)))


@target("volume", form="json")
def volume(data: bytes) -> None:
    """`volume.json`, what the agent was told of a volume."""

    def load(directory: Path) -> Any:
        return mandate.load_record(_layout(directory))

    def save(directory: Path, found: Any) -> None:
        mandate.save_record(_layout(directory), found)

    _both(data, "volume.json", load, save, lambda found: record_to_proto(found).SerializeToString())


@target("grant", form="json")
def grant(data: bytes) -> None:
    def save(directory: Path, found: Any) -> None:
        mandate.save_grant(_layout(directory), found)

    _both(data, "grant.json", lambda directory: mandate.load_grant(_layout(directory)), save)


@target("commit", form="json")
def commit(data: bytes) -> None:
    """`commit.json`, the intention of a commit, of each backend that has one."""
    kinds: tuple[tuple[Load, Save], ...] = (
        (
            lambda at: image_layout.load_journal(_layout(at)),
            lambda at, found: image_layout.save_journal(_layout(at), found),
        ),
        (lambda at: lvm_state.load_journal(_layout(at)), lambda at, found: lvm_state.save_journal(_layout(at), found)),
        (lambda at: zfs_finish.load_journal(_zfs(at)), lambda at, found: zfs_finish.save_journal(_zfs(at), found)),
    )
    for load, save in kinds:
        _both(data, "commit.json", load, save)


@target("native", form="json")
def native(data: bytes) -> None:
    """What Btrfs calls a snapshot, which logical volume a directory speaks of, what a ZFS stage is to become."""
    _both(
        data,
        "native.json",
        lambda at: btrfs_layout.load_native(at / "native.json"),
        lambda at, found: btrfs_layout.save_native(at / "native.json", found),
    )
    _both(
        data,
        "data",
        lambda at: lvm_place.load_ref(at / "data"),
        lambda at, found: lvm_place.save_ref(at / "data", found),
    )
    _both(
        data,
        "stage/stage.json",
        lambda at: zfs_stage.load_plan(_zfs(at)),
        lambda at, found: zfs_stage.save_plan(_zfs(at), found),
    )


@target("zfs_record", form="json")
def zfs_record(data: bytes) -> None:
    """A snapshot's property, which whoever may set properties can write."""
    text = data.decode(errors="replace")
    found = zfs_layout.read_record(text)
    if found is not None:
        again = zfs_layout.read_record(zfs_layout.record_property(*found))
        assert again is not None
        assert again[0].id == found[0].id
        snapshot_to_proto(found[0]).SerializeToString()


@target("lineage_state", form="json")
def lineage_state(data: bytes) -> None:
    """A whole snapshot directory: `{"records": {name: record}, "lines": [...], "commit": ...}`."""
    value = as_json(data)
    if not isinstance(value, dict):
        return
    with fresh("state") as directory:
        layout = _layout(directory)
        _lay_out(directory, value)
        before = listing(directory)
        for load in (lambda: image_layout.load_state(layout), lambda: zfs_layout.read_ancestry(_zfs(directory))):
            with contextlib.suppress(Damaged):
                load()
        assert listing(directory) == before, "looking has changed something"


def _lay_out(directory: Path, value: Json) -> None:
    records = value.get("records")
    for at, (name, each) in enumerate(records.items() if isinstance(records, dict) else ()):
        if at < _STATES_MAX and name.isascii() and name.isprintable() and 0 < len(name) < 100 and "/" not in name:
            with contextlib.suppress(OSError, ValueError):
                (directory / name).mkdir(exist_ok=True)
                (directory / name / "data").touch()
                put(directory / name / "record.json", json.dumps(each).encode())
    lines = value.get("lines")
    with contextlib.suppress(ValueError, RecursionError):
        rows = [sealed_line(line) for line in (lines if isinstance(lines, list) else ()) if isinstance(line, dict)]
        (directory / "ancestry.jsonl").write_bytes(b"".join(rows))
    if isinstance(value.get("commit"), dict):
        put(directory / "commit.json", json.dumps(value["commit"]).encode())


@target("log")
def log(data: bytes) -> None:
    """A log, torn and damaged in any way; an append leaves a log that can be read, or says why not."""
    with fresh("log") as directory:
        path = directory / "ancestry.jsonl"
        path.write_bytes(data)
        with contextlib.suppress(Damaged):
            read_log(path)


@target("identity", form="json")
def identity(data: bytes) -> None:
    """`identity.json` and what is remembered of a volume: an agent starts with them, or says why not."""

    def load(directory: Path) -> Any:
        with contextlib.suppress(Invalid):
            found = Identity(directory, "prod", "a")
            try:
                found.meet(found.pin.store_id or "s1", found.pin.term, found.pin.leader_id)
                return found.pin
            finally:
                found.close()
        return None

    with fresh("state") as directory:
        if put(directory / "identity.json", data):
            with contextlib.suppress(Damaged):
                load(directory)
    with fresh("state") as directory:
        kept = Identity(directory, "prod", "a")
        try:
            if put(directory / "volumes" / "vm1.json", data):
                with contextlib.suppress(Damaged):
                    found = kept.remembered("vm1")
                    assert found is not None
                    kept.remember("vm1", found)
                    assert kept.remembered("vm1") == found
        finally:
            kept.close()


@target("tickets", form="json")
def tickets(data: bytes) -> None:
    """`tickets.json`: what a source serves after a restart."""

    def load(directory: Path) -> Any:
        made = Tickets(directory / "tickets.json", clock=lambda: 1000.0, wall=lambda: 1_800_000_000.0)
        for one in made.live():
            with contextlib.suppress(ResilverError):
                made.check(
                    secret="x",  # noqa: S106 - none that any ticket has
                    resync_id=one.resync_id,
                    volume=one.volume,
                    target_node=one.target_node,
                    target=one.target,
                )
        return made.live()

    _both(data, "tickets.json", load)


@target("run", form="json")
def run(data: bytes) -> None:
    """A run's file, and the lineage beside a stage: None for what is none."""
    value = as_json(data)
    if isinstance(value, dict):
        found = run_from_json(value)
        if found is not None:
            again = run_from_json(json.loads(json.dumps(run_to_json(found))))
            assert again == found
        lineage = lineage_from_json(value)
        if lineage is not None:
            assert lineage_from_json(json.loads(json.dumps(lineage_to_json(lineage)))) == lineage
    with fresh("stage") as directory:
        if put(directory / LINEAGE_FILE, data):
            lineage_left_in(directory, "s1")


@target("limits", form="json")
def limits(data: bytes) -> None:
    """`limits.json`: what an operator has ordered of a node's bandwidth."""
    _both(data, "limits.json", lambda at: Caps(at / "limits.json", Limits()).now())


@target("leftovers", form="json")
def leftovers(data: bytes) -> None:
    """What a crash leaves to be mended: frozen mounts, hooks that were not ended, a spool's beginning."""

    def hooked(directory: Path) -> Any:
        return typed("x.json", read_json(directory / "x.json"), hook_records._Record)  # noqa: SLF001 - the parser itself

    def frozen(directory: Path) -> Any:
        return typed("x.json", read_json(directory / "x.json"), quiesce._Frozen)  # noqa: SLF001 - as above

    _both(data, "x.json", hooked)
    _both(data, "x.json", frozen)
    with fresh("spool") as directory:
        spool = Spool(directory, 1 << 20)
        put(directory / "spool.json", data)
        (directory / "spool.data").write_bytes(data * 3)
        (directory / "spool.chain").write_bytes(data[:64])
        list(spool.pieces())
        spool.close()


@target("sealed", form="json")
def sealed_value(data: bytes) -> None:
    """Any value that can be written can be read, and is the same."""
    value = as_json(data)
    if not isinstance(value, dict):
        return
    with fresh("sealed") as directory:
        path = directory / "value.json"
        try:
            write_json(path, value)
        except (ValueError, RecursionError):
            return
        text = json.dumps(value)
        if "NaN" not in text:
            assert read_json(path) == value
