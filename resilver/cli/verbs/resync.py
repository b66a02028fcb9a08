"""`resilver resync`, `resyncs` and `cancel`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import click

from resilver.cli.options import Verb
from resilver.cli.output import EXIT_FAILED, EXIT_PARTLY, EXIT_REFUSED, EXIT_STOPPED
from resilver.cli.plainjson import plain_list, word
from resilver.cli.progress import is_final
from resilver.cli.screens import lists
from resilver.cli.session import Session, pass_session, request_id, resolve, select
from resilver.cli.watching import watch
from resilver.cli.words import count, now, size
from resilver.errors import Invalid, ResilverError, class_of
from resilver.spans import age
from resilver.v1 import coordinator_pb2 as api

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from resilver.cli.client import Client
    from resilver.v1 import volume_pb2 as pb

BACK: Final = "resilver resyncs --active --watch"


@click.command(cls=Verb)
@click.argument("volumes", nargs=-1, metavar="[VOLUME]…")
@click.option("--all", "all_volumes", is_flag=True, help="Every volume.")
@click.option("--to", "nodes", multiple=True, metavar="NODE", help="Only these replicas; may be repeated.")
@click.option("--plan", "etag", metavar="ETAG", help="Only if the plan of this etag still holds.")
@click.option("--full", is_flag=True, help="Copy all of what is not in sync, whatever is in common.")
@click.option(
    "--replace",
    multiple=True,
    metavar="NODE",
    help="Preserve and replace this node's data although it has nothing in common; may be repeated.",
)
@click.option("--no-wait", is_flag=True, help="Start it and return.")
@pass_session
def resync(
    session: Session,
    volumes: tuple[str, ...],
    *,
    all_volumes: bool,
    nodes: tuple[str, ...],
    etag: str | None,
    full: bool,
    replace: tuple[str, ...],
    no_wait: bool,
) -> int:
    """Bring replicas to the newest consistency point, and show how far it is.

    Ctrl-C stops watching, not the work.
    """
    request = api.StartResyncRequest(
        request_id=request_id(),
        **select(volumes, all_volumes=all_volumes),
        nodes=nodes,
        plan_etag=etag or "",
        full=full,
        replace_nodes=replace,
    )
    begun = time.monotonic()
    started: list[pb.Resync] = []

    async def work(client: Client) -> tuple[list[pb.Resync], list[api.VolumeRefusal], int]:
        answer = await client.call(lambda s: s.StartResync, request)
        started.extend(answer.resyncs)
        if no_wait or not answer.resyncs:
            return list(answer.resyncs), list(answer.refusals), 0
        ended = await watch(client, session, answer.resyncs)
        return ended, list(answer.refusals), await _whole_size(client, ended)

    try:
        ended, refusals, whole = session.run(work)
    except KeyboardInterrupt:
        return _stopped(session, started)
    _report(session, ended, refusals)
    if not session.output.json:
        seconds = time.monotonic() - begun
        session.output.say(_started(ended) if no_wait else _summary(ended, refusals, whole, seconds))
    return started_code(ended, refusals) if no_wait else exit_code(ended, refusals)


def exit_code(resyncs: Iterable[pb.Resync], refusals: Sequence[api.VolumeRefusal]) -> int:
    """0 all in sync, 3 all refused or blocked, 5 some in sync and some not, 1 none in sync and one failed."""
    ended = list(resyncs)
    good = sum(word(one, "state") == "SUCCEEDED" for one in ended)
    if good == len(ended) and not refusals:
        return 0
    if good:
        return EXIT_PARTLY
    return EXIT_REFUSED if all(_was_refused(one) for one in ended) else EXIT_FAILED


def _was_refused(resync: pb.Resync) -> bool:
    """Whether the state of things stands in its way, as a full disk does: what its reason ends with elsewhere too."""
    reasons = resync.refusal.reasons
    state = word(resync, "state")
    return state == "BLOCKED" or (
        state == "FAILED" and bool(reasons) and class_of(reasons[0]).exit_code == EXIT_REFUSED
    )


def started_code(resyncs: Sequence[pb.Resync], refusals: Sequence[api.VolumeRefusal]) -> int:
    """The same for runs that nobody waits for: a start is what is asked of them."""
    blocked = sum(word(one, "state") == "BLOCKED" for one in resyncs)
    if not refusals and not blocked:
        return 0
    return EXIT_PARTLY if len(resyncs) > blocked else EXIT_REFUSED


def _report(session: Session, resyncs: Sequence[pb.Resync], refusals: Sequence[api.VolumeRefusal]) -> None:
    """JSON on stdout; what did not work on stderr in either case."""
    if session.output.json:
        session.output.emit({"resyncs": plain_list(resyncs), "refusals": plain_list(refusals)})
    for refusal in refusals:
        where = f"{refusal.volume}/{refusal.node}" if refusal.node else refusal.volume
        session.output.refusal(refusal.refusal, where=where)
    for one in resyncs:
        where, state = f"{one.volume}/{one.node}", word(one, "state")
        if one.HasField("refusal"):
            session.output.refusal(one.refusal, where=where)
        elif state in ("FAILED", "CANCELLED", "BLOCKED"):
            session.output.refused(
                [state], "it did not say why", f"resilver explain {one.volume} {one.node}", where=where
            )


def _summary(resyncs: Sequence[pb.Resync], refusals: Sequence[api.VolumeRefusal], whole: int, seconds: float) -> str:
    if not resyncs:
        return "Nothing was started." if refusals else "Nothing to copy: every replica is in sync."
    good = [one for one in resyncs if word(one, "state") == "SUCCEEDED"]
    head = "DONE" if len(good) == len(resyncs) and not refusals else "ENDED"
    copied = size(sum(one.done_bytes for one in resyncs))
    parts = [f"{head} {len(good)} of {len(resyncs) + len(refusals)} in sync in {_took(seconds)}"]
    parts.append(f"copied {copied} of {size(whole)}" if whole else f"copied {copied}")
    if good:
        parts.append("read back and compared")
    parts += [
        f"{one.volume}/{one.node}'s own data: resilver preserved {one.volume}" for one in resyncs if one.preserved
    ]
    return "; ".join(parts)


def _took(seconds: float) -> str:
    return age(seconds) if seconds >= 10 else f"{seconds:.1f} s"


def _started(resyncs: Sequence[pb.Resync]) -> str:
    running = [one for one in resyncs if not is_final(one)]
    return f"started {count(len(running), 'resync')}; to watch: {BACK}" if running else "nothing was left to start"


def _stopped(session: Session, started: Sequence[pb.Resync]) -> int:
    if not started:
        session.output.note("\nstopped before it was known whether the resync was started; look: " + BACK)
        return EXIT_STOPPED
    volumes = " ".join(dict.fromkeys(one.volume for one in started))
    session.output.note("\nstopped watching; the work goes on")
    session.output.note(f"to watch again: {BACK}")
    session.output.note(f"to end it:      resilver cancel {volumes}")
    return EXIT_STOPPED


async def _whole_size(client: Client, resyncs: Sequence[pb.Resync]) -> int:
    """What full copies would have been, in bytes; 0 if it is not known, since it is only for comparison."""
    names = {one.volume for one in resyncs}
    try:
        request = api.ListVolumesRequest(volumes=sorted(names))
        found = await client.pages(lambda s: s.ListVolumes, request, lambda page: page.volumes)
    except ResilverError:
        return 0
    sizes = {v.name: max((r.live.size_bytes for r in v.replicas if r.node == v.primary), default=0) for v in found}
    return sum(sizes.get(one.volume, 0) for one in resyncs)


@click.command(cls=Verb)
@click.argument("volume", required=False)
@click.option("--active", is_flag=True, help="Only those that run.")
@click.option("--watch", "watching", is_flag=True, help="Show those that run until they are done.")
@pass_session
def resyncs(session: Session, volume: str | None, active: bool, watching: bool) -> int:
    """List resyncs with their bytes: copied, on the wire, sent again."""
    request = api.ListResyncsRequest(volume=volume or "", active_only=active or watching)

    async def work(client: Client) -> list[pb.Resync]:
        found = await client.pages(lambda s: s.ListResyncs, request, lambda page: page.resyncs)
        return await watch(client, session, found) if watching and found else found

    try:
        found = session.run(work)
    except KeyboardInterrupt:
        session.output.note(f"\nstopped watching; the work goes on. To watch again: {BACK}")
        return EXIT_STOPPED
    if session.output.json:
        session.output.emit({"resyncs": plain_list(found)})
    elif found:
        session.output.show(lists.resyncs(found, now()))
    else:
        session.output.say("no resync runs" if active or watching else "no resyncs yet")
    return exit_code(found, []) if watching else 0


@click.command(cls=Verb)
@click.argument("what", nargs=-1, metavar="[RESYNC|VOLUME]…")
@click.option("--all", "all_resyncs", is_flag=True, help="Every resync that runs.")
@click.option("--discard-stage", is_flag=True, help="Let what was copied so far go, too.")
@pass_session
def cancel(session: Session, what: tuple[str, ...], all_resyncs: bool, discard_stage: bool) -> int:
    """End running resyncs. The replicas stay at the consistency point they had."""
    if bool(what) == all_resyncs:
        raise Invalid("INVALID_FIELD", "name resyncs or volumes, or give --all")

    async def work(client: Client) -> list[pb.Resync]:
        request = api.ListResyncsRequest(active_only=True)
        running = await client.pages(lambda s: s.ListResyncs, request, lambda page: page.resyncs)
        names = await client.pages(lambda s: s.ListVolumes, api.ListVolumesRequest(), lambda page: page.volumes)
        ended = []
        for identity in _chosen(what, running, {volume.name for volume in names}):
            order: Any = {"request_id": request_id(), "id": identity, "discard_stage": discard_stage}
            ended.append((await client.call(lambda s: s.CancelResync, api.CancelResyncRequest(**order))).resync)
        return ended

    ended = session.run(work)
    if session.output.json:
        session.output.emit({"resyncs": plain_list(ended)})
    elif ended:
        session.output.show(lists.resyncs(ended, now()))
    else:
        session.output.say("no resync runs there; nothing was changed")
    return 0


def _chosen(what: tuple[str, ...], running: Sequence[pb.Resync], volumes: set[str]) -> list[str]:
    """The ids of the runs that the words name: a volume's name stands for all of its runs, if any."""
    if not what:
        return [one.id for one in running]
    ids: dict[str, None] = {}
    for text in what:
        if text in volumes:
            ids |= dict.fromkeys(one.id for one in running if one.volume == text)
        else:
            ids[resolve(text, (one.id for one in running), "resync")] = None
    return list(ids)
