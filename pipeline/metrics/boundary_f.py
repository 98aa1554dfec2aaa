"""AF: how well the boundaries of those objects agree that were found."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pipeline.ground_truth import TrueFrame
from pipeline.metrics.boundary import boundary_f_score
from pipeline.metrics.matching import COCO, IOU_THRESHOLDS, Rules, assign, by_category, ious_for_matching
from pipeline.metrics.overlap import box_of, check_frame, mask_within, within_frame
from pipeline.records import Frame

TOLERANCE_SHARE = 3 / math.hypot(2048, 1024)
"""The tolerance as a share of the image's diagonal: 3 px for an image of 2048 x 1024."""

# Whole numbers add up to the same sum in every order.
_UNIT = 1 << 40


@dataclass(frozen=True)
class BoundaryF:
    """Boundary F-scores of the found objects of some frames."""

    found: dict[int, int] = field(default_factory=dict)
    """Number of found objects by category id."""
    total: dict[int, int] = field(default_factory=dict)
    """Sum of their scores by category id, in units of 2**-40."""

    @classmethod
    def merge(cls, records: Iterable[BoundaryF]) -> BoundaryF:
        """All of them together; their order and grouping make no difference."""
        found: dict[int, int] = {}
        total: dict[int, int] = {}
        for record in records:
            for category in record.found:
                found[category] = found.get(category, 0) + record.found[category]
                total[category] = total.get(category, 0) + record.total[category]
        return cls(found, total)

    def per_category(self) -> dict[int, float]:
        """Mean score in 0..1 of each category of which an object was found."""
        return {category: self.total[category] / self.found[category] / _UNIT for category in sorted(self.found)}

    def mean(self) -> float:
        """AF: the mean over those categories; NaN where nothing was found."""
        scores = list(self.per_category().values())
        return math.fsum(scores) / len(scores) if scores else float("nan")


def boundary_f_frame(
    truth: TrueFrame, frame: Frame, tolerance_px: float | None = None, rules: Rules = COCO
) -> BoundaryF:
    """The boundary F-score (`boundary_f_score`) of every pair that mask AP matches at an IoU of 0.5, crowds left out.

    AF is its mean over the pairs of a category, and then over the categories that have any. Objects that were not
    found do not lower it: look at it beside AP50. The tolerance is `tolerance_px` where given, else TOLERANCE_SHARE
    of the image's diagonal, but at least 1 px. InputError where the sizes of image and predictions differ.
    """
    check_frame(truth, frame)
    if tolerance_px is None:
        tolerance_px = max(1.0, TOLERANCE_SHARE * math.hypot(truth.width, truth.height))
    found: dict[int, int] = {}
    total: dict[int, int] = {}
    for category, truths, predictions in by_category(truth, frame, rules):
        crowd = np.array([one.crowd for one in truths], bool)
        ious = ious_for_matching(truth, predictions, truths, boundary_ratio=None)
        for i, j in enumerate(assign(ious, crowd, crowd, IOU_THRESHOLDS[:1])[0].tolist()):
            if j >= 0 and not crowd[j]:
                box = within_frame(box_of(predictions[i], truths[j], margin=1), truth.width, truth.height)
                score = boundary_f_score(mask_within(predictions[i], box), mask_within(truths[j], box), tolerance_px)
                found[category] = found.get(category, 0) + 1
                total[category] = total.get(category, 0) + round(score * _UNIT)
    return BoundaryF(found, total)
