"""What every backend of streams must give: whole streams, the same ones again, and nothing out of a broken one."""

from __future__ import annotations

import contextlib
import threading

import pytest

from agent.backends.base import StreamOrigin
from resilver.errors import ResilverError
from resilver.volume import LiveState
from tests.agent.backends.conformance.cases import Case
from tests.agent.backends.transfer import STAGES, format_for, open_stage, origin_of, stream_of, transfer

SHAPE = "stream"
PIECE = 64 << 10


def whole_stream(case: Case) -> bytes:
    form = format_for(case.source, case.target)
    return b"".join(stream_of(case.source, case.base, case.goal.tip_id, form))


def empty_stage(case: Case):
    case.target.backend.discard_stage()
    return open_stage(case.target, case.source, case.base, case.goal.tip)


def takes(stage, form: str, stream: bytes) -> None:
    stage.start(form)
    for at in range(0, len(stream), PIECE):
        stage.feed(memoryview(stream[at : at + PIECE]))
    stage.finish()
    stage.verify(threading.Event())


def fails(case: Case, stage, stream: bytes) -> str:
    """The reason for which a stream did not become the target; the target is as it was."""
    with pytest.raises(ResilverError) as raised:
        takes(stage, format_for(case.source, case.target), stream)
    assert case.target.contents() == case.old
    assert case.target.lineage == case.before
    return raised.value.reason


def test_formats(replica):
    formats = replica.backend.formats()
    assert formats
    assert len(set(formats)) == len(formats)
    assert replica.backend.formats() == formats


def test_every_format_that_both_have(place):
    for number, form in enumerate(place.replica("a").backend.formats()):
        case = Case(place, "stale", f"vm{number}")
        stage = empty_stage(case)
        stage.start(form)
        for frame in stream_of(case.source, case.base, case.goal.tip_id, form):
            stage.feed(memoryview(frame))
        stage.finish()
        stage.verify(threading.Event())
        case.target.backend.commit(stage, case.order(case.target))
        case.check_done()


def test_native_ids_are_the_same_everywhere(replica, other, third):
    replica.create()
    taken = replica.snapshot()
    other.receive(replica)
    third.receive(other)
    names = {each.backend.native_id(taken.id) for each in (replica, other, third, third.again())}
    assert len(names) == 1
    assert "" not in names
    replica.change(1)
    assert replica.backend.native_id(replica.snapshot().id) not in names
    replica.lose(taken.id)
    with pytest.raises(ResilverError) as gone:
        replica.backend.native_id(taken.id)
    assert gone.value.reason == "TARGET_GONE"
    with pytest.raises(ResilverError):
        replica.backend.native_id("nothing")


def test_delta_bytes(replica):
    replica.create()
    base = replica.snapshot()
    replica.edit(1)
    tip = replica.snapshot()
    whole, part = replica.backend.delta_bytes("", tip.id), replica.backend.delta_bytes(base.id, tip.id)
    assert whole is None or whole > 500_000
    assert part is None or part < 500_000


def test_the_same_source_makes_the_same_stream_again(place):
    """So that a transfer that broke off need not send its beginning again; also after the agent was started anew."""
    case = Case(place, "stale")
    first = whole_stream(case)
    assert first
    case.source.edit(9)
    assert whole_stream(case) == first
    case.source = case.source.again()
    assert whole_stream(case) == first


def test_a_stream_in_the_smallest_pieces(place):
    case = Case(place, "stale")
    stage = empty_stage(case)
    form = format_for(case.source, case.target)
    stage.start(form)
    source = case.source.backend.open_send(case.base, case.goal.tip_id, form)
    assert source.format == form
    view = memoryview(bytearray(777))
    while got := source.read_into(view):
        assert 0 < got <= 777
        stage.feed(view[:got])
    assert source.read_into(view) == 0, "the end stays the end"
    source.close()
    source.close()
    stage.finish()
    stage.finish()
    stage.verify(threading.Event())
    case.target.backend.commit(stage, case.order(case.target))
    case.check_done()


def test_a_stream_that_is_given_up(replica):
    """In its middle, and from another thread while somebody reads."""
    replica.create()
    taken = replica.snapshot()
    stream = replica.backend.open_send("", taken.id, replica.backend.formats()[0])
    assert stream.read_into(memoryview(bytearray(1000))) > 0
    closer = threading.Thread(target=stream.close)
    closer.start()
    closer.join(20)
    assert not closer.is_alive()
    stream.close()
    assert replica.contents(taken.id) == replica.contents()
    replica.backend.drop(replica.snapshot().parent)


