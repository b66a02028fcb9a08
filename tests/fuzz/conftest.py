"""A coordinator as a process, as the tests of its services have it."""

from tests.coordinator.conftest import coordinator

__all__ = ["coordinator"]
