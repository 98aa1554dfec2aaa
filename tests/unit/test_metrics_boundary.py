from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pipeline.metrics.boundary import (
    CITYSCAPES_RATIO,
    COCO_RATIO,
    boundary_f_score,
    boundary_iou,
    boundary_region,
    contour,
    contour_region,
    dilation_px,
    iou,
)
from pipeline.metrics.overlap import Box, Region, mask_within
from pipeline.records import cut_to_box
from tests.conftest import blob
from tests.scenes import square

_square = partial(square, top=20, size=(80, 90))


def test_equal_masks_score_one():
    mask = blob(80, 90, np.random.default_rng(0))
    assert iou(mask, mask) == 1
    assert boundary_f_score(mask, mask, 0) == 1


def test_iou_of_a_shifted_square_is_the_share_of_the_overlap():
    assert iou(_square(20), _square(30)) == pytest.approx(20 * 30 / (40 * 30))


def test_a_shift_counts_only_beyond_the_tolerance():
    assert boundary_f_score(_square(20), _square(22), 2) == 1
    assert boundary_f_score(_square(20), _square(22), 1) < 0.6


def test_the_score_equals_a_plain_search_for_the_nearest_contour_pixel():
    rng = np.random.default_rng(3)
    mask, target = blob(60, 70, rng), blob(60, 70, rng)
    ours, theirs = np.argwhere(contour(mask)), np.argwhere(contour(target))
    distance = np.sqrt(((ours[:, None] - theirs[None]) ** 2).sum(-1))
    precision, recall = (distance.min(1) <= 2).mean(), (distance.min(0) <= 2).mean()
    assert boundary_f_score(mask, target, 2) == pytest.approx(2 * precision * recall / (precision + recall))


def test_an_empty_mask_has_no_boundary():
    empty = np.zeros((80, 90), bool)
    assert boundary_f_score(empty, empty, 3) == 1
    assert boundary_f_score(empty, _square(20), 3) == 0
    assert iou(empty, empty) == 1


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_the_boundary_region_equals_a_search_for_the_nearest_pixel_beyond_the_mask(seed, dilation):
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.random((3, 4)) < 0.6, np.ones((9, 8), bool))
    beyond = np.argwhere(~np.pad(mask, 1)) - 1
    inside = np.argwhere(mask)
    distance = np.abs(inside[:, None] - beyond).max(-1).min(1)
    expected = np.zeros(mask.shape, bool)
    expected[tuple(inside[distance <= dilation].T)] = True
    held, origin = cut_to_box(mask)
    assert np.array_equal(mask_within(boundary_region(Region(held, origin), dilation), Box(0, 0, 32, 27)), expected)


def test_boundary_iou_of_a_shifted_square_by_hand():
    ours, theirs = Region(np.ones((30, 30), bool), (20, 20)), Region(np.ones((30, 30), bool), (22, 20))
    ring = 30 * 30 - 24 * 24
    both = boundary_region(ours, 3)
    common = np.count_nonzero(both.mask[:, 2:] & boundary_region(theirs, 3).mask[:, :-2])
    assert boundary_iou(ours, theirs, 3) == pytest.approx(common / (2 * ring - common))


def test_boundary_iou_is_that_of_the_masks_where_they_are_thinner_than_the_region():
    ours, theirs = Region(np.ones((4, 20), bool), (0, 0)), Region(np.ones((4, 20), bool), (10, 0))
    assert boundary_iou(ours, theirs, 2) == pytest.approx(1 / 3)
    assert boundary_iou(Region(np.zeros((0, 0), bool), (0, 0)), Region(np.zeros((0, 0), bool), (0, 0)), 2) == 1


def test_the_region_is_a_share_of_the_diagonal_wide_and_at_least_a_pixel():
    assert dilation_px(640, 480, COCO_RATIO) == 16
    assert dilation_px(2048, 1024, CITYSCAPES_RATIO) == 11
    assert dilation_px(20, 20, CITYSCAPES_RATIO) == 1


def test_boundary_regions_equal_the_independent_implementation():
    import faster_coco_eval.core.mask as independent

    rng = np.random.default_rng(2)
    for _ in range(10):
        mask = np.kron(rng.random((4, 5)) < 0.6, np.ones((20, 20), bool)).astype(np.uint8)
        encoded = coco_mask.encode(np.asfortranarray(mask))
        theirs = coco_mask.decode(independent.rleToBoundary(encoded, COCO_RATIO))
        held, origin = cut_to_box(mask)
        ours = boundary_region(Region(held, origin), dilation_px(100, 80, COCO_RATIO))
        assert np.array_equal(mask_within(ours, Box(0, 0, 100, 80)), theirs != 0)


def test_a_contour_cut_to_its_box_is_that_of_the_whole_frame():
    for left in (0, 20, 60):
        mask = _square(left, top=0)
        held, origin = cut_to_box(mask)
        ours = contour_region(Region(held, origin), 90, 80)
        assert np.array_equal(mask_within(ours, Box(0, 0, 90, 80)), contour(mask) != 0)
