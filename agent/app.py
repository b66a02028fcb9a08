"""`resilver-agent --config FILE [--check]`: reads the configuration, builds the agent, and runs it until a signal.

Exit codes: 0 stopped on request, 1 could not start or broke, 2 usage or configuration. SIGTERM and SIGINT end it within
five seconds, SIGHUP reloads what may be reloaded and refuses the rest whole. What is wrong is one sentence on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import signal
import sys
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING, Final, NoReturn

import structlog

from agent.check import check
from agent.memory import bound_arenas
from agent.node import AgentNode
from resilver.config import load_agent_config
from resilver.config_reload import reload_of
from resilver.credentials import credentials_of
from resilver.errors import Invalid, ResilverError
from resilver.names import Name, Role
from resilver.telemetry import configure_logs, marked, set_level, start_metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resilver.config import AgentConfig

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
STOP_MAX_S: Final = 4.8

_log = structlog.get_logger(__name__)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command. Leaves by `os._exit`, because a disk that hangs must not hold the process."""
    options = _parser().parse_args(arguments)
    code = _run(options.config, only_check=options.check)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="resilver-agent", description="Keeps the replicas of this node.")
    parser.add_argument("--config", required=True, metavar="FILE", help="agent.toml")
    parser.add_argument("--version", action="version", version=f"resilver {metadata.version('resilver')}")
    parser.add_argument(
        "--check", action="store_true", help="parse the configuration, look at every volume, and exit with 0 or 2"
    )
    return parser


def _run(path: str, *, only_check: bool) -> int:
    try:
        config = load_agent_config(path)
        if only_check:
            return check(config, sys.stdout)
        marked(node=config.node)
        configure_logs(config.log_level, config.log_format)
        bound_arenas()
        # A volume that is compacted has all its snapshots open, and there may be thousands.
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        # Not asyncio.run: at its end it waits for the threads of its executor, and those may wait for a disk.
        asyncio.new_event_loop().run_until_complete(_serve(path, config))
    except ResilverError as error:
        _say(f"{error.reason}: {error.message}")
        return EXIT_USAGE if isinstance(error, Invalid) else EXIT_FAILED
    except KeyboardInterrupt:
        return 0
    except Exception as error:  # noqa: BLE001 - the edge of the process: the log has it whole, the user a sentence
        _log.critical("the agent broke", exc_info=error)
        _say(f"a fault of its own ended it ({type(error).__name__}); see the log")
        return EXIT_FAILED
    return 0


def _say(sentence: str) -> None:
    sys.stderr.write(f"resilver-agent: {sentence}\n")


async def _serve(path: str, config: AgentConfig) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    served = start_metrics(config.metrics_listen, required="metrics_listen" in config.stated)
    node = AgentNode(config, tls=credentials_of(config.tls, Name(config.cluster, Role.NODE, config.node)))
    if config.insecure:
        _log.warning("INSECURE: anybody who reaches these ports may read and order anything", listen=str(config.listen))
    loop.add_signal_handler(signal.SIGHUP, _reload, path, node)
    try:
        await node.start()
        waits = {asyncio.create_task(stopping.wait()), asyncio.create_task(node.failed())}
        done, left = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        for task in done:
            task.result()
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_MAX_S):
                await node.close()
        if served is not None:
            served.server.server_close()
        _log.info("stopped")


def _reload(path: str, node: AgentNode) -> None:
    """SIGHUP: the whole of it, or nothing and why."""
    try:
        config = load_agent_config(path)
        changed = reload_of(node.config, config)
        node.take_on(config)
    except ResilverError as error:
        _log.error("not reloaded", why=error.message)
        return
    set_level(config.log_level)
    _log.info("reloaded", changed=sorted(changed))


if __name__ == "__main__":
    main()
