"""Coarse masks made from precise ones, failing the ways instance masks fail.

A mask head predicts 28x28 logits for a box that is itself slightly off, and resamples them to the frame: corners round
off, thin parts vanish, the contour floats a few pixels beside the object. Annotators and exporters cut corners of
polygons; video models let the contour swim; others miss parts or take in their surroundings. The amount of damage
scales with the object, as it does there, and with `strength`, 1 being the full failure.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

MASK_HEAD_CELLS = 28
"""Side of the mask a Mask R-CNN head predicts (He et al., ICCV 2017)."""

GROW_PX = (3, 10)
"""Over- and under-segmentation at full strength, in pixels, within GROW_SHARE of the object's extent."""
GROW_SHARE = 0.05

WOBBLE_PX = (2.0, 5.0)
"""How far a swimming contour lies beside the true one (root mean square), within WOBBLE_SHARE of the extent."""
WOBBLE_SHARE = 0.03

UNTOUCHED = 0.08
"""Share of the mixture that stays precise: a refiner must also learn to leave what is right."""


def mask_head(mask: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """Predict the mask on a grid of 28 cells squared (more at less strength) over a jittered box, with noisy logits."""
    cells = round(MASK_HEAD_CELLS / max(strength, 0.25))
    x, y, w, h = cv2.boundingRect(mask)
    jitter = strength * rng.uniform(-0.04, 0.06, 4) * (w, h, w, h)
    x1, y1 = x - jitter[0], y - jitter[1]
    x2, y2 = x + w + jitter[2], y + h + jitter[3]
    to_grid = np.array(
        [[cells / (x2 - x1), 0, -x1 * cells / (x2 - x1)], [0, cells / (y2 - y1), -y1 * cells / (y2 - y1)]]
    )
    # Blurring by a cell before sampling stands for the head's area-like view of the features.
    sigma = max((x2 - x1), (y2 - y1)) / cells * rng.uniform(0.3, 0.6)
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), max(sigma, 0.5))
    grid = cv2.warpAffine(soft, to_grid, (cells, cells), flags=cv2.INTER_LINEAR)
    noise = cv2.GaussianBlur(rng.standard_normal((cells, cells)).astype(np.float32), (0, 0), 1.2)
    grid += noise / max(float(noise.std()), 1e-6) * rng.uniform(0.0, 0.16) * strength
    frame = cv2.warpAffine(grid, to_grid, mask.shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return (frame > 0.5).astype(np.uint8)


def polygon(mask: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """Simplify every contour to a polygon that strays by up to 0.8 to 2.5 % of the object's extent."""
    tolerance = max(0.5, strength * rng.uniform(0.008, 0.025) * _extent(mask))
    contours = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    out = np.zeros_like(mask)
    # Drawn together, holes stay holes.
    cv2.drawContours(out, [cv2.approxPolyDP(contour, tolerance, True) for contour in contours], -1, 1, cv2.FILLED)
    return out


def grow(mask: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """Over- or under-segment by 3 to 10 pixels, less for objects for which that were more than 5 % of their extent."""
    radius = round(strength * min(rng.uniform(*GROW_PX), GROW_SHARE * _extent(mask)))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * max(radius, 1) + 1,) * 2)
    return (cv2.dilate if rng.random() < 0.5 else cv2.erode)(mask, kernel)


def smooth(mask: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """Blur and threshold again: thin parts vanish, concave corners fill."""
    sigma = max(1.0, strength * rng.uniform(0.01, 0.04) * _extent(mask))
    return (cv2.GaussianBlur(mask.astype(np.float32), (0, 0), sigma) > 0.5).astype(np.uint8)


def shift(mask: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """Move the whole mask by up to 2 % of the object's extent."""
    reach = max(1.0, strength * 0.02 * _extent(mask))
    dx, dy = rng.uniform(-reach, reach, 2)
    return cv2.warpAffine(mask, np.array([[1, 0, dx], [0, 1, dy]]), mask.shape[::-1], flags=cv2.INTER_NEAREST)


def drop_part(mask: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """Miss, or wrongly take in, one to three blobs centred on the contour."""
    contours = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    points = np.concatenate(contours)[:, 0]
    out = mask.copy()
    for _ in range(int(rng.integers(1, 4))):
        centre = points[rng.integers(len(points))].tolist()
        axes = (strength * rng.uniform(0.02, 0.08, 2) * _extent(mask)).clip(2).astype(int).tolist()
        cv2.ellipse(out, centre, axes, float(rng.uniform(0, 180)), 0, 360, int(rng.random() < 0.4), -1)
    return out


def wobble(mask: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """Let the contour swim: a smooth field of moves of several pixels, as masks carried along a video do."""
    extent = _extent(mask)
    amplitude = strength * min(rng.uniform(*WOBBLE_PX), WOBBLE_SHARE * extent)
    x, y, w, h = cv2.boundingRect(mask)
    margin = int(4 * amplitude) + 2
    left, top = max(x - margin, 0), max(y - margin, 0)
    part = np.ascontiguousarray(mask[top : y + h + margin, left : x + w + margin])
    wave = max(6 * amplitude, rng.uniform(0.12, 0.35) * extent, 4.0)
    cells = [int(np.ceil(side / wave)) + 3 for side in part.shape]
    moves = rng.standard_normal((*cells, 2)).astype(np.float32) * np.float32(amplitude)
    moves = cv2.resize(moves, part.shape[::-1], interpolation=cv2.INTER_CUBIC)
    ys, xs = np.mgrid[: part.shape[0], : part.shape[1]].astype(np.float32)
    out = np.zeros_like(mask)
    out[top : top + part.shape[0], left : left + part.shape[1]] = cv2.remap(
        part, xs + moves[..., 0], ys + moves[..., 1], cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE
    )
    return out


def _extent(mask: np.ndarray) -> float:
    """Side of the square with the area of the mask's bounding box, in pixels."""
    _, _, w, h = cv2.boundingRect(mask)
    return float(np.sqrt(w * h))


Failure = Callable[[np.ndarray, np.random.Generator, float], np.ndarray]

KINDS: dict[str, Failure] = {
    "mask_head": mask_head,
    "polygon": polygon,
    "grow": grow,
    "wobble": wobble,
    "smooth": smooth,
    "shift": shift,
    "drop_part": drop_part,
}


def coarsen(mask: np.ndarray, rng: np.random.Generator, kind: str = "mixed") -> np.ndarray:
    """A coarse mask of one object.

    `kind` is one of KINDS at full strength, or `mixed`: up to three kinds at any strength, the mask head's most often,
    and now and then none at all. `mask` is (H, W) uint8 0/1 or bool, and not empty; the result is uint8 0/1, drawn
    from `rng` alone, and never empty (damage that would erase the object is not applied).
    """
    mask = np.ascontiguousarray(mask, np.uint8)
    if kind != "mixed":
        return _damaged(mask, rng, kind, 1.0)
    if rng.random() < UNTOUCHED:
        return mask.copy()
    names = list(KINDS)
    weights = np.array([4.0 if name == "mask_head" else 1.0 for name in names])
    count = rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])
    coarse = mask
    for name in rng.choice(names, size=count, replace=False, p=weights / weights.sum()).tolist():
        coarse = _damaged(coarse, rng, name, float(rng.uniform(0.15, 1.0)))
    return coarse


def _damaged(mask: np.ndarray, rng: np.random.Generator, kind: str, strength: float) -> np.ndarray:
    damaged = KINDS[kind](mask, rng, strength)
    return damaged if damaged.any() else mask.copy()
