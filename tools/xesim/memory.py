"""Simulated global memory, and what an argument may be besides a numpy value."""
import weakref

import numpy as np

from .native import SimError, lib

BUFFER_BASE = 0x100000000000
PAGE = 0x10000               # buffers start at its multiples, with at least one unmapped page between two


class Local:
    """A pointer argument to work-group local memory of nbytes."""
    def __init__(self, nbytes):
        self.nbytes = nbytes


class Memory:
    """Simulated global memory: numpy arrays at simulated addresses, with unmapped gaps between."""
    def __init__(self):
        self.handle = lib().xs_mem_new()
        weakref.finalize(self, lib().xs_mem_free, self.handle)
        self._next = BUFFER_BASE
        self._maps = {}          # (host address, bytes) -> (simulated address, array); the array stays alive with it

    def map(self, array, name="buffer", readonly=False):
        """Maps a C-contiguous array (or returns where it already is); gives its simulated address. Raises SimError."""
        if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
            raise SimError("only C-contiguous numpy arrays can be mapped")
        key = (array.ctypes.data, array.nbytes)
        if key not in self._maps:
            self._map_at(key, self._next, array, name, readonly or not array.flags.writeable)
            self._next += -(-max(array.nbytes, 1) // PAGE) * PAGE + PAGE
        return self._maps[key][0]

    def map_fixed(self, array, address, name, readonly):
        """Maps an array at a given simulated address, once."""
        key = (address, "fixed")
        if key not in self._maps:
            self._map_at(key, address, array, name, readonly)

    def _map_at(self, key, address, array, name, readonly):
        if lib().xs_mem_map(self.handle, address, max(array.nbytes, 1), array.ctypes.data, int(readonly), name.encode()):
            raise SimError(lib().xs_error().decode())
        self._maps[key] = (address, array)
