"""The fleet of the acceptance tests."""

from tests.acceptance.conftest import fleet, texts

__all__ = ["fleet", "texts"]
