"""What the audit trail is told of each call, and what it shows.

The rules:

* A method that changes something is `@audited`. What it asks of the engine carries who asked, and the engine enters it
  (`core/trail.py`); what is refused before that is handed to the engine as an attempt.
* A call with `validate_only` changes nothing and is not entered, nor is a plan that takes no snapshot.
* Who may not call at all is refused before any method: `Auditor.refused` is for whoever does that.
* A standby has no trail: what it refuses is in its log alone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar, cast

from google.protobuf import json_format
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from grpc import aio

from coordinator.core.audited import Asked, AuditEntry, AuditResult
from coordinator.core.events import Attempted
from coordinator.office import Office
from coordinator.paging import page
from coordinator.reports import peer_host
from coordinator.views import descending
from coordinator.wire import time_or_unset
from resilver.errors import ResilverError
from resilver.fields import check_enum, check_name, check_text, cut_text
from resilver.v1 import coordinator_pb2 as api

REQUEST_BYTES_MAX: Final = 16 << 10
"""A longer one is entered by its length: nobody is to keep us busy with what is refused."""
PRINCIPAL_CHARS_MAX: Final = 253
RESULTS: Final = {
    AuditResult.UNKNOWN: api.AUDIT_RESULT_UNKNOWN,
    AuditResult.DONE: api.AUDIT_RESULT_DONE,
    AuditResult.PARTLY: api.AUDIT_RESULT_PARTLY,
    AuditResult.REFUSED: api.AUDIT_RESULT_REFUSED,
}
RESULT_BY_VALUE: Final[dict[int, AuditResult]] = {wire: result for result, wire in RESULTS.items()}
AUDITED: Final[set[str]] = set()
"""The methods that change something, as gRPC names them."""
_SERVICE: Final = "/resilver.v1.Coordinator/"

Context = aio.ServicerContext[Any, Any]
Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])


@dataclass(slots=True)
class Call:
    """One call that is to change something. `entered`: the engine has it, and will enter what it answers."""

    asked: Asked
    entered: bool = False


_CALL: Final[ContextVar[Call | None]] = ContextVar("call", default=None)


class Servicer(Protocol):
    """What has audited methods."""

    @property
    def auditor(self) -> Auditor: ...


class Auditor:
    """Tells the trail of what never became an order."""

    def __init__(self, office: Office, principal_of: Callable[[Context], str]) -> None:
        self._office = office
        self._principal_of = principal_of

    def asked(self, method: str, request: Message, context: Context) -> Asked:
        return asked_of(method, request, self._principal_of(context), peer_host(context.peer()))

    def refused(self, method: str, request: Message, context: Context, error: ResilverError) -> None:
        """A call that was not let in, by gRPC's name of its method. Nothing that it says has been checked."""
        name = method.removeprefix(_SERVICE)
        if method.startswith(_SERVICE) and name in AUDITED:
            self.attempted(self.asked(name, request, context), error)

    def attempted(self, asked: Asked, error: ResilverError) -> None:
        with suppress(ResilverError):  # a standby, or an engine that is far behind: the log has it
            self._office.post(Attempted(asked, error))


def audited(method: Method) -> Method:
    """For a method that changes something."""
    name = method.__name__
    AUDITED.add(name)

    @functools.wraps(method)
    async def call(self: Servicer, request: Message, context: Context) -> Any:
        if not changes(request):
            return await method(self, request, context)
        this = Call(self.auditor.asked(name, request, context))
        token = _CALL.set(this)
        try:
            return await method(self, request, context)
        except ResilverError as error:
            if not this.entered:
                self.auditor.attempted(this.asked, error)
            raise
        finally:
            _CALL.reset(token)

    return cast("Method", call)


def entering() -> Asked | None:
    """Who asks, for what is asked of the engine in an audited call; None in any other."""
    this = _CALL.get()
    if this is None:
        return None
    this.entered = True
    return this.asked


def changes(request: Message) -> bool:
    if isinstance(request, api.PlanResyncRequest):
        return request.take_snapshot and not request.page_token
    return not getattr(request, "validate_only", False)


def asked_of(method: str, request: Message, principal: str, address: str) -> Asked:
    volumes = getattr(request, "volumes", None) or [getattr(request, "volume", "")]
    return Asked(
        method=method,
        principal=cut_text(principal, PRINCIPAL_CHARS_MAX),
        address=address,
        volumes=tuple(volume for volume in volumes if volume),
        node=getattr(request, "node", ""),
        request=_text_of(request),
    )


def _text_of(request: Message) -> str:
    size = request.ByteSize()
    if size > REQUEST_BYTES_MAX:
        return f"{size} bytes"
    try:
        fields = MessageToDict(request, preserving_proto_field_name=True)
    except (ValueError, json_format.Error):  # a time or a duration that is none: nothing has been checked yet
        return str(request)
    fields.pop("request_id", None)
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def list_audit_entries(office: Office, request: api.ListAuditEntriesRequest) -> api.ListAuditEntriesResponse:
    """Newest first. The last part of a party's name will do. A name that is in no entry is no error: what it was about
    may be gone.
    """
    volume = check_name(request.volume, "volume") if request.volume else ""
    principal = check_text(request.principal, "principal", chars_max=PRINCIPAL_CHARS_MAX)
    result = check_enum(RESULT_BY_VALUE, request.result, "result") if request.result else None
    wanted = [
        entry
        for entry in office.engine().audit()
        if (not volume or volume in entry.volumes)
        and (not principal or principal in (entry.principal, entry.principal.rpartition("/")[2]))
        and (result is None or result is entry.result)
    ]
    found = page(request, wanted, lambda entry: descending(entry.sequence), entry_to_proto)
    return api.ListAuditEntriesResponse(entries=found.messages, next_page_token=found.next_page_token)


def entry_to_proto(entry: AuditEntry) -> api.AuditEntry:
    return api.AuditEntry(
        sequence=entry.sequence,
        create_time=time_or_unset(entry.create_time_ms),
        end_time=time_or_unset(entry.end_time_ms),
        method=entry.method,
        principal=entry.principal,
        address=entry.address,
        volumes=entry.volumes,
        node=entry.node,
        request=cut_text(entry.request),
        result=RESULTS[entry.result],
        reason=entry.reason,
        message=cut_text(entry.message),
        attempt_count=min(entry.count, (1 << 32) - 1),
        last_time=time_or_unset(entry.last_time_ms),
    )
