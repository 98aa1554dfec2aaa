"""Average precision as COCO and LVIS define it, from the matches of all frames."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.metrics.matching import IOU_THRESHOLDS, SIZES, Matches, unpack

RECALLS = np.linspace(0.0, 1.0, 101)

FREQUENCIES = {"APr": "r", "APc": "c", "APf": "f"}


@dataclass(frozen=True)
class AveragePrecision:
    """Precision of every category at 101 recalls; its means are the numbers of pycocotools and of LVIS's API."""

    categories: tuple[int, ...]
    """Ids, ascending."""
    precision: np.ndarray
    """(thresholds, recalls, categories, sizes) float64; -1 where a category has no truth of a size."""
    unknown: dict[int, int]
    """Predictions left out because the ground truth does not have their category: how many, by category id."""

    def mean(self, iou: float | None = None, size: str = "all", categories: Collection[int] | None = None) -> float:
        """AP in 0..1 at one IoU threshold or over all, for a size and some categories; NaN where there is no truth.

        The official tools print -1 for NaN.
        """
        chosen = self.precision[..., list(SIZES).index(size)]
        if categories is not None:
            chosen = chosen[:, :, [i for i, category in enumerate(self.categories) if category in categories]]
        if iou is not None:
            chosen = chosen[np.isclose(IOU_THRESHOLDS, iou)]
        held = chosen[chosen > -1]
        return float(held.mean()) if held.size else float("nan")

    def numbers(self, categories: Collection[int] | None = None) -> dict[str, float]:
        """AP, AP50, AP75, APs, APm and APl of some categories, or of all."""
        return {
            "AP": self.mean(categories=categories),
            "AP50": self.mean(iou=0.5, categories=categories),
            "AP75": self.mean(iou=0.75, categories=categories),
            "APs": self.mean(size="small", categories=categories),
            "APm": self.mean(size="medium", categories=categories),
            "APl": self.mean(size="large", categories=categories),
        }

    def frequency_numbers(self, frequencies: Mapping[int, str]) -> dict[str, float]:
        """LVIS's APr, APc and APf, from `Listing.frequencies`."""
        return {
            name: self.mean(categories={category for category, one in frequencies.items() if one == frequency})
            for name, frequency in FREQUENCIES.items()
        }


def average_precision(matches: Matches, categories: Collection[int]) -> AveragePrecision:
    """AP over the categories of a ground truth (`Listing.categories`)."""
    known = tuple(sorted(categories))
    order = np.lexsort((matches.order, -matches.score, matches.category))
    category = matches.category[order]
    precision = np.full((len(IOU_THRESHOLDS), len(RECALLS), len(known), len(SIZES)), -1.0)
    for k, one in enumerate(known):
        truths = matches.truths.get(one, ())
        chosen = order[np.searchsorted(category, one) : np.searchsorted(category, one, side="right")]
        for a in np.flatnonzero(truths):
            matched, ignored = matches.matched[chosen, a], matches.ignored[chosen, a]
            for t in range(len(IOU_THRESHOLDS)):
                flags = unpack(matched, t), unpack(ignored, t)
                precision[t, :, k, a] = _precision_at_recalls(*flags, truths[a])
    ids, counts = np.unique(category[~np.isin(category, known)], return_counts=True)
    return AveragePrecision(known, precision, dict(zip(ids.tolist(), counts.tolist())))


def _precision_at_recalls(matched: np.ndarray, ignored: np.ndarray, truths: int) -> np.ndarray:
    """Highest precision at each of RECALLS or more, (101,) float64, of flags (n,) bool in the order of scores."""
    right = np.cumsum(matched & ~ignored, dtype=float)
    wrong = np.cumsum(~matched & ~ignored, dtype=float)
    if len(right) == 0:
        return np.zeros(len(RECALLS))
    # pycocotools keeps the quotient from dividing by 0 in the same way; exact equality needs its very summand.
    precision = right / (wrong + right + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(right / truths, RECALLS)
    return np.where(places < len(precision), np.append(precision, 0)[np.minimum(places, len(precision))], 0)
