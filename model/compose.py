"""New pictures from annotated ones: an object of one photograph laid over another, with its precise mask.

A data set of one person per photograph has neither touching objects nor other things than people; laid over each
other they touch and hide one another, and an outline filled with another texture is an edge between any two things.
"""

from __future__ import annotations

import cv2
import numpy as np

SOFTNESS_PX = (0.5, 1.1)
"""Sigma of the blur across a pasted edge, as lenses and resampling leave it."""

TEXTURE_SHARE = 0.5
"""Share of the pasted outlines that are filled with some other part of the donor photograph."""


def lay_over(
    image: np.ndarray, masks: list[np.ndarray], donor: np.ndarray, outline: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Lay the object `outline` (h, w) uint8 0/1 of the photograph `donor` (h, w, 3) over `image` (H, W, 3) uint8 RGB.

    It is mirrored, scaled and placed at random. What it hides is taken out of `masks` (H, W) uint8 0/1 in place.
    Returns the new image and the laid object's mask (H, W) uint8, None where none of it came to lie in the frame.
    """
    x, y, w, h = cv2.boundingRect(outline)
    height, width = image.shape[:2]
    factor = float(rng.uniform(0.4, 1.1)) * min(height / h, width / w, 1.5)
    angle, mirrored = float(rng.uniform(-20, 20)), rng.random() < 0.5
    to_frame = cv2.getRotationMatrix2D((x + w / 2, y + h / 2), angle, factor)
    if mirrored:
        to_frame = to_frame @ np.array([[-1, 0, 2 * x + w], [0, 1, 0], [0, 0, 1]], float)
    to_frame[:, 2] += (rng.uniform(0.1, 0.9) * width - x - w / 2, rng.uniform(0.1, 0.9) * height - y - h / 2)

    soft = cv2.warpAffine(outline.astype(np.float32), to_frame, (width, height), flags=cv2.INTER_LINEAR)
    mask = (soft > 0.5).astype(np.uint8)
    if not mask.any():
        return image, None
    alpha = cv2.GaussianBlur(soft, (0, 0), float(rng.uniform(*SOFTNESS_PX)))[..., None]
    if rng.random() < TEXTURE_SHARE:
        to_frame[:, 2] += rng.uniform(-0.5, 0.5, 2) * (w * factor, h * factor)
    above = cv2.warpAffine(donor, to_frame, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    for other in masks:
        other[mask != 0] = 0
    return np.rint(alpha * above + (1 - alpha) * image).astype(np.uint8), mask
