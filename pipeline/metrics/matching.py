"""Which prediction takes which truth, frame by frame, in a form that merges: what COCO's and LVIS's AP are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.ground_truth import TrueFrame, TrueInstance
from pipeline.metrics.boundary import boundary_region, dilation_px
from pipeline.metrics.overlap import areas, check_frame, intersections, iou_matrix
from pipeline.records import Frame, Instance

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)

SIZES = {"all": (0, 1e5**2), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e5**2)}
"""COCO's object sizes: the smallest and largest area in pixels, both included."""

RANKS_PER_FRAME = 1 << 20
"""More than a frame has predictions: what `Matches.order` counts for each frame."""


@dataclass(frozen=True)
class Rules:
    """What COCO's and LVIS's evaluations do differently, and what is measured.

    LVIS's other rules follow from the ground truth: predictions of categories that nobody looked for in an image are
    left out, and those of categories that are not annotated exhaustively are never false.
    """

    per_category: int | None = 100
    """The best so many predictions of a category in a frame count."""
    per_frame: int | None = None
    """The best so many predictions of all categories in a frame count."""
    leave_out_empty: bool = False
    """Predictions and truths without pixels do not exist; else such a prediction is wrong."""
    boundary_ratio: float | None = None
    """Take the smaller of mask IoU and Boundary IoU, whose region has this share of the diagonal as its width."""

    def uncounted(self, frame: Frame) -> int:
        """How many predictions of a frame lie beyond the best so many, and so count neither as right nor as wrong."""
        if self.per_frame is not None:
            return max(0, len(frame.instances) - self.per_frame)
        if self.per_category is None:
            return 0
        found = Counter(instance.category_id for instance in frame.instances)
        return sum(max(0, count - self.per_category) for count in found.values())


COCO = Rules()
LVIS = Rules(per_category=None, per_frame=300, leave_out_empty=True)


@dataclass(frozen=True)
class Matches:
    """The predictions of some frames with what they matched, and how many truths there were."""

    category: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n,) int64"""
    score: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(n,) float64"""
    order: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n,) int64: the frame's index and then the prediction's rank in it, which decides among equal scores."""
    matched: np.ndarray = field(default_factory=lambda: np.zeros((0, len(SIZES)), np.uint16))
    """(n, sizes) uint16: bit t is set where a truth was matched at IOU_THRESHOLDS[t]."""
    ignored: np.ndarray = field(default_factory=lambda: np.zeros((0, len(SIZES)), np.uint16))
    """(n, sizes) uint16: bit t is set where the prediction counts neither as right nor as wrong."""
    truths: dict[int, np.ndarray] = field(default_factory=dict)
    """Per category (sizes,) int64: truths to be found."""

    @classmethod
    def merge(cls, records: Iterable[Matches]) -> Matches:
        """All of them together; in whatever order and groups, they give the same `AveragePrecision`."""
        parts = [cls(), *records]
        truths: dict[int, np.ndarray] = {}
        for part in parts:
            for category, counts in part.truths.items():
                truths[category] = truths[category] + counts if category in truths else counts
        return cls(
            np.concatenate([part.category for part in parts]),
            np.concatenate([part.score for part in parts]),
            np.concatenate([part.order for part in parts]),
            np.concatenate([part.matched for part in parts]),
            np.concatenate([part.ignored for part in parts]),
            truths,
        )


def match_frame(index: int, truth: TrueFrame, frame: Frame, rules: Rules = COCO) -> Matches:
    """What pycocotools' COCOeval, or LVIS's, finds in one frame; AP of all frames' sum is theirs to the last digit.

    `index` is the frame's place among all frames (`TruthRef.order`); predictions of equal score are looked at in that
    order, and in a frame as they stand there. With `rules.boundary_ratio` it is Boundary AP's (Cheng et al., CVPR
    2021), where crowds are matched by the mask alone. InputError where the sizes of image and predictions differ.
    """
    check_frame(truth, frame)
    parts, counts = [], {}
    rank = index * RANKS_PER_FRAME
    for category, truths, predictions in by_category(truth, frame, rules):
        crowd = np.array([one.crowd for one in truths], bool)
        size = np.array([one.area for one in truths], float)
        ious = ious_for_matching(truth, predictions, truths, rules.boundary_ratio)
        pixels = areas(predictions)
        matched = np.zeros((len(predictions), len(SIZES)), np.uint16)
        ignored = np.zeros_like(matched)
        counts[category] = np.zeros(len(SIZES), np.int64)
        for a, (least, most) in enumerate(SIZES.values()):
            passed_over = crowd | (size < least) | (size > most)
            counts[category][a] = np.count_nonzero(~passed_over)
            taken = assign(ious, passed_over, crowd, IOU_THRESHOLDS)
            excused = (pixels < least) | (pixels > most) | (category in truth.not_exhaustive_categories)
            matched[:, a] = pack(taken >= 0)
            ignored[:, a] = pack(np.where(taken >= 0, np.append(passed_over, False)[taken], excused))
        # What is ignored throughout cannot change any precision.
        seen = np.flatnonzero((ignored != ALL_THRESHOLDS).any(axis=1))
        parts.append(
            Matches(
                np.full(len(seen), category, np.int64),
                np.array([predictions[i].score for i in seen], float),
                rank + seen,
                matched[seen],
                ignored[seen],
            )
        )
    return Matches.merge([*parts, Matches(truths=counts)])


def by_category(
    truth: TrueFrame, frame: Frame, rules: Rules
) -> Iterator[tuple[int, list[TrueInstance], list[Instance]]]:
    """The frame's categories, each with its truths in their order and its predictions that count, best first."""
    best = sorted(frame.instances, key=lambda instance: -instance.score)[: rules.per_frame]
    truths: dict[int, list[TrueInstance]] = {}
    predictions: dict[int, list[Instance]] = {}
    for one in truth.instances:
        if one.area > 0 or not rules.leave_out_empty:
            truths.setdefault(one.category_id, []).append(one)
    for instance in best:
        category = instance.category_id
        if rules.leave_out_empty and not instance.mask.any():
            continue
        if truth.negative_categories is None or category in truths or category in truth.negative_categories:
            predictions.setdefault(category, []).append(instance)
    for category in sorted(truths.keys() | predictions.keys()):
        yield category, truths.get(category, []), predictions.get(category, [])[: rules.per_category]


