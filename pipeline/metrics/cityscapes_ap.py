"""Instance AP as Cityscapes defines it, from partial results of frames that merge."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pipeline.formats.cityscapes import CITYSCAPES_CLASSES
from pipeline.ground_truth import TrueFrame, TrueInstance
from pipeline.metrics.boundary import boundary_region, dilation_px
from pipeline.metrics.matching import pack, unpack
from pipeline.metrics.overlap import areas, check_frame, intersections
from pipeline.records import Frame, Instance

EVALUATED = tuple(label for label in CITYSCAPES_CLASSES if label not in (29, 30))
"""Label ids of the classes that count; caravans and trailers do not."""

# Sums of 0.05 as the official script makes them: some lie a hair above the decimal number, which a ratio may equal.
OVERLAPS = np.arange(0.5, 1.0, 0.05)

SMALLEST_REGION = 100
"""Truths of fewer pixels need not be found, and predictions on them are not wrong."""


@dataclass(frozen=True)
class CityscapesMatches:
    """What the predictions of some frames hit and missed."""

    category: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n,) int64: label ids; a prediction may have several rows."""
    score: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(n,) float64"""
    right: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))
    """(n,) uint16: bit o is set where a truth was found at OVERLAPS[o]."""
    wrong: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))
    """(n,) uint16: bit o is set for a false prediction."""
    missed: np.ndarray = field(default_factory=lambda: np.zeros((len(EVALUATED), len(OVERLAPS)), np.int64))
    """(classes, overlaps) int64: truths that no prediction found."""
    truths: np.ndarray = field(default_factory=lambda: np.zeros(len(EVALUATED), np.int64))
    """(classes,) int64: truths to be found."""
    unknown: int = 0
    """Predictions of other classes, which do not count."""

    @classmethod
    def merge(cls, records: Iterable[CityscapesMatches]) -> CityscapesMatches:
        """All of them together; in whatever order and groups, they give the same `CityscapesAP`."""
        parts = [cls(), *records]
        return cls(
            np.concatenate([part.category for part in parts]),
            np.concatenate([part.score for part in parts]),
            np.concatenate([part.right for part in parts]),
            np.concatenate([part.wrong for part in parts]),
            np.sum([part.missed for part in parts], axis=0),
            np.sum([part.truths for part in parts], axis=0),
            sum(part.unknown for part in parts),
        )


@dataclass(frozen=True)
class CityscapesAP:
    """The table that the official script prints. NaN for a class without truths."""

    per_class: np.ndarray
    """(classes, overlaps) float64, classes as in EVALUATED."""
    unknown: int
    """Predictions of other classes, which do not count."""

    def numbers(self, category: int | None = None) -> dict[str, float]:
        """`AP` over all overlaps and `AP50` in 0..1, of one class or averaged over those that have truths."""
        table = self.per_class if category is None else self.per_class[[EVALUATED.index(category)]]
        if np.isnan(table).all():
            return {"AP": float("nan"), "AP50": float("nan")}
        return {"AP": float(np.nanmean(table)), "AP50": float(np.nanmean(table[:, 0]))}


def match_frame(truth: TrueFrame, frame: Frame, boundary_ratio: float | None = None) -> CityscapesMatches:
    """What the official evaluation (`evalInstanceLevelSemanticLabeling`) finds in one frame.

    Truths told apart and of at least SMALLEST_REGION pixels are to be found, at an IoU above the overlap. A prediction
    that matches a group or a small truth is ignored, and so is an unmatched one of which a share above the overlap
    lies on void pixels, groups or small truths. With `boundary_ratio` the smaller of mask IoU and Boundary IoU counts,
    as in Cheng et al. (CVPR 2021), and truths whose boundary region the prediction's does not touch are not looked at.
    InputError where the sizes of image and predictions differ.
    """
    check_frame(truth, frame)
    dilation = None if boundary_ratio is None else dilation_px(truth.width, truth.height, boundary_ratio)
    parts = [CityscapesMatches(unknown=sum(one.category_id not in EVALUATED for one in frame.instances))]
    for k, category in enumerate(EVALUATED):
        truths = [one for one in truth.instances if one.category_id == category]
        predictions = [one for one in frame.instances if one.category_id == category and one.mask.any()]
        if truths or predictions:
            parts.append(_match_class(k, truths, predictions, truth.void, dilation))
    return CityscapesMatches.merge(parts)


def _match_class(
    k: int, truths: list[TrueInstance], predictions: list[Instance], void: np.ndarray | None, dilation: int | None
) -> CityscapesMatches:
    pixels, true_pixels = areas(predictions), areas(truths)
    group = np.array([one.crowd for one in truths], bool)
    small = true_pixels < SMALLEST_REGION
    wanted = ~group & ~small
    common, overlap = _overlaps(predictions, truths, dilation)
    above = overlap > OVERLAPS[:, None, None]
    on_void = np.array([_void_pixels(one, void) for one in predictions], np.int64)
    # The official script counts a truth that is both a group and small twice.
    ignored_share = (on_void + common @ (group.astype(np.int64) + small)) / pixels
    wrong = ~above.any(axis=2) & (ignored_share <= OVERLAPS[:, None])

    score = np.array([one.score for one in predictions], float)
    rows = [(score, np.zeros(len(predictions), np.uint16), pack(wrong))]
    missed = np.zeros((len(EVALUATED), len(OVERLAPS)), np.int64)
    for j in np.flatnonzero(wanted):
        hits = above[:, :, j]
        missed[k] += ~hits.any(axis=1)
        found = np.flatnonzero(hits.any(axis=0))
        if len(found):
            # Of several predictions on one truth the best is right and the others are wrong.
            hits = hits[:, found]
            best = np.where(hits, score[found], -np.inf).argmax(axis=1)
            right = hits & (np.arange(len(found)) == best[:, None])
            rows.append((score[found], pack(right), pack(hits & ~right)))
    scores, rights, wrongs = (np.concatenate(column) for column in zip(*rows))
    counted = (rights | wrongs) != 0

    return CityscapesMatches(
        np.full(np.count_nonzero(counted), EVALUATED[k], np.int64),
        scores[counted],
        rights[counted],
        wrongs[counted],
        missed,
        (np.arange(len(EVALUATED)) == k) * np.count_nonzero(wanted),
    )


def _overlaps(
    predictions: list[Instance], truths: list[TrueInstance], dilation: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Common pixels int64 and IoU float64 of all pairs: (predictions, truths)."""
    common = intersections(predictions, truths)
    overlap = common / (areas(predictions)[:, None] + areas(truths) - common)
    if dilation is None or not common.any():
        return common, overlap
    ours = [boundary_region(one, dilation) for one in predictions]
    theirs = [boundary_region(one, dilation) for one in truths]
    on_boundary = intersections(ours, theirs)
    boundary_overlap = on_boundary / (areas(ours)[:, None] + areas(theirs) - on_boundary)
    return np.where(on_boundary > 0, common, 0), np.minimum(overlap, boundary_overlap)


