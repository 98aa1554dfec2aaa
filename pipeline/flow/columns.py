"""Frames as rows of Arrow tables, and what is large of them as columns that are not copied on their way in or out."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike

from pipeline.work import Work


def packed(parts: Sequence[np.ndarray]) -> pa.ChunkedArray:
    """A large_binary column of the bytes of each part, of any shape and dtype; a view of those that are in one piece.

    Each is a chunk of its own: to put them into one would be to copy them.
    """
    chunks = []
    for part in map(np.ascontiguousarray, parts):
        buffers = [None, pa.py_buffer(np.array([0, part.nbytes], np.int64)), pa.py_buffer(part)]
        chunks.append(pa.Array.from_buffers(pa.large_binary(), 1, buffers, null_count=0))
    return pa.chunked_array(chunks, pa.large_binary())


def unpacked(column: pa.ChunkedArray, shape: tuple[int, ...], dtype: DTypeLike) -> list[np.ndarray]:
    """The parts (n, *shape) of a packed column, n >= 0 of each, as views of it: only to be read."""
    item = math.prod(shape) * np.dtype(dtype).itemsize
    parts = []
    for chunk in column.chunks:
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        parts += [np.ndarray(((end - start) // item, *shape), dtype, data, start) for start, end in pairwise(ends)]
    return parts


def pickled(values: Iterable[Any]) -> pa.Array:
    """A large_binary column of the pickles of any values."""
    return pa.array([pickle.dumps(value) for value in values], pa.large_binary())


def unpickled(column: pa.ChunkedArray) -> list[Any]:
    """The values of a pickled column."""
    return [pickle.loads(value.as_buffer()) for value in column]


def work_columns(works: Sequence[Work], sealed: pa.ChunkedArray | None = None) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Two columns: `sealed`, taken from the works unless given, and `work` with all the rest.

    Sealed is most of a frame by far. To copy it takes longer than a process has that feeds a GPU.
    """
    if sealed is None:
        sealed = packed([np.frombuffer(work.sealed, np.uint8) for work in works])
    return {"work": pickled(replace(work, sealed=b"") for work in works), "sealed": sealed}


def works_in(table: pa.Table) -> list[Work]:
    """The works of both columns; those that were set aside in the meantime have nothing sealed."""
    works = unpickled(table["work"])
    for work, sealed in zip(works, table["sealed"]):
        if not work.error:
            work.sealed = sealed.as_py()
    return works