def ious_for_matching(
    truth: TrueFrame, predictions: Sequence[Instance], truths: Sequence[TrueInstance], boundary_ratio: float | None
) -> np.ndarray:
    """(predictions, truths) float64: the IoU that decides about a match.

    With a boundary ratio it is the smaller of mask IoU and Boundary IoU, but for pairs that the mask IoU alone keeps
    from matching, and crowds: these have their mask IoU.
    """
    crowd = np.array([one.crowd for one in truths], bool)
    ious = iou_matrix(predictions, truths, crowd)
    candidates = (ious >= IOU_THRESHOLDS[0]) & ~crowd
    if boundary_ratio is None or not candidates.any():
        return ious
    dilation = dilation_px(truth.width, truth.height, boundary_ratio)
    rows, columns = np.flatnonzero(candidates.any(axis=1)), np.flatnonzero(candidates.any(axis=0))
    ours = [boundary_region(predictions[i], dilation) for i in rows.tolist()]
    theirs = [boundary_region(truths[j], dilation) for j in columns.tolist()]
    common = intersections(ours, theirs)
    union = areas(ours)[:, None] + areas(theirs) - common
    wanted = candidates[np.ix_(rows, columns)]
    grid = ious[np.ix_(rows, columns)]
    ious[np.ix_(rows, columns)] = np.where(wanted, np.minimum(grid, common / union), grid)
    return ious


def assign(ious: np.ndarray, passed_over: np.ndarray, crowd: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The truth that each prediction takes at each threshold, or -1: (thresholds, predictions) int64.

    COCO's rule: predictions, best first, each take the free truth of highest IoU (the last among equals). Truths that
    are `passed_over` (truths,) bool are only taken where no other is left, and a crowd can be taken again and again.
    """
    taken = np.full((len(thresholds), len(ious)), -1)
    levels = np.minimum(thresholds, 1 - 1e-10).tolist()
    order = np.argsort(passed_over, kind="stable")
    candidates: dict[int, list[tuple[int, float]]] = {}
    for i, place in np.argwhere(ious[:, order] >= levels[0]).tolist():
        candidates.setdefault(i, []).append((int(order[place]), float(ious[i, order[place]])))
    used: list[set[int]] = [set() for _ in levels]
    for i, options in candidates.items():
        highest = max(iou for _, iou in options)
        for t, level in enumerate(levels):
            if highest < level:
                break
            found, best = -1, level
            for j, iou in options:
                if j in used[t] and not crowd[j]:
                    continue
                if found >= 0 and passed_over[j] and not passed_over[found]:
                    break
                if iou >= best:
                    found, best = j, iou
            if found >= 0:
                taken[t, i] = found
                used[t].add(found)
    return taken


def pack(flags: np.ndarray) -> np.ndarray:
    """(thresholds, n) bool as (n,) uint16, one bit for each threshold."""
    return (flags.astype(np.uint16) << np.arange(len(flags), dtype=np.uint16)[:, None]).sum(axis=0, dtype=np.uint16)


def unpack(bits: np.ndarray, threshold: int) -> np.ndarray:
    """The flags (n,) bool that `pack` put at a threshold's index."""
    return (bits >> np.uint16(threshold) & np.uint16(1)).astype(bool)


ALL_THRESHOLDS = np.uint16((1 << len(IOU_THRESHOLDS)) - 1)
