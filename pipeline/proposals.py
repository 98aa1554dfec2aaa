"""Coarse mask -> boundary -> the boxes of the patches that cover it (paper, section 3.1).

All work is confined to the mask's bounding box and linear in its area and boundary length: the boxes are equal squares,
so whether one suppresses another depends on the offset between their centres alone, and suppression is stamping a
precomputed footprint into a bitmap. Only four strengths exist, so the order among equals decides how many boxes remain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

PATCH_PX = 64
"""Side of a boundary patch in frame pixels (paper, section 3.1)."""

SUPPRESSED = 255
"""Closeness of a candidate whose box overlaps a kept one by more than the threshold."""

_BLOCK = 1024
"""Candidates among which a tie order chooses; bounded so that the time stays linear however long the boundary."""

TieOrder = Callable[[np.ndarray], int]
"""Which of the candidates of one strength to keep next.

Takes their closeness to the kept boxes, (N,) uint8, N > 0, in row-major order, and returns an index into it: that of a
SUPPRESSED one only where all are. Closeness is 0 out of reach of every kept box, else grows from 1 to 254 as the
nearest comes nearer (see `_closeness`).
"""


def row_major(closeness: np.ndarray) -> int:
    """Top to bottom, left to right: what a stable sort of the reference's candidates gives."""
    return int((closeness != SUPPRESSED).argmax())


def longest_stride(closeness: np.ndarray) -> int:
    """As far from the kept boxes as can be while still in reach of one; the first candidate where none is.

    Row-major order walks a contour in the shortest steps that suppression allows, which packs it with the most boxes.
    This takes the longest that leave neither room for a box in between nor a gap in the cover.
    """
    # 0 wraps round to 255, beyond the suppressed, so that the minimum is the least close of those in reach.
    order = closeness - np.uint8(1)
    chosen = order.argmin()
    return int(chosen if order[chosen] < SUPPRESSED - 1 else order.argmax())


def boundary_strength(mask: np.ndarray) -> np.ndarray:
    """How evenly the 3x3 window around each pixel is split between object and background.

    `mask` is (H, W) uint8 or bool, any non-zero value being the object; pixels outside the array count as background.
    Returns (H, W) uint8 in 0..4, `min(9 - s, s)` for a window with s object pixels; non-zero on a band two pixels wide.
    """
    binary = mask.astype(bool).view(np.uint8)  # of a bool array `!= 0` makes one of 8-byte integers first
    s = cv2.boxFilter(binary, -1, (3, 3), normalize=False, borderType=cv2.BORDER_CONSTANT)
    return np.minimum(s, 9 - s, out=s)


