import numpy as np
import pytest

from pipeline.metrics.boundary import boundary_f_score
from pipeline.metrics.patches import PatchScores
from tests.conftest import blob


def _masks(count, seed):
    rng = np.random.default_rng(seed)
    target = np.stack([blob(32, 32, rng) for _ in range(count)])
    return np.roll(target, 3, axis=2), np.roll(target, 1, axis=1), target


def test_perfect_masks_score_one():
    _, _, target = _masks(3, 0)
    scores = PatchScores()
    scores.add(target, target, target)
    assert scores.result()["after"] == dict.fromkeys(("mIoU", "mAcc", "aAcc", "boundary_f1", "boundary_f3"), 1.0)


def test_the_scores_of_a_known_pair_are_those_counted_by_hand():
    target = np.zeros((1, 4, 4), np.uint8)
    target[0, :, 2:] = 1
    coarse = np.zeros((1, 4, 4), np.uint8)
    coarse[0, :, 1:] = 1
    scores = PatchScores()
    scores.add(coarse, target, target)
    before = scores.result()["before"]
    assert before["mIoU"] == pytest.approx((4 / 8 + 8 / 12) / 2)
    assert before["mAcc"] == pytest.approx((4 / 8 + 8 / 8) / 2)
    assert before["aAcc"] == pytest.approx(12 / 16)
    assert before["boundary_f1"] == boundary_f_score(coarse[0], target[0], 1)
    assert scores.result()["after"]["mIoU"] == 1


def test_the_boundary_score_is_the_mean_over_patches():
    coarse, refined, target = _masks(4, 1)
    scores = PatchScores()
    scores.add(coarse, refined, target)
    for name, masks in (("before", coarse), ("after", refined)):
        expected = np.mean([boundary_f_score(mask, truth, 3) for mask, truth in zip(masks, target)])
        assert scores.result()[name]["boundary_f3"] == pytest.approx(expected)


def test_shares_of_several_processes_add_up_to_the_whole():
    coarse, refined, target = _masks(6, 2)
    whole, one, two = PatchScores(), PatchScores(), PatchScores()
    whole.add(coarse, refined, target)
    one.add(coarse[::2], refined[::2], target[::2])
    two.add(coarse[1::2], refined[1::2], target[1::2])
    merged = (one + PatchScores() + two).result()
    for name, scores in whole.result().items():
        assert merged[name] == pytest.approx(scores)


def test_a_class_that_occurs_nowhere_is_left_out_of_the_means():
    background = np.zeros((2, 8, 8), bool)
    scores = PatchScores()
    scores.add(background, background, background)
    assert scores.result()["after"]["mIoU"] == scores.result()["after"]["mAcc"] == 1
