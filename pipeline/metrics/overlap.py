"""How far masks that are cut to their boxes overlap, without painting them into the frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.ground_truth import TrueFrame, TrueInstance
from pipeline.records import Frame, InputError, Instance


class Located(Protocol):
    """A mask (h, w) bool cut to a box, and the (x, y) of the box's top left pixel in the frame."""

    @property
    def mask(self) -> np.ndarray: ...

    @property
    def origin(self) -> tuple[int, int]: ...


class Region(NamedTuple):
    """A part of a frame that is no instance, such as an instance's boundary."""

    mask: np.ndarray
    origin: tuple[int, int]


class Box(NamedTuple):
    """A half-open rectangle of a frame in pixels."""

    left: int
    top: int
    right: int
    bottom: int


def box_of(*regions: Located, margin: int = 0) -> Box:
    """The smallest box around all regions that are not empty, wider by `margin` pixels on each side."""
    held = [region for region in regions if region.mask.size]
    if not held:
        return Box(0, 0, 0, 0)
    return Box(
        min(region.origin[0] for region in held) - margin,
        min(region.origin[1] for region in held) - margin,
        max(region.origin[0] + region.mask.shape[1] for region in held) + margin,
        max(region.origin[1] + region.mask.shape[0] for region in held) + margin,
    )


def within_frame(box: Box, width: int, height: int) -> Box:
    """The part of the box that lies in a frame of `width` x `height` pixels."""
    return Box(max(box.left, 0), max(box.top, 0), min(box.right, width), min(box.bottom, height))


def mask_within(region: Located, box: Box) -> np.ndarray:
    """What the region covers of the box: (bottom - top, right - left) bool, False beyond the region's own box."""
    out = np.zeros((box.bottom - box.top, box.right - box.left), bool)
    common = _common(box_of(region), box)
    if common.left < common.right and common.top < common.bottom:
        rows = slice(common.top - box.top, common.bottom - box.top)
        out[rows, common.left - box.left : common.right - box.left] = _view(region, common)
    return out


def intersection(first: Located, second: Located) -> int:
    """Number of pixels that both regions have."""
    common = _common(box_of(first), box_of(second))
    if common.left >= common.right or common.top >= common.bottom:
        return 0
    return int(np.count_nonzero(_view(first, common) & _view(second, common)))


def intersections(first: Sequence[Located], second: Sequence[Located]) -> np.ndarray:
    """`intersection` of all pairs: (len(first), len(second)) int64. Pairs whose boxes are apart cost nearly nothing."""
    counts = np.zeros((len(first), len(second)), np.int64)
    if counts.size:
        ours = np.array([box_of(region) for region in first])[:, None]
        theirs = np.array([box_of(region) for region in second])
        touching = np.minimum(ours[..., 2:], theirs[:, 2:]) > np.maximum(ours[..., :2], theirs[:, :2])
        for i, j in np.argwhere(touching.all(axis=-1)).tolist():
            counts[i, j] = intersection(first[i], second[j])
    return counts


def areas(regions: Sequence[Located]) -> np.ndarray:
    """Number of pixels of each region: (n,) int64."""
    return np.array([np.count_nonzero(region.mask) for region in regions], np.int64)


def iou_matrix(
    predictions: Sequence[Located], truths: Sequence[Located], crowd: np.ndarray | bool = False
) -> np.ndarray:
    """Intersection over union of all pairs, (predictions, truths) float64, as pycocotools' `iou` gives it.

    For a truth whose `crowd` (truths,) bool is set it is the intersection over the prediction's pixels. Pairs without
    a common pixel have 0, also where both are empty.
    """
    common = intersections(predictions, truths)
    ours = areas(predictions)[:, None]
    union = np.where(crowd, ours, ours + areas(truths) - common)
    return np.divide(common, union, out=np.zeros(common.shape), where=common > 0)


def best_truths(
    predictions: Sequence[Instance], truths: Sequence[TrueInstance]
) -> list[tuple[TrueInstance | None, float]]:
    """For each prediction the truth of its class that overlaps it most, and their IoU; None and 0 where none does."""
    found: list[tuple[TrueInstance | None, float]] = [(None, 0.0)] * len(predictions)
    for category in {one.category_id for one in predictions}:
        same = [one for one in truths if one.category_id == category]
        places = [i for i, one in enumerate(predictions) if one.category_id == category]
        for i, ious in zip(places, iou_matrix([predictions[i] for i in places], same)):
            if ious.any():
                found[i] = same[int(ious.argmax())], float(ious.max())
    return found


def check_frame(truth: TrueFrame, frame: Frame) -> None:
    """InputError where predictions are not for an image of the ground truth's size, or reach beyond it."""
    if (frame.width, frame.height) != (truth.width, truth.height):
        found = f"predictions for {frame.width} x {frame.height} pixels"
        raise InputError(f"{_name(frame)}: {found}, expected {truth.width} x {truth.height} as in the ground truth")
    for instance in frame.instances:
        box = box_of(instance)
        if within_frame(box, frame.width, frame.height) != box:
            expected = f"expected it within {frame.width} x {frame.height}"
            raise InputError(f"{_name(frame)}: instance {instance.instance_id} covers {tuple(box)} pixels, {expected}")


def _name(frame: Frame) -> str:
    return frame.file_name or frame.frame_id


def _common(first: Box, second: Box) -> Box:
    return Box(
        max(first.left, second.left),
        max(first.top, second.top),
        min(first.right, second.right),
        min(first.bottom, second.bottom),
    )


def _view(region: Located, box: Box) -> np.ndarray:
    left, top = region.origin
    return region.mask[box.top - top : box.bottom - top, box.left - left : box.right - left]
