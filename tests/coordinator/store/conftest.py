"""Both stores, for real: an etcd of one member for the whole run, and a file."""

from __future__ import annotations

import contextlib
import itertools

import pytest

from coordinator.store import open_store
from resilver.config import CoordinatorConfig, EtcdConfig
from tests import etcd

_clusters = itertools.count()


@pytest.fixture(scope="session")
def one_etcd(tmp_path_factory):
    assert etcd.available(), "these tests want Debian's etcd-server"
    with etcd.running(tmp_path_factory.mktemp("etcd")) as running:
        yield running


@pytest.fixture
def one_etcd_of_its_own(tmp_path):
    with etcd.running(tmp_path) as running:
        yield running


@pytest.fixture
def three_members(tmp_path):
    with etcd.running(tmp_path, 3) as running:
        yield running


def config_of(url, cluster="demo", timeout_s=2.0, lease_ttl_s=10, **etcd_keys):
    return CoordinatorConfig(
        name="c1",
        cluster=cluster,
        store=url,
        lease_ttl_s=lease_ttl_s,
        etcd=EtcdConfig(timeout_s=timeout_s, **etcd_keys),
    )


@pytest.fixture
async def connect():
    """Opens stores and closes them at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def opened(url, **keys):
            store = open_store(config_of(url, **keys))
            stack.push_async_callback(store.close)
            await store.open()
            return store

        yield opened


@pytest.fixture(params=["etcd", "sqlite"])
def url(request, tmp_path):
    """A store that nobody has used; with etcd, the cluster's name in `cluster` makes it one."""
    if request.param == "sqlite":
        return f"sqlite://{tmp_path}/store.db"
    return request.getfixturevalue("one_etcd").url


@pytest.fixture
def cluster():
    return f"demo{next(_clusters)}"


@pytest.fixture
def another(connect, url, cluster):
    """A coordinator's own connection to the one store."""

    async def opened(**keys):
        return await connect(url, cluster=cluster, **keys)

    return opened
