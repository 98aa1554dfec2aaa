import cv2
import numpy as np
import pytest

from model.augment import (
    WOBBLE_PX,
    Augmentation,
    augment,
    distort,
    flip,
    invert,
    middle,
    perturb,
    turn,
    vary,
    warp,
)
from tests.conftest import random_patches

INF, NAN = float("inf"), float("nan")


@pytest.fixture
def patches():
    return np.concatenate([random_patches(64), random_patches(64, seed=1)[..., 3:]], axis=-1)


def test_a_flip_mirrors_image_and_masks_together(patches):
    flipped = flip(patches, np.random.default_rng(0))
    mirrored = [np.array_equal(new, old[:, ::-1]) for new, old in zip(flipped, patches)]
    unchanged = [np.array_equal(new, old) for new, old in zip(flipped, patches)]
    assert all(m != u for m, u in zip(mirrored, unchanged))
    assert 16 < sum(mirrored) < 48


def test_a_turn_rotates_image_and_masks_together(patches):
    turned = turn(patches, np.random.default_rng(0))
    quarters = [[np.array_equal(new, np.rot90(old, k)) for k in range(4)] for new, old in zip(turned, patches)]
    assert all(sum(matches) == 1 for matches in quarters)
    assert np.all(np.sum(quarters, axis=0) > 5)


def test_inversion_swaps_object_and_background_in_both_masks_or_none(patches):
    inverted = invert(patches, np.random.default_rng(0))
    assert np.array_equal(inverted[..., :3], patches[..., :3])
    swapped = [np.array_equal(new[..., 3:], 1 - old[..., 3:]) for new, old in zip(inverted, patches)]
    unchanged = [np.array_equal(new, old) for new, old in zip(inverted, patches)]
    assert all(s != u for s, u in zip(swapped, unchanged))
    assert 16 < sum(swapped) < 48


@pytest.mark.parametrize("change", [distort, vary])
def test_changes_of_the_image_leave_the_masks_alone(patches, change):
    changed = change(patches, np.random.default_rng(0))
    assert np.array_equal(changed[..., 3:], patches[..., 3:])
    assert sum(not np.array_equal(new, old) for new, old in zip(changed, patches)) > 40


def test_colours_are_distorted_as_far_as_by_the_reference_and_no_further():
    brightness, (low, high), hue_degrees = 32, (0.5, 1.5), 36
    coloured = np.full((600, 2, 2, 5), (120, 90, 60, 1, 0), np.uint8)
    changed = distort(coloured, np.random.default_rng(0))[:, :1, 0, :3]
    hue, saturation, value = np.moveaxis(cv2.cvtColor(changed.astype(np.float32) / 255, cv2.COLOR_RGB2HSV), -1, 0)
    turned = (hue - 30 + 180) % 360 - 180
    assert -hue_degrees - 3 < turned.min() < -hue_degrees + 6
    assert hue_degrees - 6 < turned.max() < hue_degrees + 3
    # Brightness moves the darkest channel as far as the brightest.
    least, most = 60 / (120 + brightness) * low, 60 / (120 - brightness) * high
    assert least - 0.02 < saturation.min() < least + 0.06
    assert 0.85 < saturation.max() < most + 0.02
    assert (120 - brightness) * low - 1 < 255 * value.min() < 55
    assert 215 < 255 * value.max() < (120 + brightness) * high + 1


def test_a_perturbed_contour_moves_by_a_few_pixels_and_nothing_else_changes():
    patches = np.zeros((40, 64, 64, 5), np.uint8)
    patches[:, :, 32:, 3:] = 1
    changed = perturb(patches, 0.5, np.random.default_rng(0))
    assert np.array_equal(changed[..., [0, 1, 2, 4]], patches[..., [0, 1, 2, 4]])
    shifts = [row.sum(axis=1).astype(int) - 32 for row in changed[..., 3]]
    assert min(map(np.min, shifts)) < -1
    assert max(map(np.max, shifts)) > 1
    moved = [np.abs(shift).max() for shift in shifts]
    assert max(moved) <= 2 * WOBBLE_PX
    assert 10 < sum(distance > 0 for distance in moved) < 30


def test_a_warp_moves_image_and_masks_together():
    patches = np.zeros((20, 96, 96, 5), np.uint8)
    patches[:, 20:60, 30:80] = (200, 200, 200, 1, 1)
    warped = warp(patches, 64, 30, 1.3, np.random.default_rng(0))
    assert warped.shape == (20, 64, 64, 5)
    assert np.array_equal(warped[..., 3], warped[..., 4])
    assert ((warped[..., 0] > 100) == warped[..., 4].astype(bool)).mean() > 0.99
    assert len({patch[..., 4].tobytes() for patch in warped}) == 20


def test_without_rotation_the_middle_of_a_padded_patch_is_shown(patches):
    kept = augment(patches, 32, Augmentation(flip=False, distort=False), np.random.default_rng(0))
    assert np.array_equal(kept, patches[:, 16:48, 16:48])
    assert np.array_equal(middle(patches, 32), kept)


@pytest.mark.parametrize(
    "setting", [{"perturb": 1.5}, {"rescale": 0.5}, {"rescale": INF}, {"rotate": INF}, {"rotate": NAN}]
)
def test_settings_without_meaning_are_refused(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is"):
        Augmentation(**setting)


def test_the_same_generator_gives_the_same_patches_and_the_input_stays(patches):
    everything = Augmentation(turn=True, rotate=20, rescale=1.2, invert=True, vary=True, perturb=0.5)
    before = patches.copy()
    first, second = (augment(patches, 64, everything, np.random.default_rng(2)) for _ in range(2))
    assert np.array_equal(first, second)
    assert np.array_equal(patches, before)
    assert first.dtype == np.uint8
    assert set(np.unique(first[..., 3:])) == {0, 1}
