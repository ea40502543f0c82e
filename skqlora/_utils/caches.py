"""The registry of the caches of this process that a user can ask to be emptied."""

import functools
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_clears: list[Callable[[], None]] = []


def register_cache(clear: Callable[[], None]) -> None:
    """Let `clear_caches` call a function that empties a cache."""
    _clears.append(clear)


def clear_caches() -> None:
    """Empty every registered cache of the process."""
    for clear in _clears:
        clear()


def registered_lru_cache(
    maxsize: int,
) -> "Callable[[Callable[..., T]], functools._lru_cache_wrapper[T]]":
    """Make a decorator like `functools.lru_cache`, whose cache `clear_caches` empties too."""

    def decorate(function: Callable[..., T]) -> "functools._lru_cache_wrapper[T]":
        cached = functools.lru_cache(maxsize=maxsize)(function)
        register_cache(cached.cache_clear)
        return cached

    return decorate
