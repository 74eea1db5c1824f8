"""A token bucket for each of many keys: so much at once, and so much a second after that."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Buckets(Generic[Key]):
    """Each key may take `burst` tokens at once and gets `rate` new ones a second; the times come from the caller."""

    def __init__(self, rate: float, burst: float, max_keys: int = 100_000) -> None:
        self._rate, self._burst, self._max_keys = rate, burst, max_keys
        self._buckets: dict[Key, tuple[float, float]] = {}

    def take(self, key: Key, now: float) -> bool:
        """Take one token of the key's, if it has one."""
        tokens = self._tokens(key, now)
        if tokens < 1:
            return False
        if key not in self._buckets and len(self._buckets) >= self._max_keys:
            self._drop_full(now)
        self._buckets[key] = (tokens - 1, now)
        return True

    def wait(self, key: Key, now: float) -> float:
        """Seconds until the key has a token again."""
        return max(0.0, (1 - self._tokens(key, now)) / self._rate)

    def _tokens(self, key: Key, now: float) -> float:
        tokens, since = self._buckets.get(key, (self._burst, now))
        return min(self._burst, tokens + self._rate * (now - since))

    def _drop_full(self, now: float) -> None:
        """A key whose bucket is full again need not be remembered."""
        self._buckets = {
            key: bucket for key, bucket in self._buckets.items() if self._tokens(key, now) < self._burst
        }
        if len(self._buckets) >= self._max_keys:
            self._buckets.clear()
