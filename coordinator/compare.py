"""`python -m coordinator.compare A.json B.json…`: the real election on what `inspect -o json` printed on several nodes.

It names the winner that a coordinator would: what stands in the records of the replicas counts as the store's, and a
member that nobody brought a file of is away. Nothing is stored, and nobody is asked.

Exit: 0 elected, 3 refused (the reason first on stderr, then the next command), 2 for files that cannot be used.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from coordinator.core.cluster import Elected, ElectionRecord, NotElected, ReplicaView, VolumeView
from coordinator.core.election import elect, next_epoch, reconcile
from coordinator.wire import election_to_proto
from resilver.cli.output import Output
from resilver.cli.plainjson import plain
from resilver.cli.screens import election as screen
from resilver.errors import Invalid, ResilverError
from resilver.inspection import Inspection, load
from resilver.lineage import NO_CP


def view_of(found: Iterable[Inspection], volume: str) -> VolumeView:
    """One volume as its replicas tell it. The store is what they were told; nothing is known to be forgotten.

    Raises Invalid if two inspections are of one node.
    """
    replicas: dict[str, ReplicaView] = {}
    for one in found:
        if one.volume != volume:
            continue
        if one.node in replicas:
            message = f"two replicas of {volume} are both of node {one.node!r}: inspect each with its own --node"
            raise Invalid("INVALID_FIELD", message, field="node")
        replicas[one.node] = ReplicaView(one.node, one.report, one.time_ms, fresh=one.report is not None)
    told = reconcile(VolumeView(volume, None, replicas))
    if told is None:
        return VolumeView(volume, None, replicas)
    away = {node: ReplicaView(node) for node in told.record.members if node not in replicas}
    return VolumeView(volume, replace(told, recovering=False), {**replicas, **away})


def decide(view: VolumeView, now_ms: int) -> ElectionRecord:
    """The election as a coordinator would record it, but for what only a store gives it."""
    decision = elect(view, now_ms=now_ms)
    elected = isinstance(decision, Elected)
    fork = decision.fork if isinstance(decision, Elected) else None
    new = isinstance(decision, Elected) and decision.new_epoch
    return ElectionRecord(
        volume=view.name,
        create_time_ms=now_ms,
        epoch=(next_epoch(view) if new else view.record.epoch) if elected else 0,
        epoch_id="" if new or not elected else view.record.epoch_id,
        winner=decision.winner if isinstance(decision, Elected) else "",
        previous_primary=view.record.primary,
        cp=fork.cp if fork is not None else NO_CP,
        rule=decision.rule if isinstance(decision, Elected) else "",
        candidates=decision.candidates,
        refusal=decision.refusal if isinstance(decision, NotElected) else None,
    )


def read(paths: Iterable[Path]) -> tuple[Inspection, ...]:
    """Every inspection in the files. Raises Invalid that names the file."""
    found: list[Inspection] = []
    for path in paths:
        try:
            found += load(path.read_bytes())
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise Invalid("INVALID_FIELD", f"{path} cannot be used: {why}", field="path") from error
    return tuple(found)


def the_volume(found: Iterable[Inspection], asked: str) -> str:
    """The volume that is meant. Raises Invalid if that is none or several."""
    names = sorted({one.volume for one in found})
    if asked and asked not in names:
        raise Invalid("INVALID_FIELD", f"no replica of {asked!r} in these files; there are {', '.join(names)}")
    if len(names) > 1 and not asked:
        message = f"these are replicas of several volumes, {', '.join(names)}: say with --volume which one is meant"
        raise Invalid("INVALID_FIELD", message, field="volume")
    if not names:
        raise Invalid("INVALID_FIELD", "these files hold no replica")
    return asked or names[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="resilver inspect --compare", description="The real election, offline.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument("--volume", default="", help="the one volume that is meant")
    asked = parser.parse_args(arguments)
    output = Output(as_json=asked.output == "json")
    try:
        found = read(asked.paths)
        view = view_of(found, the_volume(found, asked.volume))
    except ResilverError as error:
        sys.stderr.write(f"{error.reason}: {error.message}\n")
        return error.exit_code
    record = decide(view, time.time_ns() // 1_000_000)
    message = election_to_proto(record)
    if output.json:
        output.emit(plain(message))
    else:
        output.show(screen.screen(message, dry_run=True))
    if record.refusal is None:
        return 0
    sys.stderr.write(f"{record.refusal.reasons[0]}: {record.refusal.message}\nnext: {record.refusal.next_command}\n")
    return 3


if __name__ == "__main__":
    sys.exit(main())
