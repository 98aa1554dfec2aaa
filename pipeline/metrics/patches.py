"""How well refined patches agree with their targets, beside the coarse ones: what training watches."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipeline.metrics.boundary import boundary_f_score

TOLERANCES_PX = (1, 3)


@dataclass
class PatchScores:
    """Sums over patches from which the scores follow; those of several processes are added with `+`."""

    patches: int = 0
    confusion: np.ndarray = field(default_factory=lambda: np.zeros((2, 2, 2), np.int64))
    """Pixels by stage (coarse, refined), class in the target, and class predicted."""
    boundary: np.ndarray = field(default_factory=lambda: np.zeros((2, len(TOLERANCES_PX))))
    """Sums of the boundary F-score by stage and tolerance."""

    def add(self, coarse: np.ndarray, refined: np.ndarray, target: np.ndarray) -> None:
        """Count a batch; all three are (N, P, P) bool or integer 0/1."""
        self.patches += len(target)
        for stage, masks in enumerate((coarse, refined)):
            pairs = 2 * target.astype(np.int64).ravel() + masks.ravel()
            self.confusion[stage] += np.bincount(pairs, minlength=4).reshape(2, 2)
            for i, tolerance in enumerate(TOLERANCES_PX):
                scores = (boundary_f_score(mask, truth, tolerance) for mask, truth in zip(masks, target))
                self.boundary[stage, i] += sum(scores)

    def __add__(self, other: PatchScores) -> PatchScores:
        return PatchScores(
            self.patches + other.patches, self.confusion + other.confusion, self.boundary + other.boundary
        )

    def result(self) -> dict[str, dict[str, float]]:
        """Scores of the coarse masks under `before` and of the refined ones under `after`; needs at least one patch.

        `mIoU` and `mAcc` are means over background and foreground of intersection over union and of recall, each from
        pixel sums over all patches; `aAcc` is the share of right pixels. A class that occurs nowhere is left out of the
        means. `boundary_f1` and `boundary_f3` are means over patches of the boundary F-score within 1 and 3 px.
        """
        return {name: self._scores(stage) for stage, name in enumerate(("before", "after"))}

    def _scores(self, stage: int) -> dict[str, float]:
        pixels = self.confusion[stage]
        right, truth = np.diag(pixels), pixels.sum(axis=1)
        union = truth + pixels.sum(axis=0) - right
        return {
            "mIoU": float(np.mean(right[union > 0] / union[union > 0])),
            "mAcc": float(np.mean(right[truth > 0] / truth[truth > 0])),
            "aAcc": float(right.sum() / pixels.sum()),
            **{f"boundary_f{t}": float(s / self.patches) for t, s in zip(TOLERANCES_PX, self.boundary[stage])},
        }
