"""A picture of random training patches, so that a person sees what a network will be taught."""

from __future__ import annotations

import cv2
import numpy as np

from pipeline import storage
from pipeline.patch_dataset import PatchDataset
from pipeline.report.contours import CASING_RGB, COARSE_RGB, TRUTH_RGB

COLUMNS = 5
CELL_PX = 128
"""Side of each of the three views of a patch."""
COARSE_COLOUR, TARGET_COLOUR, CASING_COLOUR = COARSE_RGB[::-1], TRUTH_RGB[::-1], CASING_RGB[::-1]
"""BGR."""
GAP_PX = 4
"""White between the views of a patch; patches lie twice as far apart."""


def contact_sheet(data: str, output: str, split: str, count: int, seed: int) -> None:
    """Write a PNG of `count` random patches, each as image, coarse contour and target contour side by side."""
    dataset = PatchDataset([data], split)
    rows = np.random.default_rng(seed).permutation(dataset.rows)[:count]
    views = [_views(patch) for patch in dataset.take(rows)]
    blank = np.full_like(views[0], 255)
    views += [blank] * (-len(views) % COLUMNS)
    sheet = np.vstack([np.hstack(views[i : i + COLUMNS]) for i in range(0, len(views), COLUMNS)])
    storage.put(output, cv2.imencode(".png", sheet)[1].tobytes())


def _views(patch: np.ndarray) -> np.ndarray:
    image = cv2.resize(np.ascontiguousarray(patch[..., 2::-1]), (CELL_PX, CELL_PX), interpolation=cv2.INTER_NEAREST)
    views = [image]
    for channel, colour in ((3, COARSE_COLOUR), (4, TARGET_COLOUR)):
        mask = cv2.resize(
            np.ascontiguousarray(patch[..., channel]), (CELL_PX, CELL_PX), interpolation=cv2.INTER_NEAREST
        )
        views.append(_outlined(image, mask, colour))
    spaced = [np.pad(view, ((0, GAP_PX), (0, GAP_PX), (0, 0)), constant_values=255) for view in views]
    return np.pad(np.hstack(spaced), ((0, GAP_PX), (0, GAP_PX), (0, 0)), constant_values=255)


def _outlined(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """The image (h, w, 3) with the mask's contour; none along the border, beyond which a mask is taken to go on."""
    padded = np.pad(mask, 2, mode="edge")
    view = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    contours = cv2.findContours(padded, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    cv2.drawContours(view, contours, -1, CASING_COLOUR, 2)
    cv2.drawContours(view, contours, -1, colour, 1)
    return np.ascontiguousarray(view[2:-2, 2:-2])
