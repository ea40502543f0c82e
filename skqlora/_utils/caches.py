"""A list of all caches that this process keeps for later calls, so that one call empties them."""

import functools
from collections.abc import Callable
from typing import Any

_clears: list[Callable[[], None]] = []


def register_cache(clear: Callable[[], None]) -> None:
    """Register a function that empties a cache, to be called by `clear_caches`."""
    _clears.append(clear)


def clear_caches() -> None:
    """Empty every registered cache of the process."""
    for clear in _clears:
        clear()


def registered_lru_cache(maxsize: int) -> Callable[[Callable[..., Any]], Any]:
    """Make a decorator like `functools.lru_cache` whose cache `clear_caches` empties too."""

    def decorate(function: Callable[..., Any]) -> Any:
        cached = functools.lru_cache(maxsize=maxsize)(function)
        register_cache(cached.cache_clear)
        return cached

    return decorate
