"""A node's limits to protobuf and back; the rules are those of `wire.py`."""

from __future__ import annotations

from resilver.fields import check_number, check_optional, invalid
from resilver.limits import LIMIT_SECONDS_DEFAULT, LIMIT_SECONDS_MAX, Cap, LimitChange, NodeLimits, rate_fault
from resilver.v1 import volume_pb2
from resilver.wire import time_from_proto, time_to_proto

_COUNT_MAX = 2**32 - 1


def limits_to_proto(limits: NodeLimits) -> volume_pb2.NodeLimits:
    return volume_pb2.NodeLimits(
        receive=_cap_to_proto(limits.receive),
        send=_cap_to_proto(limits.send),
        receive_max_count=min(limits.receive_max_count, _COUNT_MAX),
        send_max_count=min(limits.send_max_count, _COUNT_MAX),
    )


def limits_from_proto(message: volume_pb2.NodeLimits, field: str = "limits") -> NodeLimits:
    return NodeLimits(
        receive=_cap_from_proto(message.receive, f"{field}.receive"),
        send=_cap_from_proto(message.send, f"{field}.send"),
        receive_max_count=message.receive_max_count,
        send_max_count=message.send_max_count,
    )


def change_to_proto(change: LimitChange) -> volume_pb2.NodeLimitChange:
    message = volume_pb2.NodeLimitChange(
        receive_bytes_per_second=change.receive_bytes_s,
        send_bytes_per_second=change.send_bytes_s,
        clear=change.clear,
    )
    message.limit_duration.FromSeconds(change.duration_s)
    return message


def change_from_proto(message: volume_pb2.NodeLimitChange, field: str = "limits") -> LimitChange:
    """What is ordered; Invalid for a cap that nothing could be moved under, or a time that is none."""
    receive = _rate(message, "receive_bytes_per_second", field)
    send = _rate(message, "send_bytes_per_second", field)
    duration_s = LIMIT_SECONDS_DEFAULT
    if message.HasField("limit_duration"):
        duration_s = message.limit_duration.seconds + (message.limit_duration.nanos > 0)
    if not 0 < duration_s <= LIMIT_SECONDS_MAX:
        raise invalid(f"{field}.limit_duration", f"is {duration_s} s; it must be more than 0 and at most 30 days")
    return LimitChange(receive, send, duration_s, message.clear)


def _rate(message: volume_pb2.NodeLimitChange, name: str, field: str) -> int | None:
    bytes_s = check_optional(message, name, field)
    if fault := rate_fault(bytes_s or 0):
        raise invalid(f"{field}.{name}", fault)
    return bytes_s


def _cap_to_proto(cap: Cap) -> volume_pb2.Cap:
    until = time_to_proto(cap.until_ms) if cap.until_ms else None
    return volume_pb2.Cap(bytes_per_second=cap.bytes_s, until_time=until)


def _cap_from_proto(message: volume_pb2.Cap, field: str) -> Cap:
    until_ms = time_from_proto(message.until_time, f"{field}.until_time") if message.HasField("until_time") else 0
    return Cap(check_number(message.bytes_per_second, f"{field}.bytes_per_second"), until_ms)