@pytest.mark.parametrize("how", ["cut", "empty", "byte", "twice", "noise"])
def test_a_stream_that_is_not_whole_becomes_nothing(place, how):
    """Cut short, changed in its middle, too long, or no stream at all: and the right one is taken afterwards."""
    case = Case(place, "stale")
    stream = whole_stream(case)
    middle = len(stream) // 2
    stage = empty_stage(case)
    reason = fails(
        case,
        stage,
        {
            "cut": stream[:middle],
            "empty": b"",
            "byte": stream[:middle] + bytes([stream[middle] ^ 0xFF]) + stream[middle + 1 :],
            "twice": stream[:middle] + stream,
            "noise": bytes(range(256)) * 400,
        }[how],
    )
    assert reason
    transfer(case.source, case.target, stage)
    case.target.backend.commit(stage, case.order(case.target))
    case.check_done()


def test_the_stream_of_another_snapshot(place):
    """It becomes something, but not what the order names: SOURCE_DAMAGED, and never the target."""
    case = Case(place, "stale")
    case.source.change(80)
    another = case.source.snapshot(epoch=2)
    stage = empty_stage(case)
    form = format_for(case.source, case.target)
    stream = b"".join(stream_of(case.source, case.base, another.id, form))
    assert fails(case, stage, stream) == "SOURCE_DAMAGED"
    transfer(case.source, case.target, stage)
    case.target.backend.commit(stage, case.order(case.target))
    case.check_done()


def test_a_delta_upon_another_base(place):
    """The base here is not the one that the source speaks of."""
    case = Case(place, "stale")
    case.target.backend.discard_stage()
    with pytest.raises(ResilverError) as raised:
        case.target.backend.check_base(case.base, case.source.backend.native_id(case.goal.tip_id))
    assert raised.value.reason == "BASE_MISMATCH"
    with pytest.raises(ResilverError) as raised:
        case.target.backend.check_base("nothing", case.source.backend.native_id(case.base))
    assert raised.value.reason == "BASE_GONE"
    case.target.backend.check_base(case.base, case.source.backend.native_id(case.base))


def test_a_restart_in_the_middle(place):
    """What came before is discarded or gone on with, as the stage says; the result is the same."""
    case = Case(place, "stale")
    stage = empty_stage(case)
    (stage.directory / "journal").write_text("here")
    stream = whole_stream(case)
    stage.start(format_for(case.source, case.target))
    stage.feed(memoryview(stream[: len(stream) // 2]))
    stage.close()
    again = case.target.again()
    again.backend.recover()
    assert again.lineage == case.before
    assert again.contents() == case.old
    stage = open_stage(again, case.source, case.base, case.goal.tip)
    assert stage.resumed
    assert (stage.directory / "journal").read_text() == "here"
    token = stage.resume_token()
    form = format_for(case.source, again)
    stage.start(form, token)
    source = case.source.backend.open_send(case.base, case.goal.tip_id, form, token)
    view = memoryview(bytearray(PIECE))
    while got := source.read_into(view):
        stage.feed(view[:got])
    source.close()
    stage.finish()
    stage.verify(threading.Event())
    again.backend.commit(stage, case.order(again))
    case.check_done()


def test_a_stage_of_another_native_target(place):
    """The source has the target by another name than before: what came is not gone on with."""
    case = Case(place, "stale")
    origin = origin_of(case.source, case.base, case.goal.tip_id)
    another = StreamOrigin(origin.native_base, origin.native_base, origin.formats)
    stage = case.target.backend.open_stream_stage(case.base, case.goal.tip_id, another)
    STAGES.append(stage)
    assert not stage.resumed


def test_a_token_of_something_else(place):
    case = Case(place, "stale")
    with pytest.raises(ResilverError) as raised:
        case.source.backend.open_send(case.base, case.goal.tip_id, format_for(case.source, case.target), "1-nonsense")
    assert raised.value.reason == "TICKET_INVALID"


def test_verify_stops(place):
    """A run that is cancelled does not wait for the reading back."""
    case = Case(place, "newcomer")
    stage = empty_stage(case)
    transfer(case.source, case.target, stage)
    stop = threading.Event()
    stop.set()
    with contextlib.suppress(ResilverError):
        stage.verify(stop)
    stage.close()
    case.commit()
    case.check_done()


def test_closed_while_it_takes(place):
    """From another thread, as when a run is cancelled: it comes back, and nothing has changed."""
    case = Case(place, "newcomer")
    stage = empty_stage(case)
    stream = whole_stream(case)
    stage.start(format_for(case.source, case.target))
    stage.feed(memoryview(stream[:1000]))
    closer = threading.Thread(target=stage.close)
    closer.start()
    closer.join(60)
    assert not closer.is_alive()
    stage.close()
    assert case.target.contents() == case.old
    case.target.backend.discard_stage()
    assert case.target.debris() == []
    assert case.target.backend.examine().live.state is LiveState.ABSENT
