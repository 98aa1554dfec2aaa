"""The memory that a process takes and frees again and again: for every block of frames, or layer of a network."""

from __future__ import annotations

import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Names of glibc's mallopt."""

_LARGEST_BYTES = 32 << 20
"""Arrays up to this size are in the heap: as large as glibc allows."""

BLOCK_BYTES = 256 << 20
"""Free memory that is kept from one block of frames to the next; the largest blocks take about 150 MB."""


@cache
def keep_freed_memory(kept_bytes: int = BLOCK_BYTES, one_arena: bool = False) -> None:
    """Let this process keep up to `kept_bytes` of what it frees for what it takes next.

    Else it gives back the arrays of one block and gets those of the next page by page, by an interrupt for each, and
    cleared: Ray's tasks took 1.7 times as long to read, cut, paste and write, the network on a CPU a fifth more. What
    threads free is given back all the same, unless all of them share `one_arena`. Changes nothing where the C library
    is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_TRIM_THRESHOLD, kept_bytes)
    mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)
    if one_arena:
        mallopt(_ARENA_MAX, 1)
