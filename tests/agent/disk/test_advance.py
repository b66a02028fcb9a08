"""Who is told that work goes on, and by what: by what is done, and by nothing else."""

from __future__ import annotations

import os

import pytest

from agent.disk import contents
from agent.disk.advance import advanced, step, told_to
from agent.worker import Worker

WINDOWS = 5
SIZE = WINDOWS * contents.WINDOW_BYTES


@pytest.fixture
def told():
    return []


def test_where_nobody_listens_nothing_happens(told):
    advanced()
    with told_to(lambda: told.append("outer")):
        with told_to(lambda: told.append("inner")):
            step("any")
        advanced()
    advanced()
    assert told == ["inner", "outer"]


def test_a_worker_tells_whoever_gave_it_the_job(told):
    worker = Worker("disk")
    with told_to(lambda: told.append("mine")):
        mine = worker.submit(advanced)
    worker.call(advanced)
    mine.result()
    worker.close()
    assert told == ["mine"]


def test_each_mib_that_is_copied_or_compared_is_told(tmp_path, told):
    (tmp_path / "data").write_bytes(os.urandom(SIZE))
    names = ("data", "copy", "table")
    fds = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in names]
    data, copy, table = fds
    try:
        for work in (
            lambda: contents.copy(data, copy, table),
            lambda: list(contents.compare(data, copy, 0, SIZE)),
            lambda: contents.equals_table(copy, table),
        ):
            told.clear()
            with told_to(lambda: told.append(1)):
                work()
            assert len(told) == WINDOWS
    finally:
        for fd in fds:
            os.close(fd)
