"""A cluster in which nothing may change, and what strangers try with it."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from agent.disk.durable import read_json
from agent.stream import frame as frames
from agent.stream.frame import FrameBuffer, Hello, Kind
from resilver import ca
from resilver.config import Tls
from resilver.names import Role
from resilver.status_details import to_error
from resilver.v1 import agent_pb2, agent_pb2_grpc, coordinator_pb2_grpc
from resilver.v1 import coordinator_pb2 as api
from tests.certificates import Authority, brought_along, channel, forged
from tests.cluster import Cluster, wait_for

CALL_TIMEOUT_S = 20.0
HANDSHAKE = "HANDSHAKE"
"""Refused before anything could be said."""
LET_IN = "LET_IN"


class Stage:
    """One coordinator, and the nodes a (primary), b and c (newcomer), each a process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.byo = brought_along()
        self.stranger = brought_along()
        self.authority = Authority(directory / "certs", also=self.byo)
        self.cluster = Cluster(directory, "sqlite", authority=self.authority)
        self.trusted = (directory / "certs" / "ca.crt").read_bytes()
        self.hello = Hello("", "", "vm1", "", "b")

    def start(self) -> None:
        cluster = self.cluster
        cluster.start_coordinator()
        for node in ("a", "b"):
            (self.directory / f"{node}-disk").mkdir()
        live = self.directory / "a-disk" / "vm1.img"
        live.write_bytes(b"resilver" * (1 << 15))
        for node in ("a", "b"):
            cluster.start_agent(node, {"vm1": self.directory / f"{node}-disk" / "vm1.img"})
        cluster.wait_reachable("vm1", "a", "b")
        cluster.ok("resync", "vm1")
        self.hello = self._prepared()
        self.still = wait_for(self._settled, "a quiet cluster")

    def files(self, who: str) -> Tls | None:
        """Those of `operator/anna`, issued; of a kind of wrong ones by its name; None of nobody."""
        if who == "plaintext":
            return None
        if who == "no certificate":
            return Tls(ca=self.authority.issue(Role.NODE, "a").ca)
        role, _, name = who.partition("/")
        return self.authority.issue(Role(role), name)

    def forge(self, *uris: str, by: ca.Signed | None = None, alone: bool = False, **more: Any) -> Tls:
        """A certificate that the cluster's own or, where `by` is not said, the authority brought along has signed."""
        place = self.directory / "forged" / uuid.uuid4().hex
        return forged(place, *uris, by=None if alone else by or self.byo, trusted=self.trusted, **more)

    # ------------------------------------------------------------ what is tried

    def call(self, process: str, files: Tls | None, service: str, method: str, request: Any) -> str:
        """The reason of the refusal, HANDSHAKE if nobody answers, LET_IN if there is an answer."""
        role, name = (Role.COORDINATOR, "any") if process == "c1" else (Role.NODE, process)
        with channel(self.cluster.console(process), files, role, name) as made:
            stub = getattr(_STUBS[service], f"{service}Stub")(made)
            try:
                answers = getattr(stub, method)(request, timeout=CALL_TIMEOUT_S)
                if isinstance(answers, grpc.Call):
                    next(iter(answers))
            except grpc.RpcError as error:
                return _reason(error)
        return LET_IN

    def report(self, files: Tls | None, node: str) -> str:
        hello = agent_pb2.AgentHello(
            node=node, cluster="test", version="0", address="127.0.0.1:1", stream_address="127.0.0.1:2", volumes=["vm1"]
        )
        message = agent_pb2.ReportRequest(boot=str(uuid.uuid4()), seq=1, hello=hello)
        return self.call("c1", files, "Reports", "Report", iter([message]))

    def stream(self, files: Tls | None, hello: Hello, process: str = "a") -> str:
        """What the block stream answers to a HELLO."""
        try:
            with socket.create_connection(("127.0.0.1", self.cluster.ports[f"{process}-stream"]), timeout=20) as plain:
                made = plain if files is None else _context(files).wrap_socket(plain)
                with made:
                    made.sendall(frames.encode_hello(hello))
                    return _answer(made)
        except OSError:
            return HANDSHAKE

    def handshake(self, port: str, version: ssl.TLSVersion) -> str:
        """A handshake of at most that version, with a certificate that is good."""
        context = _context(self.files("node/b"))
        context.maximum_version = version
        context.set_alpn_protocols(["h2"])
        try:
            with (
                socket.create_connection(("127.0.0.1", self.cluster.ports[port]), timeout=20) as plain,
                context.wrap_socket(plain) as made,
            ):
                return f"{LET_IN} by {made.version()}"
        except OSError:
            return HANDSHAKE

    # ------------------------------------------------------------ what must not change

    def _settled(self) -> str | None:
        """The state of everything, once it has been the same for two looks."""
        before = self.state()
        return before if self.cluster.volume("vm1").get("state") == "HEALTHY" and before == self.state() else None

    def state(self) -> str:
        """Everything that an attempt might have changed: on both nodes' disks, and all that the coordinator knows."""
        files = {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for node in ("a", "b")
            for place in (self.directory / node, self.directory / f"{node}-disk")
            for path in sorted(place.rglob("*"))
            if path.is_file()
        }
        ask = self.cluster.ask
        volumes = ask("ListVolumes", api.ListVolumesRequest()).volumes
        nodes = ask("ListNodes", api.ListNodesRequest()).nodes
        for one in (*nodes, *(replica for volume in volumes for replica in volume.replicas)):
            one.ClearField("report_time")
        for replica in (replica for volume in volumes for replica in volume.replicas):
            replica.ClearField("free_bytes")
        elections = ask("ListElections", api.ListElectionsRequest(volume="vm1")).elections
        events = ask("ListEvents", api.ListEventsRequest()).events
        known = [*volumes, *nodes, *elections, *ask("ListResyncs", api.ListResyncsRequest()).resyncs, *events]
        return json.dumps([files, [str(one) for one in known]], indent=1)

    def order(self, **changes: Any) -> agent_pb2.OrderHeader:
        """The header of an order that agent a would obey, if a coordinator gave it."""
        pin = read_json(self.directory / "a" / "identity.json") or {}
        volume = self.cluster.ask("GetVolume", api.GetVolumeRequest(volume="vm1")).volume
        header = agent_pb2.OrderHeader(
            cluster="test", store_id=pin["store_id"], term=pin["term"], leader_id=pin["leader_id"], volume="vm1",
            volume_id=volume.volume_id, epoch=volume.epoch, epoch_id=volume.epoch_id,
        )  # fmt: skip
        for key, value in changes.items():
            setattr(header, key, value)
        return header

    def _prepared(self) -> Hello:
        """A ticket for node b that agent a will honour, as the coordinator would have had it made."""
        tip = self.cluster.replicas("vm1")["a"]["snapshot"]
        hello = replace(self.hello, ticket=uuid.uuid4().hex, resync_id=str(uuid.uuid4()), target=tip)
        request = agent_pb2.PrepareSendRequest(
            header=self.order(), resync_id=hello.resync_id, target=tip, target_node="b", ticket=hello.ticket
        )
        said = self.call("a", self.files("coordinator/c1"), "Agent", "PrepareSend", request)
        assert said == LET_IN, said
        return hello


_STUBS: Any = {
    "Agent": agent_pb2_grpc,
    "Peer": agent_pb2_grpc,
    "Reports": agent_pb2_grpc,
    "Coordinator": coordinator_pb2_grpc,
    "Health": health_pb2_grpc,
}


def _reason(error: Any) -> str:
    if error.code() is grpc.StatusCode.UNAVAILABLE and not error.trailing_metadata():
        return HANDSHAKE
    found = to_error(error)
    return found.reason


def _context(files: Tls | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    assert files is not None
    context.load_verify_locations(files.ca)
    if files.cert:
        context.load_cert_chain(files.cert, files.key)
    return context


def _answer(made: socket.socket) -> str:
    buffer = FrameBuffer()
    while (frame := buffer.next()) is None:
        count = made.recv_into(buffer.space())
        if not count:
            return HANDSHAKE
        buffer.filled(count)
    return LET_IN if frame.header.kind is Kind.WELCOME else frames.decode_error(frame).reason
