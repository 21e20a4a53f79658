"""Iteration ahead: the next value is made in a thread while the caller works on the one before."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")


def ahead(values: Iterator[T]) -> Iterator[T]:
    """Yield values; each is made in a thread, while the caller works on the one before."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:

        def begin() -> "Future[T | object]":
            return thread.submit(copy_context().run, next, values, end)  # type: ignore[arg-type]

        following = begin()
        while (value := following.result()) is not end:
            following = begin()
            yield value  # type: ignore[misc]
