"""`resilver-coordinator`: builds and wires everything; nothing else constructs its own collaborators.

The process serves from its first moment. While it does not lead, every service answers NOT_LEADER; once elected it
reads the store, makes an engine, and runs one loop (`reign.py`) until the leadership ends, however that happens.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Final, NoReturn

import structlog
from grpc_health.v1 import health, health_pb2

from coordinator.agents import Agents
from coordinator.api import Coordinator as CoordinatorService
from coordinator.core.context import Settings
from coordinator.counters import Leaders
from coordinator.front import Front
from coordinator.leadership import Leadership
from coordinator.metrics import register
from coordinator.reign import CurrentReign
from coordinator.reports import Reports
from coordinator.store import open_store
from coordinator.store.base import Leader, Reign, Store
from coordinator.store.measured import MeasuredStore
from resilver import rpc, telemetry
from resilver.config import CoordinatorConfig, load_coordinator_config
from resilver.config_reload import reload_of
from resilver.credentials import credentials_of
from resilver.errors import Conflict, ResilverError
from resilver.names import Name, Role
from resilver.v1 import agent_pb2_grpc, coordinator_pb2_grpc

log = structlog.get_logger(__name__)

COORDINATOR_SERVICE: Final = "resilver.v1.Coordinator"
REPORTS_SERVICE: Final = "resilver.v1.Reports"
GRACE_S: Final = 3.0
STOP_MAX_S: Final = 6.0
"""After the reign was resigned, which has a bound of its own: SIGTERM ends the process within ten seconds."""
OPEN_AGAIN_S: Final = 2.0
COLLECT_AFTER: Final = (10_000, 20, 100)
VERSION: Final = metadata.version("resilver")


class App:
    """One coordinator process."""

    def __init__(self, config: CoordinatorConfig, path: Path) -> None:
        self._config = config
        self._path = path
        self._term_wanted = 0
        self._store_id = ""
        self._leaders = Leaders()

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT. Raises a ResilverError for what an operator must mend first."""
        config = self._config
        tls = credentials_of(config.tls, Name(config.cluster, Role.COORDINATOR, config.name))
        server = rpc.make_server(tls=tls, refused=lambda *call: service.auditor.refused(*call))  # noqa: PLW0108 - made later
        address = str(config.advertised(rpc.bind(server, config.listen, tls=tls)))
        store = MeasuredStore(open_store(config))
        front = Front(config.cluster, config.name, address, config.insecure, VERSION, store)
        service = CoordinatorService(front)
        coordinator_pb2_grpc.add_CoordinatorServicer_to_server(service, server)
        agent_pb2_grpc.add_ReportsServicer_to_server(Reports(front, node_timeout_s=config.node_timeout_s), server)
        servicer = await rpc.add_health_and_reflection(server, (COORDINATOR_SERVICE, REPORTS_SERVICE), serving=False)
        agents = Agents(
            partial(rpc.make_channel, tls=tls),
            clock=time.monotonic,
            number=lambda: 0 if tls is None else tls.number,
        )
        register(front)
        metrics = telemetry.start_metrics(config.metrics_listen, required="metrics_listen" in config.stated)
        await server.start()
        log.info("serving", address=address, cluster=config.cluster, version=VERSION)
        if config.insecure:
            log.warning("INSECURE: whoever reaches this port may read and order everything", address=address)
        try:
            await self._until_stopped(self._campaign(front, store, agents, servicer, address))
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_MAX_S):
                    await rpc.stop(server, servicer, GRACE_S)
                    await agents.close()
                    if metrics is not None:
                        await asyncio.to_thread(metrics.stop)  # it may be waiting for an answer of this very loop
                    await store.close()
            log.info("stopped")

    async def _until_stopped(self, work: asyncio.Future[None]) -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        waiting = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait((work, waiting), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            waiting.cancel()
            work.cancel()
            with suppress(asyncio.CancelledError, ResilverError):
                await work

    def _campaign(
        self, front: Front, store: Store, agents: Agents, servicer: health.aio.HealthServicer, address: str
    ) -> asyncio.Future[None]:
        async def lead(reign: Reign, leading: Callable[[], bool]) -> None:
            await self._lead(front, agents, servicer, reign, leading)

        def on_leader(leader: Leader | None) -> None:
            front.known_leader = leader
            if leader is not None:
                self._leaders.saw(leader.leader_id)

        leadership = Leadership(
            store,
            self._config.name,
            address,
            lease_ttl_s=self._config.lease_ttl_s,
            lead=lead,
            on_leader=on_leader,
            term_wanted=lambda: self._term_wanted,
        )

        async def campaign() -> None:
            self._store_id = await self._opened(store)
            await leadership.run()

        return asyncio.ensure_future(campaign())

    async def _opened(self, store: Store) -> str:
        """Waits for the store: a coordinator that starts before its store is up is no error."""
        told = False
        while True:
            try:
                return await store.open()
            except ResilverError as error:
                if error.reason != "STORE_UNAVAILABLE":
                    raise
                if not told:
                    log.warning("waiting for the store", why=error.message)
                told = True
            await asyncio.sleep(OPEN_AGAIN_S)

    async def _lead(
        self,
        front: Front,
        agents: Agents,
        servicer: health.aio.HealthServicer,
        reign: Reign,
        leading: Callable[[], bool],
    ) -> None:
        """One reign: from reading the store to whatever ends it."""
        config = self._config
        settings = Settings(examine_timeout_ms=int(config.examine_timeout_s * 1000), resyncs_max=config.resyncs_max)
        current = CurrentReign(
            front.store, reign, agents, settings=settings, cluster=config.cluster, store_id=self._store_id
        )
        await current.load()
        front.reign = current
        telemetry.marked(term=reign.leader.term)
        self._leaders.saw(reign.leader.leader_id)
        state = health_pb2.HealthCheckResponse
        ended: ResilverError = Conflict("LEADERSHIP_LOST", "the coordinator has stopped leading")
        try:
            for name in (COORDINATOR_SERVICE, REPORTS_SERVICE):
                await servicer.set(name, state.SERVING)
            await current.run(leading)
        except ResilverError as error:
            ended = error
            raise
        finally:
            front.reign = None
            telemetry.marked(term=None)
            self._term_wanted = max(self._term_wanted, current.term_wanted)
            current.end(ended)
            for name in (COORDINATOR_SERVICE, REPORTS_SERVICE):
                await servicer.set(name, state.NOT_SERVING)

    def _reload(self) -> None:
        """SIGHUP: takes on what may be reloaded, or refuses the whole file."""
        try:
            new = load_coordinator_config(self._path)
            changed = reload_of(self._config, new)
        except ResilverError as error:
            log.warning("the configuration was not reloaded", why=error.message)
            return
        self._config = new
        telemetry.set_level(new.log_level)
        log.info("reloaded", changed=sorted(changed))


async def check(config: CoordinatorConfig) -> None:
    """`--check`: the certificate, the port and the store. Raises what an operator must mend."""
    if (tls := credentials_of(config.tls, Name(config.cluster, Role.COORDINATOR, config.name))) is not None:
        sys.stdout.write(f"ok     certificate of {tls.name}, until {tls.ends_at:%Y-%m-%d %H:%M}Z\n")
    if rpc.taken(config.listen):
        # Most often by the coordinator whose new configuration this is.
        sys.stdout.write(f"ok     {config.listen} is in use: by this coordinator, if it runs\n")
    else:
        server = rpc.make_server()
        rpc.bind(server, config.listen)
        await server.stop(None)
    store = open_store(config)
    try:
        store_id = await store.open()
        health_of = await store.health()
    finally:
        await store.close()
    answering = f"{health_of.healthy_count} of {health_of.member_count} members answer"
    sys.stdout.write(f"ok     {health_of.kind} store {store_id}, {answering}\n")


def main() -> NoReturn:
    """`resilver-coordinator --config FILE [--check]`. Leaves by `os._exit`: a store that hangs must not hold it."""
    parser = argparse.ArgumentParser(prog="resilver-coordinator", description="Coordinates mirrored volumes.")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="the TOML file")
    parser.add_argument("--check", action="store_true", help="parse, resolve and probe, then exit 0 or 2")
    parser.add_argument("--version", action="version", version=f"resilver {VERSION}")
    arguments = parser.parse_args()
    # What is reported stays: looking through all of it for cycles again and again would stop everything for a second.
    gc.set_threshold(*COLLECT_AFTER)
    code = _run(arguments.config, only_check=arguments.check)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _run(path: Path, *, only_check: bool) -> int:
    try:
        config = load_coordinator_config(path)
        telemetry.marked(coordinator=config.name)
        telemetry.configure_logs(config.log_level, config.log_format)
        if only_check:
            asyncio.run(check(config))
        else:
            # Not asyncio.run: at its end it waits for threads, and those may wait for a disk.
            asyncio.new_event_loop().run_until_complete(App(config, path).run())
    except ResilverError as error:
        sys.stderr.write(f"resilver-coordinator: {error.reason}: {error.message}\n")
        return 2 if only_check else error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        log.critical("the coordinator broke", exc_info=error)
        sys.stderr.write(f"resilver-coordinator: a fault of its own ended it ({type(error).__name__}); see the log\n")
        return 1
    return 0


if __name__ == "__main__":
    main()
