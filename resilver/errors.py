"""One tree of errors for coordinator, agent and command.

::

    ResilverError
    ├── Refused              the state of things forbids it          FAILED_PRECONDITION  exit 3
    ├── Superseded           the giver of the order is out of date   FAILED_PRECONDITION  exit 4
    ├── Conflict             it changed meanwhile; read again        ABORTED              exit 3
    ├── NotFound             no such volume, node, resync, snapshot  NOT_FOUND            exit 2
    ├── Invalid              the request or the config is wrong      INVALID_ARGUMENT     exit 2
    ├── Unavailable          no leader, no store, no answer          UNAVAILABLE          exit 4
    ├── Exhausted            a bound was reached                     RESOURCE_EXHAUSTED   exit 1
    ├── Damaged              data is not what it should be           DATA_LOSS            exit 1
    ├── Unauthenticated      no proof of who asks                    UNAUTHENTICATED      exit 1
    ├── Forbidden            known, and not allowed                  PERMISSION_DENIED    exit 1
    └── DemoFailed           `resilver demo` could not go on         INTERNAL             exit 1

Every error carries a `reason` (one of the table below; it travels as `google.rpc.ErrorInfo.reason`), a sentence
for a person, and metadata of strings. The class decides gRPC status and exit code, so that a reason cannot be
raised under two of them: `error_for(reason, message)` builds the right class.
"""

from __future__ import annotations

from typing import ClassVar, Final


class ResilverError(Exception):
    """Base of all errors that a user may meet.

    `status` is the name of a gRPC status code; `exit_code` is what the command ends with.
    """

    status: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 1
    reasons: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, reason: str, message: str, *, next_command: str = "", **metadata: str) -> None:
        if self.reasons and reason not in self.reasons:
            raise ValueError(f"{reason} is no reason of {type(self).__name__}")
        super().__init__(message)
        self.reason: Final = reason
        self.message: Final = message
        self.next_command: Final = next_command
        self.metadata: Final = metadata
        self.logged = False
        """Whether a log has it already: who refuses somebody says so once."""


class Refused(ResilverError):
    """The state of a volume, a replica or a node forbids it."""

    status = "FAILED_PRECONDITION"
    exit_code = 3
    reasons = frozenset(
        {
            "PRIMARY_AWAY",
            "PRIMARY_BEHIND",
            "PRIMARY_UNCLEAR",
            "NEWEST_COPY_MISSING",
            "AMBIGUOUS",
            "NO_DATA",
            "RECOVERING",
            "LOSS_NOT_NAMED",
            "WRONG_STORE",
            "DUPLICATE_NODE",
            "IN_USE",
            "TARGET_CHANGED",
            "BASE_GONE",
            "TARGET_GONE",
            "STREAM_CHANGED",
            "NO_SOURCE",
            "NO_SPACE",
            "PRESERVED_FULL",
            "KEEPS_BEING_WRITTEN",
            "SNAPSHOT_NOT_ATOMIC",
            "HOOK_FAILED",
            "PINNED",
            "LAST_COPY",
            "PAUSED",
            "NODE_OFFLINE",
            "NODE_STILL_REPORTS",
            "REPLICA_LOST",
            "REPLICA_FOREIGN",
            "REPLICA_UNRELATED",
            "BACKEND_MISMATCH",
            "NOT_SUPPORTED",
            "OPENING",
        }
    )


class Superseded(ResilverError):
    """Whoever gave the order has been deposed, or this is not the leader."""

    status = "FAILED_PRECONDITION"
    exit_code = 4
    reasons = frozenset({"STALE_TERM", "STALE_EPOCH", "EPOCH_CONFLICT", "NOT_LEADER"})


class Conflict(ResilverError):
    """What the request was built on has changed."""

    status = "ABORTED"
    exit_code = 3
    reasons = frozenset({"PLAN_CHANGED", "ETAG_MISMATCH", "LEADERSHIP_LOST"})


class NotFound(ResilverError):
    """Nothing of that name; the message suggests the nearest one."""

    status = "NOT_FOUND"
    exit_code = 2
    reasons = frozenset({"VOLUME_NOT_FOUND", "NODE_NOT_FOUND", "RESYNC_NOT_FOUND", "SNAPSHOT_NOT_FOUND"})


class Invalid(ResilverError):
    """A field of a request, a config file or a command line is wrong; `metadata["field"]` names it."""

    status = "INVALID_ARGUMENT"
    exit_code = 2
    reasons = frozenset({"INVALID_FIELD", "PAGE_TOKEN_INVALID", "REQUEST_ID_REUSED", "CONFIG_INVALID"})


class Unavailable(ResilverError):
    """Nobody who could answer is there now; trying again later may help."""

    status = "UNAVAILABLE"
    exit_code = 4
    reasons = frozenset({"NO_LEADER", "STORE_UNAVAILABLE", "NODE_UNREACHABLE", "DEADLINE"})


class Exhausted(ResilverError):
    """A bound was reached."""

    status = "RESOURCE_EXHAUSTED"
    exit_code = 1
    reasons = frozenset({"TOO_MANY_RESYNCS", "TOO_LARGE"})


class Damaged(ResilverError):
    """Data or a device is not what it should be."""

    status = "DATA_LOSS"
    exit_code = 1
    reasons = frozenset({"DIGEST_MISMATCH", "READBACK_MISMATCH", "BASE_MISMATCH", "SOURCE_DAMAGED", "IO_ERROR"})


class Unauthenticated(ResilverError):
    """No proof of who asks."""

    status = "UNAUTHENTICATED"
    exit_code = 1
    reasons = frozenset({"NO_CERTIFICATE", "TICKET_INVALID"})


class Forbidden(ResilverError):
    """Known, and not allowed."""

    status = "PERMISSION_DENIED"
    exit_code = 1
    reasons = frozenset({"ROLE_NOT_ALLOWED", "CLUSTER_MISMATCH"})


class DemoFailed(ResilverError):
    """The demo could not go on; the message says where. It never travels: the demo alone has it."""

    reasons = frozenset({"DEMO_FAILED"})


CLASSES: Final = (
    Refused,
    Superseded,
    Conflict,
    NotFound,
    Invalid,
    Unavailable,
    Exhausted,
    Damaged,
    Unauthenticated,
    Forbidden,
    DemoFailed,
)
_CLASS_OF: Final[dict[str, type[ResilverError]]] = {reason: cls for cls in CLASSES for reason in cls.reasons}


def class_of(reason: str) -> type[ResilverError]:
    """The class that a reason belongs to; `ResilverError` itself for a reason of a newer peer."""
    return _CLASS_OF.get(reason, ResilverError)


def error_for(reason: str, message: str, *, next_command: str = "", **metadata: str) -> ResilverError:
    """The error of the right class for a reason."""
    return class_of(reason)(reason, message, next_command=next_command, **metadata)
