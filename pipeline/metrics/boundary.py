"""How well a mask's area and its boundary agree with a precise one."""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np

from pipeline.metrics.overlap import Located, Region, box_of, intersection, mask_within, within_frame

COCO_RATIO = 0.02
"""Width of the boundary region for COCO and LVIS as a share of the image's diagonal (Cheng et al., CVPR 2021)."""

CITYSCAPES_RATIO = 0.005
"""The same for Cityscapes."""

WORSE_BY = 0.005
"""An object counts as worse, or better, where its IoU with its truth changed by more."""


def iou(mask: np.ndarray, target: np.ndarray) -> float:
    """Intersection over union of two masks (H, W) bool or 0/1; 1 where both are empty."""
    union = np.count_nonzero(mask | target)
    return np.count_nonzero(mask & target) / union if union else 1.0


def contour(mask: np.ndarray) -> np.ndarray:
    """The object's pixels with background among their 4 neighbours (beyond the frame is none): (H, W) uint8 0/1."""
    mask = mask.astype(np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    return mask - cv2.erode(mask, cross, borderType=cv2.BORDER_CONSTANT, borderValue=1)


def contour_region(region: Located, width: int, height: int) -> Region:
    """`contour` of a mask in a frame of `width` x `height`, bool, cut to the mask's box and the pixels around it."""
    if not region.mask.size:
        return Region(region.mask, region.origin)
    box = within_frame(box_of(region, margin=1), width, height)
    return Region(contour(mask_within(region, box)) != 0, (box.left, box.top))


def dilation_px(width: int, height: int, ratio: float) -> int:
    """How wide the boundary region of masks in an image is: `ratio` of the diagonal in whole pixels, at least 1."""
    return max(1, round(ratio * math.sqrt(height**2 + width**2)))


def boundary_region(region: Located, dilation: int) -> Region:
    """The mask's pixels within `dilation` pixels (chessboard distance) of its boundary, cut to the same box.

    What Boundary IoU (Cheng et al., CVPR 2021) compares. The frame's edge counts as boundary, so that a mask cut to
    its box has the same region as in the whole frame: beyond the box there is either background or no image.
    """
    mask = region.mask
    if min(mask.shape) <= 2 * dilation:
        return Region(mask, region.origin)
    kernel = np.ones((2 * dilation + 1, 2 * dilation + 1), np.uint8)
    inner = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return Region(mask & (inner == 0), region.origin)


def boundary_iou(mask: Located, target: Located, dilation: int) -> float:
    """Intersection over union of the two boundary regions (`boundary_region`); 1 where both masks are empty."""
    ours, theirs = boundary_region(mask, dilation), boundary_region(target, dilation)
    common = intersection(ours, theirs)
    union = int(np.count_nonzero(ours.mask) + np.count_nonzero(theirs.mask)) - common
    return common / union if union else 1.0


def boundary_f_score(mask: np.ndarray, target: np.ndarray, tolerance_px: float) -> float:
    """F-measure of the contour pixels that lie within `tolerance_px` (Euclidean) of the other mask's contour.

    The measure of Martin et al. (PAMI 2004) as used for DAVIS (Perazzi et al., CVPR 2016), without the bipartite
    matching. Both contours empty give 1, one of them 0. Masks are (H, W) bool or 0/1.
    """
    ours, theirs = contour(mask), contour(target)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = _share_within(ours, theirs, tolerance_px)
    recall = _share_within(theirs, ours, tolerance_px)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@lru_cache(maxsize=8)
def disc(radius_px: float) -> np.ndarray:
    """All pixels within `radius_px` (Euclidean) of the middle one: a square of odd side, uint8 0/1."""
    reach = int(radius_px)
    offsets = np.arange(-reach, reach + 1)
    return (np.add.outer(offsets**2, offsets**2) <= radius_px**2).astype(np.uint8)


def _share_within(pixels: np.ndarray, of: np.ndarray, tolerance_px: float) -> float:
    near = cv2.dilate(of, disc(tolerance_px))
    return np.count_nonzero(pixels & near) / np.count_nonzero(pixels)
