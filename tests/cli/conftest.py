"""A coordinator that answers from a table, for the client's own behaviour: requests, screens, exit codes.

It is a real gRPC server with the generated servicer on a loopback port, in a thread of its own; each answer is a
message, an error, a list of messages for a stream, or a function of the request.
"""

import asyncio
import threading
from pathlib import Path

import pytest
from grpc import aio

from resilver.cli.main import main
from resilver.errors import ResilverError
from resilver.status_details import to_status
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import coordinator_pb2_grpc
from tests.cli import sample

GOLDEN = Path(__file__).parent / "golden"
STREAMS = {"WatchVolumes", "WatchResyncs", "WatchEvents", "ExportStore"}


class Answers(coordinator_pb2_grpc.CoordinatorServicer):
    def __init__(self):
        self.table = {}
        self.requests = []

    def of(self, name):
        return [request for called, request in self.requests if called == name]

    def _answer(self, name, request):
        self.requests.append((name, request))
        found = self.table.get(name, ResilverError("INTERNAL", f"{name} was not expected"))
        return found(request) if callable(found) else found


def _method(name):
    async def once(self, request, context):
        found = self._answer(name, request)
        if isinstance(found, ResilverError):
            await context.abort_with_status(to_status(found))
        return found

    async def many(self, request, context):
        found = self._answer(name, request)
        if isinstance(found, ResilverError):
            await context.abort_with_status(to_status(found))
        for item in found:
            if isinstance(item, ResilverError):
                await context.abort_with_status(to_status(item))
            elif isinstance(item, float):
                await asyncio.sleep(item)
            else:
                yield item

    return many if name in STREAMS else once


for _name in [name for name in vars(coordinator_pb2_grpc.CoordinatorServicer) if name[0].isupper()]:
    setattr(Answers, _name, _method(_name))
Answers.__abstractmethods__ = frozenset()


class Coordinator:
    """The server and its thread."""

    def __init__(self):
        self.answers = Answers()
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self):
        self._loop.run_until_complete(self._serve())

    async def _serve(self):
        self._stop = asyncio.Event()
        server = aio.server()
        coordinator_pb2_grpc.add_CoordinatorServicer_to_server(self.answers, server)
        self.port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self._ready.set()
        await self._stop.wait()
        await server.stop(0)

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def stop(self):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def coordinator():
    server = Coordinator()
    yield server
    server.stop()


@pytest.fixture
def second():
    server = Coordinator()
    yield server
    server.stop()


@pytest.fixture
def run(coordinator, capsys, monkeypatch):
    """Runs the command against the coordinator; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("RESILVER_COORDINATOR", coordinator.address)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("RESILVER_DEBUG", raising=False)

    def call(*arguments):
        capsys.readouterr()
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def golden(request):
    """Compares a text with the file of that name; `--rewrite` accepts what it is now."""

    def compare(name, text):
        path = GOLDEN / name
        text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
        if request.config.getoption("--rewrite"):
            path.write_text(text)
        assert text == path.read_text(), f"{name} differs; look at it, and accept it with --rewrite"

    return compare


@pytest.fixture
def table(coordinator):
    """What the coordinator answers; filled with what `status` needs."""
    coordinator.answers.table |= {
        "GetCluster": sample.cluster(),
        "ListNodes": api.ListNodesResponse(nodes=sample.nodes()),
        "ListVolumes": api.ListVolumesResponse(volumes=[sample.vm1(), sample.db1()]),
    }
    return coordinator.answers.table
