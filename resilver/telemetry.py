"""Logs and metrics of a process: set up once, by its `app.py`.

Logs are structured lines on stderr: JSON, or text for a terminal (`auto`). What the libraries log through `logging`
takes the same way. What a task binds with `bound` stands on every line that it, and what it starts, writes; a thread
begins with nothing, so whoever hands it work hands it the context too (`agent/worker.py`). What is true of the process
(`marked`) stands on all lines, unless what is bound says otherwise. Metrics are defined where they are counted, in the
default registry; this only serves them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from threading import Thread
from typing import Any, Final
from wsgiref.simple_server import WSGIServer

import structlog
from prometheus_client import Info, start_http_server

from resilver.address import Address
from resilver.errors import Invalid

_log: Final = structlog.get_logger(__name__)

# Without the values of local variables: tickets and paths are among them.
_TRACEBACKS: Final = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)

bound: Final[Callable[..., contextlib.AbstractContextManager[Any]]] = structlog.contextvars.bound_contextvars
"""`with bound(volume="vm1"): ...`"""


BUILD: Final = Info("resilver_build", "This program.")
_of_process: Final[dict[str, object]] = {}


def marked(**fields: object) -> None:
    """From now on every line of this process carries these; None takes one away."""
    _of_process.update(fields)
    for name in [name for name, value in _of_process.items() if value is None]:
        del _of_process[name]


def _mark(_logger: object, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {**_of_process, **line}


def configure_logs(level: str, form: str = "auto") -> None:
    """Sends all logs to stderr. `level` and `form` are those of the configuration; calling it again replaces both."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _mark,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    text = form == "console" or (form == "auto" and sys.stderr.isatty())
    last: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
        if text
        else [_TRACEBACKS, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    set_level(level)


def set_level(level: str) -> None:
    """What is logged from now on: debug, info, warning or error."""
    logging.getLogger().setLevel(level.upper())


@dataclass(frozen=True, slots=True)
class Metrics:
    """A running metrics server."""

    port: int
    server: WSGIServer
    thread: Thread

    def stop(self) -> None:
        """Frees the port; returns at once, but for a request that is being answered."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(timeout=5)


def start_metrics(listen: Address, *, required: bool = True) -> Metrics | None:
    """Serves the default registry in a thread.

    A port that is taken is an error only if it is `required`, which means that somebody asked for this very one: a
    second process on a machine must not fail for a default. None then, and a line in the log.
    """
    BUILD.info({"version": metadata.version("resilver")})
    try:
        server, thread = start_http_server(listen.port, addr=listen.host or "::")
    except OSError as error:
        message = f"metrics_listen: cannot listen on {listen}: {error.strerror}; choose another address"
        if required or error.errno != errno.EADDRINUSE:
            raise Invalid("CONFIG_INVALID", message, field="metrics_listen") from error
        _log.warning("no metrics are served: the default port is taken", listen=str(listen))
        return None
    return Metrics(server.server_port, server, thread)
