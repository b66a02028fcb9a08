"""Records that outlive a coordinator: one Protocol (base.py), an adapter for each technology."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from resilver.config import CoordinatorConfig, parse_store
from resilver.errors import Invalid

if TYPE_CHECKING:
    from coordinator.store.base import Store

__all__ = ["open_store"]


def open_store(config: CoordinatorConfig) -> Store:
    """The store that a configuration names, not yet connected: `open` does that. Raises Invalid for a wrong URL."""
    try:
        where = parse_store(config.store)
    except ValueError as error:
        raise Invalid("CONFIG_INVALID", f"store: {error}", field="store") from error
    # Only the adapter in use is loaded: the other one's libraries would cost memory and time for nothing.
    if isinstance(where, Path):
        from coordinator.store.sqlite import SqliteStore  # noqa: PLC0415 - see above

        return SqliteStore(where, config.cluster, config.lease_ttl_s)
    from coordinator.store.etcd import EtcdStore  # noqa: PLC0415 - see above

    return EtcdStore(where, config.cluster, config.etcd, config.lease_ttl_s)
