"""A cache of tensors by key that holds a bounded number of bytes, the last used ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class TensorCache(Generic[Key, Value]):
    """Holds values and forgets the least recently used when they grow too many.

    Args:
        most_bytes: Bytes to hold; the newest value stays however large it is.
        size: Bytes of a value.
    """

    def __init__(self, most_bytes: int, size: Callable[[Value], int]) -> None:
        self._most_bytes = most_bytes
        self._size = size
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def find(self, key: Key) -> Value | None:
        """The value of a key if it is still held, which makes it the last used one."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: Key, value: Value) -> None:
        """Hold a value, and forget old ones that are too much beside it."""
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > 1 and self._held() > self._most_bytes:
            self._values.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()

    def _held(self) -> int:
        return sum(map(self._size, self._values.values()))
