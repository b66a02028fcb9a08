"""A cluster of processes with certificates, which all of the attempts are made on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.trust.stage import Stage


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("trust"))
    try:
        made.start()
        yield made
    finally:
        made.cluster.close()
