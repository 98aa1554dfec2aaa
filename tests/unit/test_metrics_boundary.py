import numpy as np
import pytest

from pipeline.metrics.boundary import boundary_f_score, contour, iou
from tests.conftest import blob


def _square(left, top=20, side=30):
    mask = np.zeros((80, 90), bool)
    mask[top : top + side, left : left + side] = True
    return mask


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
