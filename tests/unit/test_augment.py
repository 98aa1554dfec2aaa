import numpy as np

from model.augment import distort, flip
from tests.conftest import random_patches


def _training_patches(count):
    return np.concatenate([random_patches(count), random_patches(count, seed=1)[..., 3:]], axis=-1)


def test_a_flip_mirrors_image_and_masks_together():
    patches = _training_patches(64)
    flipped = flip(patches, np.random.default_rng(0))
    mirrored = [np.array_equal(new, old[:, ::-1]) for new, old in zip(flipped, patches)]
    unchanged = [np.array_equal(new, old) for new, old in zip(flipped, patches)]
    assert all(m != u for m, u in zip(mirrored, unchanged))
    assert 16 < sum(mirrored) < 48


def test_distortion_touches_the_image_only():
    patches = _training_patches(32)
    distorted = distort(patches, np.random.default_rng(0))
    assert np.array_equal(distorted[..., 3:], patches[..., 3:])
    changed = [not np.array_equal(new, old) for new, old in zip(distorted, patches)]
    assert sum(changed) > 24
