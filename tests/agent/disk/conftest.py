"""The file systems of the backends' tests."""

from __future__ import annotations

from tests.agent.backends.conftest import kind, mounts, place  # noqa: F401  # fixtures
