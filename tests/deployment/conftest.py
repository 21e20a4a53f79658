"""Fixtures of the deployment tests: the fleet of the acceptance tests."""

from tests.acceptance.conftest import fleet, texts

__all__ = ["fleet", "texts"]
