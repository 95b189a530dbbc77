"""Fixtures of the tests of the operation."""

from tests.orchestration.homes import bootstrapped, empty_store, store

__all__ = ["bootstrapped", "empty_store", "store"]
