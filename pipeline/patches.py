"""Boxes -> crops for the network, and its probabilities -> refined mask (paper, sections 3.1 and 3.2)."""

from __future__ import annotations

import numpy as np


def crop(
    image: np.ndarray, coarse: np.ndarray, origin: tuple[int, int], boxes: np.ndarray, padding: int = 0
) -> np.ndarray:
    """Cut the patches of one instance, zero outside the frame.

    `image` is (H, W, 3) uint8 RGB; `coarse` (h, w) uint8 or bool is the mask cut to its box at `origin` = (x, y);
    `boxes` is (N, 4) x1, y1, x2, y2. Each patch is widened by `padding` pixels on every side. Returns (N, P, P, 4)
    uint8: RGB and the coarse mask as 0 or 1.
    """
    side = (int(boxes[0, 2] - boxes[0, 0]) if len(boxes) else 0) + 2 * padding
    out = np.zeros((len(boxes), side, side, 4), np.uint8)
    binary = (coarse != 0).view(np.uint8)
    for patch, (x1, y1) in zip(out, (boxes[:, :2] - padding).tolist()):
        _copy(patch[..., :3], image, x1, y1)
        _copy(patch[..., 3], binary, x1 - origin[0], y1 - origin[1])
    return out


def _copy(target: np.ndarray, source: np.ndarray, x: int, y: int) -> None:
    """Copy the part of `source` that the window at (x, y) of the target's size covers."""
    height, width = target.shape[:2]
    top, left = max(-y, 0), max(-x, 0)
    bottom, right = min(source.shape[0] - y, height), min(source.shape[1] - x, width)
    if top < bottom and left < right:
        target[top:bottom, left:right] = source[y + top : y + bottom, x + left : x + right]


def paste(
    coarse: np.ndarray,
    origin: tuple[int, int],
    frame_size: tuple[int, int],
    boxes: np.ndarray,
    probabilities: np.ndarray,
) -> tuple[np.ndarray, tuple[int, int], np.ndarray]:
    """Reassemble one instance from its patches.

    `coarse` (h, w) lies at `origin` in a frame of `frame_size` = (width, height); `probabilities` is (N, P, P) uint16
    fixed point (65535 = 1) for `boxes` (N, 4); padding must have been cut off. Where patches cover a pixel, the mean
    of their probabilities decides (object where it exceeds one half); elsewhere the coarse mask stays.

    Returns the refined mask (h', w') bool over the union of the coarse box and all patches, that union's origin (x,
    y), and the mean foreground probability (h', w') float32, NaN where no patch covers.
    """
    (x0, y0), (width, height) = origin, frame_size
    if len(boxes):
        left, top = min(x0, int(boxes[:, 0].min())), min(y0, int(boxes[:, 1].min()))
        right = min(max(x0 + coarse.shape[1], int(boxes[:, 2].max())), width)
        bottom = min(max(y0 + coarse.shape[0], int(boxes[:, 3].max())), height)
    else:
        left, top, right, bottom = x0, y0, x0 + coarse.shape[1], y0 + coarse.shape[0]
    refined = np.zeros((bottom - top, right - left), bool)
    refined[y0 - top : y0 - top + coarse.shape[0], x0 - left : x0 - left + coarse.shape[1]] = coarse != 0
    total = np.zeros(refined.shape, np.uint32)
    count = np.zeros(refined.shape, np.uint16)
    for (x1, y1, x2, y2), probability in zip(boxes.tolist(), probabilities):
        window = slice(y1 - top, min(y2, bottom) - top), slice(x1 - left, min(x2, right) - left)
        part = probability[: window[0].stop - window[0].start, : window[1].stop - window[1].start]
        total[window] += part
        count[window] += 1
    covered = count > 0
    one = np.iinfo(probabilities.dtype).max
    refined[covered] = (2 * total > count * np.uint32(one))[covered]
    with np.errstate(invalid="ignore"):
        mean = (total / (count * np.float32(one))).astype(np.float32)
    return refined, (left, top), mean
