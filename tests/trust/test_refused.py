"""What strangers, thieves and colleagues try: each is refused, in one line of the log, and nothing has changed."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
from grpc_health.v1 import health_pb2

from resilver.access import ROLES
from resilver.names import Role
from resilver.v1 import agent_pb2 as agent
from resilver.v1 import coordinator_pb2 as api
from tests.certificates import CLIENT, SERVER
from tests.cluster import wait_for
from tests.trust.stage import HANDSHAKE, LET_IN, Stage

REFUSED = re.compile(r"refused|Handshake failed|handshake_failed")
DAY = timedelta(days=1)
LOOK = ("Coordinator", "GetCluster", api.GetClusterRequest())
OPERATOR = "resilver://test/operator/anna"
NODE_B = "resilver://test/node/b"
LEADER = "resilver://test/coordinator/c1"


@dataclass(frozen=True)
class Try:
    """`on` is the process that is to refuse it, `says` the reason that it is to give."""

    what: str
    on: str
    how: Callable[[Stage], str]
    says: str


def to_coordinator(what: str, says: str, files: Callable[[Stage], object]) -> Try:
    return Try(what, "c1", lambda stage: stage.call("c1", files(stage), *LOOK), says)


def to_stream(what: str, says: str, files: Callable[[Stage], object], **changes: str) -> Try:
    return Try(what, "a", lambda stage: stage.stream(files(stage), replace(stage.hello, **changes)), says)


def order(what: str, says: str, who: str, method: str = "DropSnapshot", **changes: object) -> Try:
    """An order that agent a would obey if a coordinator of this term gave it."""

    def give(stage: Stage) -> str:
        request = getattr(agent, f"{method}Request")()
        if hasattr(request, "header"):
            request.header.CopyFrom(stage.order(**changes))
        if method == "DropSnapshot":
            request.id = stage.hello.target
        return stage.call("a", stage.files(who), "Agent", method, request)

    return Try(what, "a", give, says)


def ask(what: str, says: str, who: str, **changes: str) -> Try:
    """What a target asks of a source, with the ticket that is node b's."""

    def give(stage: Stage) -> str:
        hello = replace(stage.hello, **changes)
        request = agent.StreamDeltaRequest(
            resync_id=hello.resync_id, ticket=hello.ticket, volume="vm1",
            target=hello.target, target_node=hello.target_node,
        )  # fmt: skip
        return stage.call("a", stage.files(who), "Peer", "StreamDelta", request)

    return Try(what, "a", give, says)


def by_role(who: str, roles: set[Role], service: str) -> list[Try]:
    """Everything of a service that no role among these may call."""
    name = service.rpartition(".")[2]
    module = api if name == "Coordinator" else agent
    found = []
    for path, allowed in ROLES.items():
        method = path.rpartition("/")[2]
        if path.startswith(f"/{service}/") and not allowed & roles:
            request = getattr(module, f"{method}Request")()

            def give(stage: Stage, method: str = method, request: object = request) -> str:
                process = "c1" if name == "Coordinator" else "a"
                return stage.call(process, stage.files(who), name, method, request)

            found.append(Try(f"{who} calls {method}", "c1" if name == "Coordinator" else "a", give, "ROLE_NOT_ALLOWED"))
    return found


