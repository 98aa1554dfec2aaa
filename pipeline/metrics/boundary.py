"""How well a mask's area and its boundary agree with a precise one."""

from __future__ import annotations

import cv2
import numpy as np


def iou(mask: np.ndarray, target: np.ndarray) -> float:
    """Intersection over union of two masks (H, W) bool or 0/1; 1 where both are empty."""
    union = np.count_nonzero(mask | target)
    return np.count_nonzero(mask & target) / union if union else 1.0


def contour(mask: np.ndarray) -> np.ndarray:
    """The object's pixels with background among their 4 neighbours (beyond the frame is none): (H, W) uint8 0/1."""
    mask = mask.astype(np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    return mask - cv2.erode(mask, cross, borderType=cv2.BORDER_CONSTANT, borderValue=1)


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


def _share_within(pixels: np.ndarray, of: np.ndarray, tolerance_px: float) -> float:
    distance = cv2.distanceTransform(1 - of, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return float((distance[pixels != 0] <= tolerance_px + 1e-4).mean())
