"""What the proposals promise: greedy suppression exactly, few boxes, full cover, boxes inside the frame."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.proposals import (
    SUPPRESSED,
    TieOrder,
    boundary_strength,
    longest_stride,
    move_into_frame,
    propose,
    row_major,
    suppress,
)
from tests.conftest import golden_cases

THRESHOLDS = (0.15, 0.25, 0.55)

Boxes = np.ndarray


def blob(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width) uint8 0/1, one or more smooth blobs around the centre."""
    noise = cv2.GaussianBlur(rng.standard_normal((height, width)).astype(np.float32), (0, 0), max(height / 9, 1))
    ys, xs = np.mgrid[:height, :width]
    radius = np.hypot((ys - height / 2) / (height / 2), (xs - width / 2) / (width / 2))
    return (0.35 * noise / noise.std() + 0.75 > radius).astype(np.uint8)


def propose_in_frame(mask: np.ndarray, threshold: float, **options: object) -> Boxes:
    """`propose` for a mask (H, W) of the frame's size."""
    x, y, w, h = cv2.boundingRect(mask)
    return propose(mask[y : y + h, x : x + w], (x, y), mask.shape[::-1], threshold, **options)  # type: ignore[arg-type]


def uncovered_px(mask: np.ndarray, boxes: Boxes) -> int:
    """Boundary pixels of a mask (H, W) that lie in no box."""
    uncovered = boundary_strength(mask)
    for x1, y1, x2, y2 in boxes:
        uncovered[max(y1, 0) : y2, max(x1, 0) : x2] = 0
    return int(np.count_nonzero(uncovered))


def first_in_row_major(xs: np.ndarray, ys: np.ndarray, kept: list[tuple[int, int]], threshold: float, side: int) -> int:
    return int(np.lexsort((xs, ys))[0])


def farthest_in_reach(xs: np.ndarray, ys: np.ndarray, kept: list[tuple[int, int]], threshold: float, side: int) -> int:
    """The candidate in reach of a kept box that is least close to its closest one; the first if none is in reach."""
    closeness = np.zeros(len(xs), int)
    for x, y in kept:
        dx, dy = np.abs(xs - x), np.abs(ys - y)
        halfway = (side - (dx + 1) / 2) * (side - (dy + 1) / 2)
        in_reach = (halfway / (2 * side**2 - halfway) > threshold) & (np.maximum(dx, dy) <= side)
        closeness = np.maximum(closeness, np.where(in_reach, halfway * 254 // side**2, 0).astype(int))
    candidates = np.flatnonzero(closeness > 0)
    return int(candidates[closeness[candidates].argmin()]) if len(candidates) else 0


def brute_force(strength: np.ndarray, threshold: float, side: int, choose: Callable[..., int]) -> np.ndarray:
    """Greedy suppression of every candidate against every kept box, (N, 2) x, y."""
    kept: list[tuple[int, int]] = []
    alive = strength.copy()
    while alive.any():
        ys, xs = np.nonzero(alive == alive.max())
        at = choose(xs, ys, kept, threshold, side)
        kept.append((int(xs[at]), int(ys[at])))
        ys, xs = np.nonzero(alive)
        overlap = (side - np.abs(xs - kept[-1][0])).clip(0) * (side - np.abs(ys - kept[-1][1])).clip(0)
        dropped = overlap / (2 * side**2 - overlap) > threshold
        alive[ys[dropped], xs[dropped]] = 0
    return np.array(kept, np.int32).reshape(-1, 2)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("threshold", [*THRESHOLDS, 0.0, 0.8])
@pytest.mark.parametrize(
    ("tie_order", "choose"),
    [(row_major, first_in_row_major), (longest_stride, farthest_in_reach)],
    ids=["row_major", "longest_stride"],
)
def test_suppression_equals_comparing_every_pair(
    tie_order: TieOrder, choose: Callable[..., int], threshold: float, side: int
) -> None:
    rng = np.random.default_rng(0)
    masks = [blob(rng, int(h), int(w)) for h, w in rng.integers(5, 140, (5, 2))]
    masks.append((rng.random((25, 25)) < 0.5).astype(np.uint8))
    for mask in masks:
        strength = boundary_strength(np.pad(mask, 1))
        kept = suppress(strength, threshold, side, tie_order)
        np.testing.assert_array_equal(kept, brute_force(strength, threshold, side, choose))


def test_suppression_is_exact_for_boundaries_longer_than_a_block() -> None:
    strength = boundary_strength((np.random.default_rng(1).random((130, 120)) < 0.5).astype(np.uint8))
    assert (strength == 4).sum() > 3000
    for threshold in THRESHOLDS:
        kept = suppress(strength, threshold, 32, row_major)
        np.testing.assert_array_equal(kept, brute_force(strength, threshold, 32, first_in_row_major))
        # Any order must leave every candidate suppressed by a kept box, and no kept box by another.
        kept = suppress(strength, threshold, 32, longest_stride)
        again = np.zeros_like(strength)
        again[kept[:, 1], kept[:, 0]] = 1
        assert len(suppress(again, threshold, 32, row_major)) == len(kept)


def test_a_straight_contour_is_covered_in_steps_of_a_patch() -> None:
    mask = np.zeros((300, 500), np.uint8)
    mask[150:] = 1
    for threshold, step in ((0.15, 64), (0.25, 64), (0.55, 35)):
        kept = suppress(boundary_strength(mask)[:200, 10:-10], threshold, 64, longest_stride)
        steps = np.diff(np.sort(kept[:, 0]))
        assert (steps[:-1] == step).all()
        assert steps[-1] <= step


@dataclass(frozen=True)
class Case:
    mask: np.ndarray
    """(H, W) uint8 0/1."""
    outputs: Mapping[str, np.ndarray]
    """The reference's arrays, as golden/README.md names them."""


@pytest.fixture(scope="module")
def cases(golden: Path) -> dict[str, Case]:
    found = {}
    for case, outputs in golden_cases(golden):
        mask = cv2.imread(str(golden / "inputs" / "masks" / case["mask"]), cv2.IMREAD_GRAYSCALE)
        found[case["name"]] = Case(np.minimum(mask, 1), outputs)
    assert found
    return found


def key(threshold: float) -> str:
    return f"t{round(100 * threshold):03d}"


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (30, 40)])
def test_strength_counts_the_window_around_each_pixel_and_nothing_beyond_the_border(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape)
    for share in (0.1, 0.5, 0.9, 1.0):
        mask = rng.random(shape) < share
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (3, 3)).sum(axis=(2, 3))
        np.testing.assert_array_equal(boundary_strength(mask), np.minimum(windows, 9 - windows))
        np.testing.assert_array_equal(boundary_strength(mask * np.uint8(255)), boundary_strength(mask))


