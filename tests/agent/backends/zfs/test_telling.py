"""What `zfs` reads and writes for hours is told of, piece by piece."""

from __future__ import annotations

import threading

from agent.disk.advance import told_to


def test_a_reading_back_and_a_commit_say_that_they_go_on(replica, other):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    replica.write(1)
    tip = replica.snapshot()
    told: list[str] = []
    target = other.again(step=told.append)
    stage = target.fill(replica, base.id, tip.id)
    stage.verify(threading.Event(), on_share=lambda: told.append("read back"))
    assert "read back" in told
    told.clear()
    with told_to(lambda: told.append("advanced")):
        target.backend.commit(stage, target.order(replica.lineage))
    received, verified = told.index("commit.received"), told.index("commit.verified")
    assert "advanced" in told[told.index("commit.shut") : received], "the stage is sent on into the live copy"
    assert "advanced" in told[received:verified], "what came is read back"