def _void_pixels(instance: Instance, void: np.ndarray | None) -> int:
    if void is None:
        return 0
    (left, top), (height, width) = instance.origin, instance.mask.shape
    return int(np.count_nonzero(void[top : top + height, left : left + width] & instance.mask))


def cityscapes_ap(matches: CityscapesMatches) -> CityscapesAP:
    """AP of every class from the sum of all frames: the numbers of the official script.

    Where all of a class's predictions are ignored and some truths were to be found, AP is 0; the official script fails.
    """
    table = np.full((len(EVALUATED), len(OVERLAPS)), np.nan)
    for k, category in enumerate(EVALUATED):
        if not matches.truths[k]:
            continue
        chosen = np.flatnonzero(matches.category == category)
        chosen = chosen[np.argsort(matches.score[chosen], kind="stable")]
        for o in range(len(OVERLAPS)):
            right, wrong = unpack(matches.right[chosen], o), unpack(matches.wrong[chosen], o)
            counted = right | wrong
            table[k, o] = _area_under_curve(matches.score[chosen][counted], right[counted], matches.missed[k, o])
    return CityscapesAP(table, matches.unknown)


def _area_under_curve(score: np.ndarray, right: np.ndarray, missed: int) -> float:
    """Area under precision over recall; `score` ascends, `right` (n,) bool."""
    if len(score) == 0:
        return 0.0
    first = np.flatnonzero(np.append(True, score[1:] != score[:-1]))
    below = np.append(0, np.cumsum(right))[first]
    found = np.count_nonzero(right) - below
    precision = np.append(found / (len(score) - first), 1.0)
    recall = np.append(found / (np.count_nonzero(right) + missed), 0.0)
    # Each point stands for half of the steps to its two neighbours; the first and last recall are repeated.
    padded = np.concatenate([recall[:1], recall, [0.0]])
    return float(np.dot(precision, 0.5 * padded[:-2] - 0.5 * padded[2:]))
