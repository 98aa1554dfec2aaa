"""COCO run lengths over whole frames, read into and written from masks cut to their bounding box.

A full-frame mask is never built: a run length string is parsed, checked against the frame and painted into the box
alone, which for a small object in a 2048x1024 frame is a hundredth of the pixels.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from pipeline.records import InputError

MAX_GROUPS = 7
"""5-bit groups of one compressed run; 35 bits hold any run of an image that pycocotools can count (32 bits)."""

MAX_OUTLINE = 1_000_000
"""Longest outline in pixels of an object; pycocotools allocates some 100 bytes for each before it sees the frame."""

SHORTEST_OUTLINE = 100
"""Pixels as which a shorter polygon counts towards MAX_OUTLINE, being some work however short it is."""

_GROUP_LIMITS = 1 << np.arange(4, 5 * MAX_GROUPS, 5)


def encode(mask: np.ndarray, origin: tuple[int, int], width: int, height: int) -> str:
    """The compressed COCO counts of a frame of `width` x `height` whose only object is `mask`.

    `mask` is (h, w) bool with its top left pixel at `origin` (x, y), inside the frame; (0, 0) for an empty mask.
    The string is the one that pycocotools makes of the full frame.
    """
    if mask.size == 0:
        return _compress(np.array([height * width]))
    box_height, box_width = mask.shape
    # A zero below every column (and one in front of all) ends each run at its column, as most do in the frame.
    padded = np.zeros(box_width * (box_height + 1) + 1, np.uint8)
    padded[1:].reshape(box_width, box_height + 1)[:, :box_height] = _transposed(mask)
    column, row = np.divmod(np.flatnonzero(padded[1:] != padded[:-1]), box_height + 1)
    edges = (column + origin[0]) * height + row + origin[1]
    if box_height == height and len(edges) > 2:
        # Only a box as high as the frame has runs that go on at the top of the next column.
        joined = np.flatnonzero(edges[2::2] == edges[1:-1:2])
        edges = np.delete(edges, np.concatenate([2 * joined + 1, 2 * joined + 2]))
    if len(edges) == 0:
        return _compress(np.array([height * width]))
    runs = np.diff(np.concatenate([[0], edges, [height * width]]))
    return _compress(runs if runs[-1] else runs[:-1])


def is_empty(counts: str | list[int]) -> bool:
    """Whether compressed or plain counts are of a mask without pixels, as `encode` and pycocotools write them."""
    if isinstance(counts, list):
        return len(counts) < 2
    # A character that ends a run is below "P", and only the last is one.
    return all(character >= "P" for character in counts[:-1])


def decode(counts: str | list[int], size: Any, width: int, height: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The mask (h, w) bool cut to its bounding box, and the box's (x, y), of compressed or plain COCO counts.

    `size` is what the file says, [height, width]. InputError where it is not the frame's, or where the counts are no
    run lengths of just that many pixels; nothing of the frame's size is allocated before that is known.
    """
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise InputError(f"mask size {size!r:.60}, expected [height, width] = [{height}, {width}]")
    # Empty runs cover no pixel, so that their number has no bound but this; real ones are some, and not next to others.
    if isinstance(counts, str | list) and len(counts) > 2 * (height * width + 32):
        raise InputError(f"RLE counts of length {len(counts)}, longer than any of {height} x {width} pixels")
    runs = _parse(counts) if isinstance(counts, str) else _check_list(counts)
    if len(runs) and runs.min() < 0:
        raise InputError(f"RLE counts with a run of {runs.min()} pixels, expected none below 0")
    # The longest run is looked at by itself so that the sum cannot overflow.
    if len(runs) == 0 or runs.max() > height * width or runs.sum() != height * width:
        total = sum(runs.tolist())
        raise InputError(f"RLE counts that cover {total} pixels, expected {height} x {width} = {height * width}")
    return _paint(runs, height)


