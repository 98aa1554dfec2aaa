"""One instance made ready for a gallery: small pictures and the contours in them, a few ten kilobytes in all."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.metrics.overlap import Box, mask_within
from pipeline.records import Instance
from pipeline.report.contours import choose_windows, relative_path, trace

OVERVIEW_PX = 900
"""Longest side of an overview; what is larger is scaled down."""
OVERVIEW_BYTES = 28_000
"""An overview's JPEG is scaled down until it is no larger: a hundred cards then make a page of a few megabytes."""
SMALLEST_WINDOW_PX = 96
MARGIN = 0.2
"""Surroundings shown on each side of an instance, as a share of its longer side."""
FLATTEST = 0.6
"""An overview's shorter side is at least this share of its longer one, as far as the frame goes."""
CLOSE_UP_PX = 64
"""Side of a close-up in pixels of the frame: that of a patch, or more as CLOSE_UP_SHARE says."""
CLOSE_UP_SHARE = 1 / 16
"""A close-up has at least this share of the overview's longer side: in large photographs contours lie far apart."""
CLOSE_UPS = 2
PATH_CORNERS = 4000
"""Most corners of one contour; a mask of more is drawn on a coarser grid."""
_PAD_PX = 8


@dataclass(frozen=True, slots=True)
class View:
    """A window of a frame as JPEG, and the masks in it as SVG path data in pixels of the JPEG."""

    box: Box
    """The window in pixels of the frame."""
    width: int
    height: int
    jpeg: bytes
    coarse: str
    refined: str
    truth: str | None
    """None where there is no ground truth."""


@dataclass(frozen=True, slots=True)
class Card:
    """One instance in a gallery: texts and views, small enough to be made on a worker and sent around."""

    label: str
    note: str
    overview: View
    close_ups: tuple[View, ...]
    """Where the masks differ the most, most first; none where they do not."""


def make_card(
    label: str, note: str, image: np.ndarray, coarse: Instance, refined: Instance, truth: Instance | None = None
) -> Card:
    """The card of one instance in its whole frame, `image` (H, W, 3) uint8 RGB.

    Close-ups show where refined differs from coarse, or from the truth where nothing has changed.
    """
    size = image.shape[:2]
    sides = [coarse, refined] + ([truth] if truth else [])
    box = _window(sides, size)
    x1, y1, x2, y2 = box
    masks = [mask_within(side, box) for side in sides]
    change = masks[0] ^ masks[1]
    if truth and not change.any():
        change = masks[0] ^ masks[2]
    close_ups = []
    side_px = max(CLOSE_UP_PX, round(CLOSE_UP_SHARE * max(x2 - x1, y2 - y1)))
    for left, top, right, bottom in choose_windows(change, side_px, CLOSE_UPS):
        inside = np.s_[top:bottom, left:right]
        place = Box(x1 + left, y1 + top, x1 + right, y1 + bottom)
        close_ups.append(_view(place, image[y1:y2, x1:x2][inside], [mask[inside] for mask in masks]))
    return Card(label, note, _view(box, image[y1:y2, x1:x2], masks), tuple(close_ups))


def _window(sides: list[Instance], size: tuple[int, int]) -> Box:
    """The part of a frame, `size` = (height, width), that shows all masks with their surroundings."""
    boxes = np.array([one.bbox for one in sides if one.mask.size] or [[0, 0, size[1], size[0]]])
    start, stop = boxes[:, :2].min(axis=0), (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    wanted = stop - start + 2 * MARGIN * (stop - start).max()
    wanted = np.maximum(wanted, max(SMALLEST_WINDOW_PX, FLATTEST * wanted.max()))
    whole = np.array(size[::-1])
    side = np.minimum(np.ceil(wanted), whole).astype(int)
    start = np.clip((start + stop - side) // 2, 0, whole - side)
    return Box(*start.tolist(), *(start + side).tolist())


def _view(box: Box, image: np.ndarray, masks: list[np.ndarray]) -> View:
    jpeg, width, height = _jpeg(image)
    paths = [_path(mask, width, height) for mask in masks]
    return View(box, width, height, jpeg, paths[0], paths[1], paths[2] if len(paths) > 2 else None)


def _jpeg(image: np.ndarray) -> tuple[bytes, int, int]:
    """The image (H, W, 3) uint8 RGB as JPEG within the bounds, and the width and height it has there."""
    sides = np.array(image.shape[1::-1])
    scale = min(1.0, OVERVIEW_PX / sides.max())
    while True:
        width, height = (int(v) for v in np.maximum(1, np.rint(sides * scale)))
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA) if scale < 1 else image
        data = cv2.imencode(".jpg", np.ascontiguousarray(small[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 86])[1].tobytes()
        if len(data) <= OVERVIEW_BYTES or max(width, height) == 1:
            return data, width, height
        scale *= min(0.9, (OVERVIEW_BYTES / len(data)) ** 0.5)


def _path(mask: np.ndarray, width: int, height: int) -> str:
    """The closed outlines of a mask (h, w) bool in a picture of that width and height.

    A mask that the picture's border cuts goes on beyond it: its outline is closed and none runs along the border.
    """
    if mask.shape != (height, width):
        mask = cv2.resize(mask.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_AREA) > 127
    mask = np.pad(mask, _PAD_PX, mode="edge")
    cell = 1
    outlines = trace(mask)
    while sum(map(len, outlines)) > PATH_CORNERS:
        cell *= 2
        rows, columns = mask.shape[0] // cell, mask.shape[1] // cell
        cells = mask[: rows * cell, : columns * cell].reshape(rows, cell, columns, cell)
        outlines = [outline * cell for outline in trace(cells.mean(axis=(1, 3)) > 0.5)]
    return "".join(relative_path(outline - _PAD_PX) + "z" for outline in outlines)
