"""Fixtures of single faults, which are those of whole jobs."""

from tests.acceptance.conftest import fleet, texts

__all__ = ["fleet", "texts"]