def test_strength_equals_the_references(cases: dict[str, Case]) -> None:
    for case in cases.values():
        np.testing.assert_array_equal(boundary_strength(case.mask), case.outputs["boundary"])


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_parity_boxes_equal_the_references_with_stable_ties(cases: dict[str, Case], threshold: float) -> None:
    for name, case in cases.items():
        boxes = propose_in_frame(case.mask, threshold, parity=True)
        np.testing.assert_array_equal(boxes, case.outputs[f"stable_boxes_{key(threshold)}"], err_msg=name)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("parity", [False, True], ids=["our border", "the reference's border"])
def test_default_order_needs_no_more_patches_and_leaves_no_more_uncovered_than_the_reference(
    cases: dict[str, Case], parity: bool, threshold: float
) -> None:
    kept = reference_kept = uncovered = reference_uncovered = 0
    for case in cases.values():
        boxes = propose_in_frame(case.mask, threshold, parity=parity, tie_order=longest_stride)
        theirs = case.outputs[f"boxes_{key(threshold)}"]
        kept, reference_kept = kept + len(boxes), reference_kept + len(theirs)
        uncovered += uncovered_px(case.mask, boxes)
        reference_uncovered += uncovered_px(case.mask, theirs)
    assert kept <= reference_kept
    assert uncovered <= reference_uncovered


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_default_order_needs_fewer_patches_than_other_orders(threshold: float) -> None:
    rng = np.random.default_rng(2)
    masks = [blob(rng, int(h), int(w)) for h, w in rng.integers(100, 500, (12, 2))]
    shuffled = np.random.default_rng(3)

    def at_random(closeness: np.ndarray) -> int:
        alive = np.flatnonzero(closeness != SUPPRESSED)
        return int(shuffled.choice(alive)) if len(alive) else 0

    def totals(tie_order: TieOrder | None) -> tuple[int, int]:
        boxes = [propose_in_frame(mask, threshold, tie_order=tie_order) for mask in masks]
        return sum(map(len, boxes)), sum(map(uncovered_px, masks, boxes))

    kept, uncovered = totals(None)
    random_kept, random_uncovered = totals(at_random)
    assert kept < random_kept < totals(row_major)[0]
    assert uncovered <= random_uncovered


