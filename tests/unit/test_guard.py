from dataclasses import replace

import numpy as np
import pytest

from pipeline.guard import REASONS, GuardConfig, judge, passed_over
from pipeline.records import InputError
from tests.conftest import blob

GUARD = GuardConfig(min_area=0)


@pytest.fixture
def coarse():
    """A square of 40 x 40 pixels in the middle of 100 x 100."""
    mask = np.zeros((100, 100), bool)
    mask[30:70, 30:70] = True
    return mask


def sure(refined):
    """Probabilities of a network that is certain of the mask."""
    return refined.astype(np.float32)


def filled(mask, rows, columns, value=True):
    out = mask.copy()
    out[rows, columns] = value
    return out


ALL, NONE = slice(None), slice(0, 0)


@pytest.mark.parametrize(
    ("rows", "columns", "value", "reason"),
    [
        (ALL, ALL, False, "empty"),
        (ALL, ALL, True, "exploded"),
        (slice(20, 100), slice(14, 76), True, "exploded"),
        (slice(20, 100), slice(16, 75), True, ""),
        (slice(43, 100), ALL, False, "shrunk"),
        (slice(44, 100), ALL, False, ""),
        (NONE, NONE, True, ""),
        (slice(65, 75), slice(30, 70), True, ""),
    ],
)
def test_an_absurd_mask_is_rejected_and_a_plausible_one_taken(coarse, rows, columns, value, reason):
    refined = filled(coarse, rows, columns, value)
    verdict = judge(coarse, refined, sure(refined), GUARD)
    assert (verdict.status, verdict.reason) == ("rejected" if reason else "refined", reason)
    assert np.array_equal(verdict.mask, coarse if reason else refined)


def test_a_mask_that_moved_away_is_rejected_for_its_iou(coarse):
    taken, refined = np.roll(coarse, 21, axis=1), np.roll(coarse, 22, axis=1)
    assert judge(coarse, taken, sure(taken), GUARD).status == "refined"
    verdict = judge(coarse, refined, sure(refined), GUARD)
    assert verdict[1:] == ("rejected", "iou")
    assert judge(coarse, refined, sure(refined), replace(GUARD, min_iou=0.2)).status == "refined"


def test_a_change_of_doubtful_pixels_is_rejected_and_one_of_certain_pixels_taken(coarse):
    refined = filled(coarse, slice(70, 75), slice(30, 70))
    mean = np.full(coarse.shape, np.nan, np.float32)
    for probability, reason in ((0.7, "uncertain"), (0.75, "")):
        mean[60:90] = np.where(refined[60:90], probability, 0.0)
        assert judge(coarse, refined, mean, GUARD).reason == reason
    assert judge(coarse, refined, mean, replace(GUARD, min_confidence=0.6)).reason == "uncertain"


def test_pieces_apart_from_the_boundary_are_taken_back_and_the_rest_of_the_change_stays(coarse):
    grown = filled(coarse, slice(70, 73), slice(30, 70))
    refined = filled(filled(grown, slice(5, 10), slice(5, 10)), slice(48, 52), slice(48, 52), False)
    verdict = judge(coarse, refined, sure(refined), GUARD)
    assert verdict[1:] == ("refined", "far_pieces")
    assert np.array_equal(verdict.mask, grown)


def test_a_piece_is_far_by_its_nearest_pixel(coarse):
    for gap, taken in ((0, True), (1, False), (2, False)):
        refined = filled(coarse, slice(70 + gap, 76), slice(40, 60))
        assert np.array_equal(judge(coarse, refined, sure(refined), GUARD).mask, refined if taken else coarse)
        wider = judge(coarse, refined, sure(refined), replace(GUARD, max_distance=2)).mask
        assert np.array_equal(wider, refined if gap < 2 else coarse)


def test_a_piece_that_touches_a_corner_of_the_coarse_mask_is_near(coarse):
    refined = filled(coarse, slice(70, 75), slice(70, 75))
    assert judge(coarse, refined, sure(refined), GUARD).reason == ""


def test_a_mask_cut_by_the_windows_edge_has_its_boundary_there():
    coarse = np.ones((20, 20), bool)
    refined = filled(coarse, slice(0, 5), slice(0, 5), False)
    assert np.array_equal(judge(coarse, refined, sure(refined), GUARD).mask, refined)


def test_small_and_empty_masks_are_passed_over(coarse):
    assert passed_over(coarse, GuardConfig(min_area=1600)) == ""
    assert passed_over(coarse, GuardConfig(min_area=1601)) == "too_small"
    assert passed_over(coarse, GuardConfig(enabled=False, min_area=1601)) == ""
    assert passed_over(np.zeros((0, 0), bool), GuardConfig(enabled=False)) == "no_boundary"


def test_switched_off_it_takes_whatever_comes(coarse):
    nothing = np.zeros_like(coarse)
    verdict = judge(coarse, nothing, sure(nothing), GuardConfig(enabled=False))
    assert verdict.mask is nothing
    assert verdict[1:] == ("refined", "")


@pytest.mark.parametrize("seed", range(30))
def test_the_verdict_is_never_empty_and_lies_between_the_coarse_and_the_refined_mask(seed):
    rng = np.random.default_rng(seed)
    coarse = blob(60, 80, rng) != 0
    noise = rng.random((60, 80), np.float32) ** rng.choice([0.1, 1.0, 10.0])
    covered = rng.random((60, 80)) < rng.random()
    mean = np.where(covered, noise, np.nan).astype(np.float32)
    refined = np.where(covered, noise > 0.5, coarse)
    loose = GuardConfig(min_area=0, min_confidence=0, min_iou=0, min_area_ratio=0, max_area_ratio=1e9)
    for config in (GUARD, loose):
        before = coarse.copy(), refined.copy()
        mask, status, reason = judge(coarse, refined, mean, config)
        assert mask.any()
        assert not ((mask != coarse) & (mask != refined)).any()
        assert reason in REASONS[status] or (status, reason) == ("refined", "")
        assert status != "rejected" or np.array_equal(mask, coarse)
        assert np.array_equal(before[0], coarse)
        assert np.array_equal(before[1], refined)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"min_area": -1}, "guard.min_area is -1: expected at least 0"),
        ({"min_confidence": 1.5}, "guard.min_confidence is 1.5: expected a number from 0 to 1"),
        ({"min_iou": float("nan")}, "guard.min_iou is nan: expected a number from 0 to 1"),
        ({"max_area_ratio": float("nan")}, "guard.max_area_ratio is nan: expected at least 1"),
        ({"max_distance": 0}, "guard.max_distance is 0: expected at least 1"),
    ],
)
def test_a_threshold_out_of_range_is_named(setting, expected):
    with pytest.raises(InputError) as caught:
        GuardConfig(**setting)
    assert str(caught.value) == expected