CERTIFICATES = [
    to_coordinator("plaintext to TLS", HANDSHAKE, lambda s: s.files("plaintext")),
    to_coordinator("no certificate", HANDSHAKE, lambda s: s.files("no certificate")),
    to_coordinator("an authority nobody knows", HANDSHAKE, lambda s: s.forge(OPERATOR, by=s.stranger)),
    to_coordinator("signed by itself", HANDSHAKE, lambda s: s.forge(OPERATOR, alone=True)),
    to_coordinator("expired", HANDSHAKE, lambda s: s.forge(OPERATOR, begins=-2 * DAY, ends=-DAY)),
    to_coordinator("not yet valid", HANDSHAKE, lambda s: s.forge(OPERATOR, begins=DAY, ends=2 * DAY)),
    to_coordinator("a certificate for servers alone", HANDSHAKE, lambda s: s.forge(OPERATOR, usages=(SERVER,))),
    to_coordinator(
        "another cluster, by an authority bound to this one", HANDSHAKE,
        lambda s: s.forge("resilver://other/operator/anna", by=s.authority.held.own),
    ),
    to_coordinator("another cluster", "CLUSTER_MISMATCH", lambda s: s.forge("resilver://other/operator/anna")),
    to_coordinator("no name", "NO_CERTIFICATE", lambda s: s.forge(dns=("anna.example",))),
    to_coordinator("a name as DNS alone", "NO_CERTIFICATE", lambda s: s.forge(dns=(OPERATOR,))),
    to_coordinator("two names", "NO_CERTIFICATE", lambda s: s.forge(OPERATOR, "resilver://test/viewer/anna")),
    to_coordinator("a role that is none", "NO_CERTIFICATE", lambda s: s.forge("resilver://test/admin/anna")),
    to_coordinator("a role in capitals", "NO_CERTIFICATE", lambda s: s.forge("resilver://test/OPERATOR/anna")),
    to_coordinator("a name with a path", "NO_CERTIFICATE", lambda s: s.forge(f"{OPERATOR}/../viewer")),
    Try("TLS 1.2 to a coordinator", "c1", lambda s: s.handshake("c1", ssl.TLSVersion.TLSv1_2), HANDSHAKE),
    Try("TLS 1.2 to an agent", "a", lambda s: s.handshake("a", ssl.TLSVersion.TLSv1_2), HANDSHAKE),
    Try("TLS 1.2 to the block stream", "a", lambda s: s.handshake("a-stream", ssl.TLSVersion.TLSv1_2), HANDSHAKE),
]  # fmt: skip

REPORTS = [
    Try("a node reports for another", "c1", lambda s: s.report(s.files("node/b"), "a"), "ROLE_NOT_ALLOWED"),
    Try("a newcomer reports for a member", "c1", lambda s: s.report(s.files("node/c"), "b"), "ROLE_NOT_ALLOWED"),
    Try("an operator reports", "c1", lambda s: s.report(s.files("operator/a"), "a"), "ROLE_NOT_ALLOWED"),
    Try("a viewer reports", "c1", lambda s: s.report(s.files("viewer/a"), "a"), "ROLE_NOT_ALLOWED"),
    Try("a coordinator reports", "c1", lambda s: s.report(s.files("coordinator/a"), "a"), "ROLE_NOT_ALLOWED"),
]

CHANGES = [
    *by_role("viewer/jo", {Role.VIEWER}, "resilver.v1.Coordinator"),
    Try(
        "a viewer plans with a snapshot", "c1",
        lambda s: s.call("c1", s.files("viewer/jo"), "Coordinator", "PlanResync",
            api.PlanResyncRequest(volumes=["vm1"], take_snapshot=True)), "ROLE_NOT_ALLOWED",
    ),
    *by_role("node/b", {Role.NODE}, "resilver.v1.Coordinator")[::6],
    *by_role("coordinator/c2", {Role.COORDINATOR}, "resilver.v1.Coordinator")[::6],
]  # fmt: skip