def test_the_default_order_is_longest_stride_and_with_parity_row_major() -> None:
    mask = np.pad(blob(np.random.default_rng(4), 300, 200), 40)
    for parity, tie_order in ((False, longest_stride), (True, row_major)):
        expected = propose_in_frame(mask, 0.25, parity=parity, tie_order=tie_order)
        np.testing.assert_array_equal(propose_in_frame(mask, 0.25, parity=parity), expected)


def test_the_same_mask_gives_the_same_boxes_wherever_it_lies_and_whatever_its_type() -> None:
    mask = blob(np.random.default_rng(5), 150, 150)
    boxes = propose(mask, (100, 100), (400, 400), 0.25)
    for same in (mask, mask * 255, mask.astype(bool)):
        np.testing.assert_array_equal(propose(same, (100, 100), (400, 400), 0.25), boxes)
    np.testing.assert_array_equal(propose(mask, (310, 120), (900, 400), 0.25), boxes + np.array([210, 20, 210, 20]))


@pytest.mark.parametrize("parity", [False, True])
def test_an_empty_mask_has_no_boxes(parity: bool) -> None:
    boxes = propose(np.zeros((5, 7), np.uint8), (3, 4), (100, 100), 0.25, parity=parity)
    assert boxes.shape == (0, 4)
    assert boxes.dtype == np.int32


def test_a_single_pixel_has_one_box_around_it() -> None:
    boxes = propose(np.ones((1, 1), np.uint8), (50, 60), (200, 200), 0.25)
    assert len(boxes) == 1
    assert boxes.dtype == np.int32
    assert (boxes[0, 2:] - boxes[0, :2] == 64).all()
    assert (boxes[0, :2] < [49, 59]).all()
    assert (boxes[0, 2:] > [52, 62]).all()


@pytest.mark.parametrize("corner", [(0, 0), (199, 0), (0, 99), (199, 99)])
def test_a_single_pixel_in_a_corner_is_covered(corner: tuple[int, int]) -> None:
    box = propose(np.ones((1, 1), np.uint8), corner, (200, 100), 0.25)[0]
    assert (np.array([0, 0]) <= box[:2]).all()
    assert (box[:2] <= corner).all()
    assert (corner < box[2:]).all()
    assert (box[2:] <= [200, 100]).all()


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("size", [(64, 64), (65, 65), (64, 300), (200, 150), (301, 97)])
def test_boxes_lie_in_the_frame_cover_its_edge_and_differ(size: tuple[int, int], threshold: float) -> None:
    width, height = size
    mask = np.ones((height, width), np.uint8)
    boxes = propose_in_frame(mask, threshold)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [width, height]).all()
    assert (boxes[:, 2:] - boxes[:, :2] == 64).all()
    assert len(np.unique(boxes, axis=0)) == len(boxes)
    assert uncovered_px(mask, boxes) == 0


@pytest.mark.parametrize("parity", [False, True])
def test_a_frame_narrower_than_a_patch_keeps_whole_patches_from_its_start(parity: bool) -> None:
    mask = np.zeros((40, 200), np.uint8)
    mask[10:30, 60:120] = 1
    boxes = propose_in_frame(mask, 0.25, parity=parity)
    assert (boxes[:, 1] == 0).all()
    assert (boxes[:, 3] == 64).all()
    assert (boxes[:, 0] >= 0).all()
    assert (boxes[:, 2] <= 200).all()
    assert uncovered_px(mask, boxes) == 0


def test_a_box_that_ends_at_the_border_stays_and_moves_only_with_parity() -> None:
    at_border = np.array([[36, 46, 100, 110]], np.int32)
    np.testing.assert_array_equal(move_into_frame(at_border, 100, 110), at_border)
    np.testing.assert_array_equal(move_into_frame(at_border, 100, 110, parity=True), [[35, 45, 99, 109]])


def test_a_box_beyond_the_border_ends_at_it_and_with_parity_one_pixel_short() -> None:
    beyond = np.array([[50, -3, 114, 61], [-32, 80, 32, 144]], np.int32)
    np.testing.assert_array_equal(move_into_frame(beyond, 100, 110), [[36, 0, 100, 64], [0, 46, 64, 110]])
    np.testing.assert_array_equal(move_into_frame(beyond, 100, 110, parity=True), [[35, 0, 99, 64], [0, 45, 64, 109]])


def test_work_is_confined_to_the_masks_box() -> None:
    tracemalloc.start()
    try:
        boxes = propose(np.ones((1, 1), np.uint8), (12345, 9876), (20000, 20000), 0.25)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(boxes) == 1
    assert peak_bytes < 2**20
