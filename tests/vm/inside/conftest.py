"""A pair of replicas with names of their own for each test, in one thin pool for the machine."""

from __future__ import annotations

import itertools

import pytest

from tests.vm.inside.node import Node, make_group

_numbers = itertools.count(1)


@pytest.fixture
def number() -> int:
    make_group()
    return next(_numbers)


@pytest.fixture
def node(number: int) -> Node:
    return Node(f"a{number}")


@pytest.fixture
def other(number: int) -> Node:
    """A second node's replica, in the same pool."""
    return Node(f"b{number}")