ORDERS = [
    *by_role("node/b", {Role.NODE}, "resilver.v1.Agent"),
    order("an operator gives an order", "ROLE_NOT_ALLOWED", "operator/anna"),
    order("an operator asks an agent", "ROLE_NOT_ALLOWED", "operator/anna", "GetAgent"),
    order("a viewer asks an agent", "ROLE_NOT_ALLOWED", "viewer/jo", "GetAgent"),
    order("a node gives a whole order", "ROLE_NOT_ALLOWED", "node/b"),
    order("an agent gives itself an order", "ROLE_NOT_ALLOWED", "node/a"),
    order("an order in plaintext", HANDSHAKE, "plaintext"),
    order("an order without a certificate", HANDSHAKE, "no certificate"),
    order("an order of another leader of this term", "STALE_TERM", "coordinator/c2", leader_id=str(uuid.uuid4())),
    order("an order for another cluster", "CLUSTER_MISMATCH", "coordinator/c2", cluster="other"),
    Try(
        "an order from another cluster's coordinator", "a",
        lambda s: s.call("a", s.forge("resilver://other/coordinator/c1"), "Agent", "GetAgent", agent.GetAgentRequest()),
        "CLUSTER_MISMATCH",
    ),
]  # fmt: skip

TICKETS = [
    ask("an operator asks a source", "ROLE_NOT_ALLOWED", "operator/anna"),
    ask("a coordinator asks a source", "ROLE_NOT_ALLOWED", "coordinator/c1"),
    ask("the ticket of another node", "TICKET_INVALID", "node/c"),
    ask("the ticket of another node, as its own", "TICKET_INVALID", "node/c", target_node="c"),
    ask("a ticket that was made up", "TICKET_INVALID", "node/b", ticket=uuid.uuid4().hex),
    ask("a ticket for another resync", "TICKET_INVALID", "node/b", resync_id=str(uuid.uuid4())),
    ask("a ticket for another target", "TICKET_INVALID", "node/b", target=str(uuid.uuid4())),
]

STREAMS = [
    to_stream("a HELLO in plaintext", HANDSHAKE, lambda s: s.files("plaintext")),
    to_stream("a HELLO without a certificate", HANDSHAKE, lambda s: s.files("no certificate")),
    to_stream("a HELLO of a stranger", HANDSHAKE, lambda s: s.forge(NODE_B, by=s.stranger)),
    to_stream("a HELLO signed by itself", HANDSHAKE, lambda s: s.forge(NODE_B, alone=True)),
    to_stream("a HELLO that has expired", HANDSHAKE, lambda s: s.forge(NODE_B, begins=-2 * DAY, ends=-DAY)),
    to_stream("a HELLO of a server alone", HANDSHAKE, lambda s: s.forge(NODE_B, usages=(SERVER,))),
    to_stream("a HELLO of another cluster", "CLUSTER_MISMATCH", lambda s: s.forge("resilver://other/node/b")),
    to_stream("a HELLO of two nodes", "NO_CERTIFICATE", lambda s: s.forge(NODE_B, "resilver://test/node/c")),
    to_stream("a HELLO of a name as DNS", "NO_CERTIFICATE", lambda s: s.forge(dns=(NODE_B,), usages=(CLIENT,))),
    to_stream("blocks for an operator", "ROLE_NOT_ALLOWED", lambda s: s.files("operator/b")),
    to_stream("blocks for a viewer", "ROLE_NOT_ALLOWED", lambda s: s.files("viewer/b")),
    to_stream("blocks for a coordinator", "ROLE_NOT_ALLOWED", lambda s: s.files("coordinator/b")),
    to_stream("blocks by another node's ticket", "TICKET_INVALID", lambda s: s.files("node/c")),
    to_stream("blocks by that ticket as one's own", "TICKET_INVALID", lambda s: s.files("node/c"), target_node="c"),
    to_stream("blocks by a ticket made up", "TICKET_INVALID", lambda s: s.files("node/b"), ticket=uuid.uuid4().hex),
    to_stream("blocks of another target", "TICKET_INVALID", lambda s: s.files("node/b"), target=str(uuid.uuid4())),
    to_stream("blocks of another resync", "TICKET_INVALID", lambda s: s.files("node/b"), resync_id=str(uuid.uuid4())),
    to_stream("blocks of another volume", "TARGET_GONE", lambda s: s.files("node/b"), volume="vm2"),
]