def _framed(array: np.ndarray, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """As np.pad with zeros, which takes a third of the time of a proposal."""
    height, width = array.shape
    framed = np.zeros((top + height + bottom, left + width + right), array.dtype)
    framed[top : top + height, left : left + width] = array
    return framed


@lru_cache(maxsize=64)
def _closeness(nms_threshold: float, patch_px: int) -> np.ndarray:
    """(2r+1, 2r+1) uint8, what a kept box in the centre means to candidates at each offset, r <= `patch_px`.

    `SUPPRESSED` where the two boxes overlap by more than the threshold; else 1 to 254, by the overlap of either with a
    box half-way between them, if that box would be suppressed and the two leave no gap along an axis; else 0.
    """
    offset = np.abs(np.arange(-patch_px, patch_px + 1))

    def overlap_and_iou(axis_offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        overlap = (patch_px - axis_offset)[:, None] * (patch_px - axis_offset)[None, :]
        return overlap, overlap / (2 * patch_px**2 - overlap)

    # Half a pixel more than half-way, since the candidates between the two are on a band two pixels wide.
    halfway, halfway_iou = overlap_and_iou((offset + 1) / 2)
    closeness = np.where(halfway_iou > nms_threshold, halfway * 254 / patch_px**2, 0).astype(np.uint8)
    closeness[overlap_and_iou(offset)[1] > nms_threshold] = SUPPRESSED
    margin = int(closeness[patch_px].nonzero()[0][0])
    closeness = closeness[margin : len(offset) - margin, margin : len(offset) - margin]
    closeness.flags.writeable = False
    return closeness


def suppress(strength: np.ndarray, nms_threshold: float, patch_px: int, tie_order: TieOrder) -> np.ndarray:
    """Greedy non-maximum suppression of the boxes centred on every pixel of non-zero strength, strongest first.

    `strength` is (H, W) uint8 in 0..4. A box is dropped when its IoU with a kept one exceeds `nms_threshold`. Returns
    the kept centres (N, 2) int32 as x, y in the order they were kept.
    """
    stamp = _closeness(nms_threshold, patch_px)
    reach = len(stamp) // 2
    height, width = strength.shape
    boundary = np.flatnonzero(strength != 0)
    levels = strength.ravel()[boundary]
    # Stamps stick out of the array, so that it is framed, and all places are counted in the framed one.
    closeness = np.zeros((height + 2 * reach, width + 2 * reach), np.uint8)
    flat, row = closeness.ravel(), closeness.shape[1]
    boundary += (boundary // width * 2 + row) * reach + reach
    kept: list[tuple[int, int]] = []
    for level in (4, 3, 2, 1):
        candidates = boundary[levels == level]
        for start in range(0, len(candidates), _BLOCK):
            some = candidates[start : start + _BLOCK]
            while True:
                near = flat[some]
                chosen = tie_order(near)
                if near[chosen] == SUPPRESSED:
                    break
                y, x = divmod(int(some[chosen]), row)
                window = closeness[y - reach : y + reach + 1, x - reach : x + reach + 1]
                np.maximum(window, stamp, out=window)
                kept.append((x - reach, y - reach))
    return np.array(kept, np.int32).reshape(-1, 2)


def move_into_frame(boxes: np.ndarray, width: int, height: int, parity: bool = False) -> np.ndarray:
    """Shift boxes (N, 4) that stick out of the frame back into it, unchanged in size.

    A frame narrower than a patch keeps its boxes at 0, sticking out at the right or bottom. With `parity` the
    reference's two slips are kept: a box that ends exactly at the border is moved as well, and moved boxes stop one
    pixel short of it, so that the last column and row are never refined.
    """
    boxes = boxes.copy()
    for axis, extent in ((0, width), (1, height)):
        side = boxes[:, axis + 2] - boxes[:, axis]
        start = np.maximum(boxes[:, axis], 0)
        if parity and extent > side.max(initial=0):
            start = np.where(start + side >= extent, extent - 1 - side, start)
        else:
            start = np.maximum(np.minimum(start, extent - side), 0)
        boxes[:, axis], boxes[:, axis + 2] = start, start + side
    return boxes


def propose(
    coarse: np.ndarray,
    origin: tuple[int, int],
    frame_size: tuple[int, int],
    nms_threshold: float,
    *,
    patch_px: int = PATCH_PX,
    tie_order: TieOrder | None = None,
    parity: bool = False,
) -> np.ndarray:
    """The boxes of the patches to refine for one instance.

    `coarse` is the coarse mask cut to its bounding box, (h, w) uint8 or bool, whose top left pixel lies at `origin` =
    (x, y) in a frame of `frame_size` = (width, height). Returns (N, 4) int32 x1, y1, x2, y2, half-open, N = 0 for an
    empty mask. By default boxes that coincide after the move into the frame are returned once; `parity` keeps both this
    and the border handling as the reference has them. `tie_order` is `longest_stride` unless given; with `parity`,
    `row_major`.
    """
    if tie_order is None:
        tie_order = row_major if parity else longest_stride
    (x0, y0), (width, height) = origin, frame_size
    # The band reaches one pixel beyond the mask's box, but never beyond the frame.
    left, top = min(x0, 1), min(y0, 1)
    right = min(width - x0 - coarse.shape[1], 1)
    bottom = min(height - y0 - coarse.shape[0], 1)
    strength = boundary_strength(_framed(coarse, top, bottom, left, right))
    centres = suppress(strength, nms_threshold, patch_px, tie_order) + np.array([x0 - left, y0 - top], np.int32)
    half = patch_px // 2
    boxes = np.concatenate([centres - half, centres - half + patch_px], axis=1)
    boxes = move_into_frame(boxes, width, height, parity)
    if not parity:
        boxes = np.array(list(dict.fromkeys(map(tuple, boxes.tolist()))), np.int32).reshape(-1, 4)
    return boxes
