"""Who may do what: the tables, and the check at each call.

The rules:

* A caller is who its certificate names (`names.py`): one party, of this cluster, over TLS 1.3. Nothing else that it
  says of itself counts.
* Each RPC stands in a table with the roles that may call it, and one that stands in none is refused: who adds an RPC
  decides this first. Health and reflection answer every party of the cluster.
* A call that is refused has no effect: the check comes before the servicer. Its caller gets the status, and the log has
  one line (`rpc.py`).
* A port without TLS asks nobody for a name (`config.py` keeps those to loopback, or to `insecure`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeAlias

from grpc import aio

from resilver.errors import Forbidden, ResilverError, Unauthenticated
from resilver.names import Name, Role, only_name

Context: TypeAlias = "aio.ServicerContext[Any, Any]"
Refused: TypeAlias = Callable[[str, Any, Context, ResilverError], None]

_READ: Final = frozenset({Role.OPERATOR, Role.VIEWER})
_CHANGE: Final = frozenset({Role.OPERATOR})
_ORDER: Final = frozenset({Role.COORDINATOR})
_NODE: Final = frozenset({Role.NODE})
_ANY: Final = frozenset(Role)


def _all(service: str, roles: frozenset[Role], *methods: str) -> dict[str, frozenset[Role]]:
    return {f"/{service}/{method}": roles for method in methods}


_COORDINATOR: Final = "resilver.v1.Coordinator"
ROLES: Final[Mapping[str, frozenset[Role]]] = {
    **_all(
        _COORDINATOR, _READ,
        "GetCluster", "ListNodes", "GetNode", "ListVolumes", "GetVolume", "WatchVolumes", "ListSnapshots",
        "ListPreserved", "ListElections", "ExplainVolume", "PlanResync", "GetResync", "ListResyncs", "WatchResyncs",
        "ListEvents", "WatchEvents", "ListAuditEntries",
    ),
    **_all(
        _COORDINATOR, _CHANGE,
        "StartResync", "CancelResync", "CreateSnapshot", "DeleteSnapshot", "PruneSnapshots", "ExportSnapshot",
        "ElectPrimary", "PauseVolume", "ResumeVolume", "UpdateNode", "RemoveReplica", "RemoveNode", "RemoveVolume",
        "AdoptStore",
        "ExportStore",  # changes nothing, but has all that the store has
    ),
    **_all("resilver.v1.Reports", _NODE, "Report"),
    **_all(
        "resilver.v1.Agent", _ORDER,
        "GetAgent", "ExamineReplica", "OpenEpoch", "TakeSnapshot", "TakeSnapshots", "PrepareSend", "Receive",
        "StopTransfer", "DropSnapshot", "CloneSnapshot", "SetLimits",
    ),
    **_all("resilver.v1.Peer", _NODE, "StreamDelta", "DigestRanges"),
    **_all("grpc.health.v1.Health", _ANY, "Check", "Watch", "List"),
    **_all("grpc.reflection.v1.ServerReflection", _ANY, "ServerReflectionInfo"),
    **_all("grpc.reflection.v1alpha.ServerReflection", _ANY, "ServerReflectionInfo"),
}  # fmt: skip
"""Who may call what."""

CHANGES_WITH: Final[Mapping[str, str]] = {f"/{_COORDINATOR}/PlanResync": "take_snapshot"}
"""RPCs that read, but for this field of their request."""

TLS_VERSION: Final = "TLSv1.3"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, None where the port has no TLS, and from where, as gRPC writes it: `ipv4:10.0.0.11:57348`."""

    name: Name | None
    address: str

    def __str__(self) -> str:
        return str(self.name) if self.name is not None else "unknown"

    def check_node(self, node: str) -> None:
        """`Forbidden("ROLE_NOT_ALLOWED")` if a node reports for another one."""
        if not self._is_node(node):
            raise Forbidden("ROLE_NOT_ALLOWED", f"{self} may not report for node {node}", node=node)

    def check_ticket(self, target_node: str) -> None:
        """`Unauthenticated("TICKET_INVALID")` if a node shows a ticket that is for another one."""
        if not self._is_node(target_node):
            raise Unauthenticated("TICKET_INVALID", f"{self} shows a ticket that is for node {target_node}")

    def _is_node(self, node: str) -> bool:
        return self.name is None or (self.name.role is Role.NODE and self.name.name == node)


def caller(context: Context) -> Caller:
    """Who is behind a call that was let in."""
    uris = _property(context, "peer_uri")
    return Caller(only_name(uris) if uris else None, context.peer())


def party_of(uris: Iterable[str], cluster: str, roles: Collection[Role]) -> Name:
    """Who a certificate names; Unauthenticated or Forbidden unless it is of that cluster and has one of those roles."""
    try:
        name = only_name(uris)
    except ValueError as error:
        raise Unauthenticated("NO_CERTIFICATE", str(error)) from error
    if name.cluster != cluster:
        raise Forbidden("CLUSTER_MISMATCH", f"{name} is of another cluster than {cluster}")
    if name.role not in roles:
        wanted = " or ".join(role.value for role in Role if role in roles) or "nobody"
        raise Forbidden("ROLE_NOT_ALLOWED", f"{name} may not do this: it is for {wanted}", role=name.role.value)
    return name


class Gate:
    """Lets calls in: of parties of one cluster, to what their role may. `refused` is told of those that it does not."""

    def __init__(self, cluster: str, refused: Refused | None = None) -> None:
        self._cluster: Final = cluster
        self._refused: Final = refused

    def admit(self, method: str, request: Any, context: Context) -> None:
        """Returns if the call may go on; raises Unauthenticated or Forbidden."""
        try:
            self._check(method, request, context)
        except (Unauthenticated, Forbidden) as error:
            if self._refused is not None:
                self._refused(method, request, context, error)
            raise

    def _check(self, method: str, request: Any, context: Context) -> None:
        roles = ROLES.get(method, frozenset())
        if method in CHANGES_WITH and getattr(request, CHANGES_WITH[method]):
            roles &= _CHANGE
        version = _property(context, "ssl_tls_version")
        if version and version != [TLS_VERSION]:  # older gRPC does not tell; that there is TLS the name below shows
            raise Unauthenticated("NO_CERTIFICATE", f"this port speaks {TLS_VERSION}, not {', '.join(version)}")
        name = party_of(_property(context, "peer_uri"), self._cluster, roles)
        # Looked at in each call: the connection, on which it was looked at too, may be older than that.
        for pem in context.auth_context().get("x509_pem_cert", ()):
            if _ends_at(pem) <= time.time():
                raise Unauthenticated("NO_CERTIFICATE", f"the certificate of {name} has ended")


@lru_cache(maxsize=1024)
def _ends_at(pem: bytes) -> float:
    """When a certificate ends, in seconds since 1970."""
    from cryptography import x509  # noqa: PLC0415 - only who has a certificate needs it

    return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()


def _property(context: Context, key: str) -> list[str]:
    found: Mapping[str, Iterable[bytes]] = context.auth_context()
    return [value.decode("utf-8", "replace") for value in found.get(key, ())]
