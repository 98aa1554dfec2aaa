"""Patches that lie in several arrays, taken as if they lay in one: joining them would cost a copy of all."""

from __future__ import annotations

import numpy as np


class Parts:
    """Arrays of patches (n, P, P, 4) uint8, one after the other; at least one array, which may be empty."""

    def __init__(self, *parts: np.ndarray) -> None:
        self.side = parts[0].shape[1]
        self._parts = [part for part in parts if len(part)]
        self._starts = np.cumsum([0, *map(len, self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def copy(self, start: int, out: np.ndarray) -> int:
        """Fill `out` (N, P, P, 4) with the patches from number `start` on, as far as they go; returns their number."""
        k, count = int(np.searchsorted(self._starts, start, side="right")) - 1, 0
        while count < len(out) and k < len(self._parts):
            some = self._parts[k][start + count - self._starts[k] :][: len(out) - count]
            out[count : count + len(some)] = some
            count += len(some)
            k += 1
        return count
