"""The memory that a process takes and frees for every block of frames."""

from __future__ import annotations

import ctypes
from functools import lru_cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of glibc's mallopt."""

_KEPT_BYTES = 256 << 20
"""Free memory at the end of the heap above which it is given back; the largest blocks take about 150 MB."""

_LARGEST_BYTES = 32 << 20
"""Arrays up to this size are in the heap: as large as glibc allows."""


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Let this process keep what it frees for what it takes next. Changes nothing where the C library is not glibc.

    Else it gives back the arrays of one block and gets those of the next page by page, by an interrupt for each, and
    cleared: Ray's tasks took 1.7 times as long to read, cut, paste and write.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)
