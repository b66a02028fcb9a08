"""Each test once for every kind of backend, in a place of its own on file systems that are made once.

A module may say `SHAPE = "blocks"` or `"stream"` if it is about one shape, `DISTINCT = True` if kinds that differ only
in how contents are compared need not both run, and `BY_CALLS = True` if it makes a backend's calls fail. A test that
asks for `use` runs once for each way of use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.agent.backends.adapter import Ground, Kind, Place, Replica
from tests.agent.backends.registry import KINDS
from tests.agent.backends.transfer import close_stages


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" not in metafunc.fixturenames:
        return
    module: Any = metafunc.module
    kinds = [kind for kind in KINDS if getattr(module, "SHAPE", kind.shape) == kind.shape]
    if getattr(module, "BY_CALLS", False):
        kinds = [kind for kind in kinds if kind.by_calls]
    if getattr(module, "DISTINCT", False):
        kinds = [kind for kind in kinds if not kind.alike]
    if "use" in metafunc.fixturenames:
        every = [
            pytest.param(kind, use, id=f"{kind.name}-{use.name}", marks=_marks(kind))
            for kind in kinds
            for use in kind.uses
        ]
        metafunc.parametrize(("kind", "use"), every)
        return
    metafunc.parametrize("kind", [pytest.param(kind, id=kind.name, marks=_marks(kind)) for kind in kinds])


def _marks(kind: Kind) -> list[pytest.MarkDecorator]:
    reason = kind.available()
    return [pytest.mark.skip(reason=reason)] if reason else []


@pytest.fixture
def kind() -> None:
    """Given by `pytest_generate_tests`: here, so that nobody else's fixture of that name is taken."""


@pytest.fixture(scope="session")
def grounds() -> Iterator[Callable[[Kind], Ground]]:
    """Makes a kind's ground at first use, and keeps all of them until the end."""
    with contextlib.ExitStack() as stack:
        made: dict[str, Ground] = {}

        def ground(kind: Kind) -> Ground:
            if kind.name not in made:
                made[kind.name] = stack.enter_context(kind.ground())
            return made[kind.name]

        yield ground


@pytest.fixture
def place(grounds: Callable[[Kind], Ground], kind: Kind) -> Iterator[Place]:
    with grounds(kind).place() as made:
        yield made
        close_stages()


@pytest.fixture
def replica(place: Place) -> Replica:
    return place.replica("a")


@pytest.fixture
def other(place: Place) -> Replica:
    """A second node's replica."""
    return place.replica("b")


@pytest.fixture
def third(place: Place) -> Replica:
    return place.replica("c")


@pytest.fixture
def small(kind: Kind) -> Iterator[Ground]:
    """A ground of its own, which a test may fill."""
    with kind.ground(kind.full_size_bytes) as ground:
        yield ground
        close_stages()
