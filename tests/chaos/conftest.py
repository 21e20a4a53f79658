"""Fixtures of single faults, taken from the acceptance tests."""

from tests.acceptance.conftest import fleet, texts

__all__ = ["fleet", "texts"]
