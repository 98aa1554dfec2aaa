"""Coarse masks made from precise ones, failing the way instance segmentation heads fail.

A head predicts 28x28 logits for a box that is itself slightly off, and resamples them to the frame: corners round off,
thin parts vanish, the contour floats a few pixels beside the object, parts are missed or taken in. The amount of
damage scales with the object, as it does there.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

MASK_HEAD_CELLS = 28
"""Side of the mask a Mask R-CNN head predicts (He et al., ICCV 2017)."""


def mask_head(mask: np.ndarray, rng: np.random.Generator, cells: int = MASK_HEAD_CELLS) -> np.ndarray:
    """Predict the mask on a grid of `cells` squared over a jittered box, with smooth noise in the logits."""
    x, y, w, h = cv2.boundingRect(mask)
    jitter = rng.uniform(-0.04, 0.06, 4) * (w, h, w, h)
    x1, y1 = x - jitter[0], y - jitter[1]
    x2, y2 = x + w + jitter[2], y + h + jitter[3]
    to_grid = np.array(
        [[(cells) / (x2 - x1), 0, -x1 * cells / (x2 - x1)], [0, cells / (y2 - y1), -y1 * cells / (y2 - y1)]]
    )
    # Blurring by a cell before sampling stands for the head's area-like view of the features.
    sigma = max((x2 - x1), (y2 - y1)) / cells * rng.uniform(0.3, 0.6)
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), max(sigma, 0.5))
    grid = cv2.warpAffine(soft, to_grid, (cells, cells), flags=cv2.INTER_LINEAR)
    noise = cv2.GaussianBlur(rng.standard_normal((cells, cells)).astype(np.float32), (0, 0), 1.2)
    grid += noise / max(float(noise.std()), 1e-6) * rng.uniform(0.0, 0.16)
    frame = cv2.warpAffine(grid, to_grid, mask.shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return (frame > 0.5).astype(np.uint8)


def grow(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dilate or erode by up to 3 % of the object's extent."""
    radius = int(rng.integers(1, max(2, round(0.03 * _extent(mask))) + 1))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    return (cv2.dilate if rng.random() < 0.5 else cv2.erode)(mask, kernel)


def smooth(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur and threshold again: thin parts vanish, concave corners fill."""
    sigma = max(1.0, rng.uniform(0.01, 0.04) * _extent(mask))
    return (cv2.GaussianBlur(mask.astype(np.float32), (0, 0), sigma) > 0.5).astype(np.uint8)


def shift(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move the whole mask by up to 2 % of the object's extent."""
    reach = max(1.0, 0.02 * _extent(mask))
    dx, dy = rng.uniform(-reach, reach, 2)
    return cv2.warpAffine(mask, np.array([[1, 0, dx], [0, 1, dy]]), mask.shape[::-1], flags=cv2.INTER_NEAREST)


def drop_part(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Miss, or wrongly take in, one to three blobs centred on the contour."""
    contours = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    points = np.concatenate(contours)[:, 0]
    out = mask.copy()
    for _ in range(int(rng.integers(1, 4))):
        centre = points[rng.integers(len(points))].tolist()
        axes = (rng.uniform(0.02, 0.08, 2) * _extent(mask)).clip(2).astype(int).tolist()
        cv2.ellipse(out, centre, axes, float(rng.uniform(0, 180)), 0, 360, int(rng.random() < 0.4), -1)
    return out


def _extent(mask: np.ndarray) -> float:
    """Side of the square with the area of the mask's bounding box, in pixels."""
    _, _, w, h = cv2.boundingRect(mask)
    return float(np.sqrt(w * h))


KINDS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "mask_head": mask_head,
    "grow": grow,
    "smooth": smooth,
    "shift": shift,
    "drop_part": drop_part,
}


def coarsen(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A coarse mask of one object: mostly the mask head's failure, alone or with one or two of the others.

    `mask` is (H, W) uint8 0/1 and not empty; the result has the same form, is drawn from `rng` alone, and is never
    empty (damage that would erase the object is not applied).
    """
    names = ["mask_head"] if rng.random() < 0.8 else []
    others = [name for name in KINDS if name != "mask_head"]
    extra = rng.choice([0, 1, 2], p=[0.4, 0.4, 0.2]) if names else 1
    names = [*rng.choice(others, size=extra, replace=False), *names]
    coarse = mask
    for name in names:
        damaged = KINDS[name](coarse, rng)
        coarse = damaged if damaged.any() else coarse
    return coarse
