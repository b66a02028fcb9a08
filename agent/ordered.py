"""What becomes of an order, counted and logged; whatever is logged while it is carried out says which order it was.

The fields come from whoever calls, and are cut: a line of a log has a bound too.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import structlog

from agent import metrics
from resilver.errors import ResilverError
from resilver.telemetry import bound

R = TypeVar("R")

FIELD_CHARS_MAX: Final = 64

_log = structlog.get_logger(__name__)


def ordered(method: Callable[[Any, Any, Any], Awaitable[R]]) -> Callable[[Any, Any, Any], Awaitable[R]]:
    """For the methods that take an order. A size is asked for often and changes nothing: that is for debugging."""
    kind = method.__name__

    @functools.wraps(method)
    async def obeying(service: Any, request: Any, context: Any) -> R:
        with bound(**about(request)):
            try:
                answer = await method(service, request, context)
            except ResilverError as error:
                metrics.ORDERS_REFUSED.labels(error.reason).inc()
                _log.warning("order refused", order=kind, reason=error.reason, message=error.message)
                error.logged = True
                raise
            log = _log.debug if getattr(request, "size_only", False) else _log.info
            log("order obeyed", order=kind)
            return answer

    return obeying


def about(request: Any) -> dict[str, object]:
    """Volume, term and epoch of an order, and its resync; of a group the volumes."""
    group = getattr(request, "requests", None)
    header = request.header if group is None else group[0].header if group else None
    found: dict[str, object] = {}
    if header is not None:
        found = {"volume": header.volume[:FIELD_CHARS_MAX], "term": header.term, "epoch": header.epoch}
        if not header.volume:  # an order to the node itself
            found = {"term": header.term}
    if group:
        found.pop("volume", None)
        found["volumes"] = [one.header.volume[:FIELD_CHARS_MAX] for one in group[:FIELD_CHARS_MAX]]
    resync = getattr(request, "resync_id", "")
    if resync:
        found["resync"] = resync[:FIELD_CHARS_MAX]
    return found