TRIES = [*CERTIFICATES, *REPORTS, *CHANGES, *ORDERS, *TICKETS, *STREAMS]


def test_they_are_many() -> None:
    assert len({one.what for one in TRIES}) == len(TRIES) > 40


@pytest.mark.parametrize("one", TRIES, ids=[one.what.replace(" ", "_") for one in TRIES])
def test_refused(stage: Stage, one: Try) -> None:
    before = len(stage.cluster.log(one.on))

    def told() -> list[str]:
        return [line for line in stage.cluster.log(one.on)[before:].splitlines() if REFUSED.search(line)]

    assert one.how(stage) == one.says
    if one.says != HANDSHAKE:
        (line,) = wait_for(told, "a line in the log")
        assert one.says in line
    else:
        wait_for(told, "a line in the log")
    assert stage.state() == stage.still


def test_who_has_the_right_name_is_let_in(stage: Stage) -> None:
    """Else the refusals would prove nothing: the same questions, by whom they are for."""
    for who in ("operator/anna", "viewer/jo"):
        assert stage.call("c1", stage.files(who), *LOOK) == LET_IN
    assert stage.call("c1", stage.forge(OPERATOR), *LOOK) == LET_IN
    assert stage.call("a", stage.files("coordinator/c2"), "Agent", "GetAgent", agent.GetAgentRequest()) == LET_IN
    assert ask("", "", "node/b").how(stage) == LET_IN
    assert stage.stream(stage.files("node/b"), stage.hello) == LET_IN
    for who in ("viewer/jo", "node/b", "coordinator/c2"):
        assert stage.call("c1", stage.files(who), "Health", "Check", health_pb2.HealthCheckRequest()) == LET_IN
        assert stage.call("a", stage.files(who), "Health", "Check", health_pb2.HealthCheckRequest()) == LET_IN
    for port in ("c1", "a", "a-stream"):
        assert stage.handshake(port, ssl.TLSVersion.TLSv1_3) == f"{LET_IN} by TLSv1.3"


def test_who_does_not_say_who_it_is_is_not_kept_waiting_for(stage: Stage) -> None:
    """Half a handshake, or none: each of the ports ends it by itself."""
    waiting = [
        (port, said, socket.create_connection(("127.0.0.1", stage.cluster.ports[port]), timeout=60))
        for port in ("c1", "a", "a-stream")
        for said in (b"", b"\x16\x03\x01\x02\x00\x01\x00")
    ]
    for port, said, stranger in waiting:
        with stranger:
            stranger.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                assert len(stranger.recv(64)) < 64, f"{port}: an alert at most"


def test_the_command_is_told_what_it_may_lack(stage: Stage) -> None:
    at = f"127.0.0.1:{stage.cluster.ports['c1']}"
    node = stage.files("node/b")
    assert node is not None
    for words, says in (
        ([], "name yours with --tls-ca, --tls-cert and --tls-key"),
        (["--tls-ca", node.ca], "--tls-cert is missing"),
        (["--tls-ca", node.ca, "--tls-cert", node.cert, "--tls-key", node.key], "it is for operator or viewer"),
    ):
        command = [sys.executable, "-m", "resilver.cli.main", "--coordinator", at, *words, "status"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode in {1, 2, 4}
        assert says in done.stderr


def test_a_ticket_that_was_taken_back_is_worth_nothing(stage: Stage) -> None:
    """Replayed: it was good, and its holder's certificate still is."""
    assert stage.stream(stage.files("node/b"), stage.hello) == LET_IN
    stop = agent.StopTransferRequest(header=stage.order(), resync_id=stage.hello.resync_id)
    assert stage.call("a", stage.files("coordinator/c1"), "Agent", "StopTransfer", stop) == LET_IN
    assert stage.stream(stage.files("node/b"), stage.hello) == "TICKET_INVALID"
    assert ask("", "", "node/b").how(stage) == "TICKET_INVALID"
