"""Options that all tests share."""

from __future__ import annotations

import pytest

from tests import namespace


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="accept what was found as the new golden text")


def pytest_configure() -> None:
    """What the tests mount is gone with them, also after a kill."""
    namespace.enter()
