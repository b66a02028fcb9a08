"""A run is heard of for as long as its work advances: also while a backend reads back, copies and compares."""

from __future__ import annotations

import asyncio
import threading

from agent import outbox as outbox_module
from agent import run as run_module
from agent.disk.durable import write_json
from agent.examiner import ReplicaSettings, now_ms
from agent.identity import Identity
from agent.lineages import lineage_to_json
from agent.outbox import Outbox
from agent.replica import Replica
from agent.runfile import RunOrder, SavedRun, StagePlace
from agent.transfer import LINEAGE_FILE
from resilver.volume import Order, Progress, ResyncState
from tests.agent.agents import resumed_runs
from tests.agent.backends.adapter import VOLUME_ID
from tests.agent.backends.conformance.cases import Case
from tests.agent.backends.transfer import open_stage, origin_of

DEADLINE_S = 60.0


def left(case: Case) -> SavedRun:
    """A run whose agent was started again when all had come: it needs no source any more."""
    origin = None
    if not case.restores:
        stage = open_stage(case.target, case.source, case.base, case.goal.tip)
        write_json(stage.directory / LINEAGE_FILE, lineage_to_json(case.goal))
        stage.close()
        origin = origin_of(case.source, case.base, case.goal.tip_id)
    order = Order("prod", "S", 1, "L", "vm1", VOLUME_ID, 2, "e", case.before.tip_id)
    wanted = RunOrder(order, "r1", case.base, case.goal.tip_id, "t", ())
    return SavedRun(wanted, Progress("r1", "vm1", ResyncState.QUEUED), StagePlace(origin=origin), now_ms())


async def test_a_run_that_reads_back_and_commits_is_not_silent(place, kind, tmp_path, monkeypatch):
    """All is heard as the reporter would send it. The run waits until each word has been taken: none replaces another
    before that, so that what is counted is what advanced, and not how fast the test was.
    """
    monkeypatch.setattr(run_module, "ADVANCE_TOLD_S", 0.0)
    monkeypatch.setattr(outbox_module, "PROGRESS_PERIOD_S", 0.0)
    case = Case(place, "stale" if kind.shape == "stream" else "cleaned")
    saved = left(case)
    loop = asyncio.get_running_loop()
    outbox, taken = Outbox(loop), threading.Semaphore(0)

    def put(progress: Progress) -> None:
        outbox.put_progress(progress)
        assert taken.acquire(timeout=DEADLINE_S)

    identity = Identity(tmp_path / "state", "prod", "b")
    replica = Replica("vm1", "b", case.target.again().backend, identity, ReplicaSettings())
    resumed_runs(tmp_path, replica, loop, saved, on_progress=put)
    heard: list[Progress] = []
    while not (heard and heard[-1].state.final):
        told = await outbox.next(DEADLINE_S)
        assert isinstance(told, Progress)
        heard.append(told)
        taken.release()
    await asyncio.to_thread(replica.worker.call, lambda: None)  # what follows the last word has happened
    replica.close()
    identity.close()
    states = [progress.state for progress in heard]
    assert states[-1] is ResyncState.SUCCEEDED, heard[-1]
    assert states.count(ResyncState.COMMITTING) > 1
    if kind.shape == "stream":
        assert states.count(ResyncState.VERIFYING) > 1
    case.check_done()
