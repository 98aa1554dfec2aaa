"""The guard: no mask gets worse silently. What the network has made of a coarse mask is believed, trimmed, or refused.

The reference writes whatever comes out. Most of its losses are nearly right masks that the network moves without being
sure of it, so the test that matters most asks how certain the changed pixels were; the others catch what is absurd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from pipeline.bounds import check_bounds
from pipeline.proposals import boundary_strength
from pipeline.records import InputError

REASONS = {
    "refined": {"far_pieces": "pieces of the change that lay apart from the coarse boundary were taken back"},
    "kept": {
        "no_boundary": "the coarse mask is empty",
        "too_small": "the object has fewer pixels than --guard.min-area",
    },
    "rejected": {
        "empty": "nothing was left of the object",
        "exploded": "the object grew beyond --guard.max-area-ratio",
        "shrunk": "the object fell below --guard.min-area-ratio",
        "iou": "the refined mask overlaps the coarse one by less than --guard.min-iou",
        "uncertain": "the changed pixels were decided with less confidence than --guard.min-confidence",
    },
}
"""Every status an instance can leave with, and the reasons that go with it; a mask refined as it came has none."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Which refined masks are not believed, so that the coarse one is written instead."""

    enabled: bool = True
    """Compare every refined mask with its coarse one; `--guard.no-enabled` writes whatever the network makes."""
    min_area: int = 1024
    """Leave objects of fewer pixels as they are, without spending patches on them."""
    min_confidence: float = 0.45
    """Reject where the mean of 2 * |p - 0.5| over the changed pixels is lower: 0 is a tossed coin, 1 is certain."""
    min_iou: float = 0.3
    """Reject masks that overlap the coarse one by a lower IoU."""
    min_area_ratio: float = 0.33
    """Reject masks with less than this share of the coarse mask's pixels."""
    max_area_ratio: float = 3.0
    """Reject masks with more than so many times the coarse mask's pixels."""
    max_distance: int = 1
    """Take back pieces of the change that come no nearer to the coarse boundary than so many pixels."""

    def __post_init__(self) -> None:
        for name in ("min_confidence", "min_iou", "min_area_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"guard.{name} is {getattr(self, name)}: expected a number from 0 to 1")
        for name, least in (("min_area", 0), ("max_area_ratio", 1), ("max_distance", 1)):
            check_bounds(self, name, least, group="guard.")


class Verdict(NamedTuple):
    """What to write for one instance, and the status and reason (`REASONS`, or empty) it leaves with."""

    mask: np.ndarray
    """(h, w) bool: the refined mask, without the pieces that were taken back; the coarse one where it is rejected."""
    status: str
    reason: str


def passed_over(coarse: np.ndarray, config: GuardConfig) -> str:
    """Why no patch is to be cut for the coarse mask (h, w) bool: `no_boundary`, `too_small`, or empty if one is."""
    area = np.count_nonzero(coarse)
    if not area:
        return "no_boundary"
    return "too_small" if config.enabled and area < config.min_area else ""


def judge(coarse: np.ndarray, refined: np.ndarray, mean: np.ndarray, config: GuardConfig) -> Verdict:
    """Compare the refined mask of one instance with its coarse one, which is not empty.

    All arrays are (h, w) over the same window of the frame, as `patches.paste` returns it: the masks bool, `mean` the
    foreground probability float32, NaN where no patch covers. The verdict's mask is never empty unless the guard is
    switched off. Pieces apart from the boundary are taken back one by one, since what happens at the boundary does not
    depend on them: they come from the middle of a patch that has found another object.
    """
    if not config.enabled:
        return Verdict(refined, "refined", "")
    changed = coarse != refined
    pixels = np.flatnonzero(changed)
    far = _far_pieces(changed, pixels, coarse, config.max_distance)
    mask = refined
    if far.any():
        mask = refined.copy()
        mask.ravel()[pixels[far]] ^= True
        pixels = pixels[~far]
    if len(pixels) and (reason := _refusal(coarse, pixels, mean.ravel()[pixels], config)):
        return Verdict(coarse, "rejected", reason)
    return Verdict(mask, "refined", "far_pieces" if mask is not refined else "")


def _refusal(coarse: np.ndarray, pixels: np.ndarray, probabilities: np.ndarray, config: GuardConfig) -> str:
    """Why a refined mask as a whole is not believed.

    `pixels` (n,), n > 0, are the indices where it differs from `coarse` (h, w), flattened, and `probabilities` (n,)
    their means.
    """
    before, lost = np.count_nonzero(coarse), np.count_nonzero(coarse.ravel()[pixels])
    common, after = before - lost, before - lost + len(pixels) - lost
    if not after:
        return "empty"
    if after > config.max_area_ratio * before:
        return "exploded"
    if after < config.min_area_ratio * before:
        return "shrunk"
    if common < config.min_iou * (before + after - common):
        return "iou"
    confidence = np.abs(2 * probabilities - 1).mean(dtype=np.float64)
    return "uncertain" if confidence < config.min_confidence else ""


def _far_pieces(changed: np.ndarray, pixels: np.ndarray, coarse: np.ndarray, max_distance: int) -> np.ndarray:
    """Which of the changed pixels are of components without a pixel within `max_distance` of the coarse boundary.

    `pixels` (n,) are the indices of those that are set in `changed` (h, w), flattened; returns (n,) bool. The pixels
    beside the boundary, on either side and diagonally too, are at distance 1.
    """
    near = boundary_strength(coarse)
    if max_distance > 1:
        near = cv2.dilate(near, np.ones((2 * max_distance - 1,) * 2, np.uint8))
    beside = near.ravel()[pixels] > 0
    if beside.all():
        return ~beside
    count, pieces = cv2.connectedComponents(changed.view(np.uint8), connectivity=8)
    piece = pieces.ravel()[pixels]
    far = np.ones(count, bool)
    far[piece[beside]] = False
    return far[piece]
