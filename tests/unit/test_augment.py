import numpy as np
import pytest

from model.augment import augment, distort, flip, invert, turn, vary
from tests.conftest import random_patches


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


def test_the_same_generator_gives_the_same_patches_and_the_input_stays(patches):
    before = patches.copy()
    first, second = (augment(patches, np.random.default_rng(2)) for _ in range(2))
    assert np.array_equal(first, second)
    assert np.array_equal(patches, before)
    assert first.dtype == np.uint8
    assert set(np.unique(first[..., 3:])) == {0, 1}
