"""Values that are made once, whichever threads ask for them at the same time.

functools.cache runs a function as often as threads come before the first of them has its value. Here they wait for it.
"""
from __future__ import annotations

import functools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class AfterFork:
    """`_lock` is held for moments; in the child of a fork nobody holds it, whoever did when the process was copied.

    A `with` on a lock itself, not on a class of ours, cannot be interrupted between taking the lock and entering the block.
    """

    def __init__(self):
        self._after_fork()
        _alive.add(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()


_alive: weakref.WeakSet[AfterFork] = weakref.WeakSet()


def _free_locks() -> None:
    for each in list(_alive):
        each._after_fork()


os.register_at_fork(after_in_child=_free_locks)


class _Entry(Generic[Value]):
    """A value, an error, or neither: whoever takes the lock then makes it."""

    def __init__(self):
        self.making = threading.Lock()
        self.value: Value | None = None
        self.made = False
        self.error: Exception | None = None


class Once(AfterFork, Generic[Value]):
    """Key -> value, made by the first thread that asks. limit: the least recently used leave beyond it."""

    def __init__(self, limit: int | None = None):
        self._entries: OrderedDict[Hashable, _Entry[Value]] = OrderedDict()
        self._limit = limit
        super().__init__()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of this key; what `make` returns, for one of the threads that ask meanwhile.

        An Exception of `make` reaches all that wait for it; who comes later tries again. A KeyboardInterrupt is the
        interrupted thread's own: another one that waits tries again.
        """
        if self._limit is None:     # no order to keep
            entry = self._entries.get(key)
            if entry is not None and entry.made:
                return entry.value
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = _Entry()
                if self._limit is not None and len(self._entries) > self._limit:
                    self._entries.popitem(last=False)
            else:
                self._entries.move_to_end(key)
        if entry.made:
            return entry.value
        with entry.making:
            if entry.error is not None:
                raise entry.error
            if not entry.made:
                try:
                    entry.value = make()
                except Exception as error:
                    self._forget(key, entry)
                    entry.error = error
                    raise
                entry.made = True
            return entry.value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _forget(self, key: Hashable, entry: _Entry[Value]) -> None:
        with self._lock:
            if self._entries.get(key) is entry:
                del self._entries[key]

    def _after_fork(self) -> None:
        super()._after_fork()
        for key, entry in list(self._entries.items()):     # what another thread was making, it makes no more
            if not entry.made:
                del self._entries[key]


def once(function: Callable[..., Value]) -> Callable[..., Value]:
    """functools.cache for what is costly or has effects: threads that come together share one call.

    Positional arguments only. `cache_clear()` forgets all values.
    """
    values: Once[Value] = Once()

    @functools.wraps(function)
    def cached(*arguments: Hashable) -> Value:
        return values.get(arguments, lambda: function(*arguments))

    cached.cache_clear = values.clear
    return cached