def of_segmentation(segmentation: Any, width: int, height: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The mask of a COCO `segmentation`, which is run lengths or polygons, as `decode` gives it; or InputError."""
    if isinstance(segmentation, dict):
        return decode(segmentation.get("counts"), segmentation.get("size"), width, height)
    return from_polygons(segmentation, width, height)


def from_polygons(polygons: Any, width: int, height: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The union of COCO polygons, each [x1, y1, x2, y2, ...] in pixels, as `decode` gives it; or InputError."""
    if not isinstance(polygons, list) or not polygons:
        raise InputError("expected RLE or a list of polygons [[x1, y1, x2, y2, x3, y3, ...], ...]")
    outline = 0.0
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise InputError("polygon expected to be a list of at least 3 points x1, y1, x2, y2, x3, y3, ...")
        if not all(type(value) in (int, float) and abs(value) <= MAX_OUTLINE for value in polygon):
            raise InputError(f"polygon expected to have numbers up to {MAX_OUTLINE} as coordinates")
        # pycocotools walks the outline pixel by pixel, in and out of the frame: its length is what it costs.
        points = np.array(polygon, float).reshape(-1, 2)
        outline += max(SHORTEST_OUTLINE, np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())
        if outline > MAX_OUTLINE:
            raise InputError(f"polygons with an outline of more than {MAX_OUTLINE} pixels")
    merged = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return decode(merged["counts"].decode("ascii"), [height, width], width, height)


def _check_list(counts: Any) -> np.ndarray:
    if not isinstance(counts, list) or not all(type(run) is int and abs(run) < 1 << 62 for run in counts):
        raise InputError("RLE counts expected to be a string or a list of integers")
    return np.array(counts, np.int64)


def _parse(counts: str) -> np.ndarray:
    """The run lengths, (n,) int64, of a compressed string; not yet checked against any frame.

    Groups of 5 bits, low ones first, whose 6th bit says that more follow and whose last one has the sign. From the
    fourth run on the number is the difference to the run two before.
    """
    try:
        codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise InputError("RLE counts with characters that are not ASCII") from None
    if len(codes) == 0:
        return codes
    if codes.min() < 0 or codes.max() > 63:
        raise InputError("RLE counts with characters that no run length is written with")
    ends = np.flatnonzero(codes < 32)
    if len(ends) == 0 or ends[-1] != len(codes) - 1:
        raise InputError("RLE counts that end within a run length")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > MAX_GROUPS:
        raise InputError("RLE counts with a run length that no image has")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 31) << shifts, starts)
    values -= (codes[ends] >> 4 & 1) << (5 * lengths)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _compress(runs: np.ndarray) -> str:
    values = runs.copy()
    values[3:] -= runs[1:-2]
    groups = 1 + np.searchsorted(_GROUP_LIMITS, values ^ (values >> 63), side="right")
    ends = np.cumsum(groups)
    shifts = 5 * (np.arange(ends[-1]) - np.repeat(ends - groups, groups))
    codes = np.repeat(values, groups) >> shifts & 31 | 32
    codes[ends - 1] &= 31
    return (codes + 48).astype(np.uint8).tobytes().decode("ascii")


def _paint(runs: np.ndarray, height: int) -> tuple[np.ndarray, tuple[int, int]]:
    edges = np.cumsum(runs[: len(runs) // 2 * 2])
    starts, stops = edges[::2], edges[1::2]
    filled = starts < stops
    if not filled.all():
        starts, stops = starts[filled], stops[filled]
    if len(starts) == 0:
        return np.zeros((0, 0), bool), (0, 0)
    first_column, first_row = np.divmod(starts, height)
    last_column, last_row = np.divmod(stops - 1, height)
    left, columns = int(first_column[0]), int(last_column[-1] - first_column[0]) + 1
    # A run over more than one column goes through the bottom and the top row.
    spans = bool(np.any(first_column != last_column))
    top, rows = (0, height) if spans else (int(first_row.min()), int(last_row.max() - first_row.min()) + 1)
    edges = np.zeros(2 * len(starts) + 2, np.int64)
    edges[1:-1:2] = (first_column - left) * rows + first_row - top
    edges[2:-1:2] = (last_column - left) * rows + last_row - top + 1
    edges[-1] = rows * columns
    painted = np.repeat(np.arange(len(edges) - 1) % 2 == 1, np.diff(edges))
    return _transposed(painted.reshape(columns, rows)), (left, top)


def _transposed(mask: np.ndarray) -> np.ndarray:
    """A mask (w, h) bool as (h, w), in several times less time than numpy takes."""
    return cv2.transpose(mask.view(np.uint8)).view(bool)
