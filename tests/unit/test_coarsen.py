import numpy as np
import pytest

from model.coarsen import KINDS, coarsen
from tests.conftest import blob


def _iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.fixture
def precise():
    return blob(300, 400, np.random.default_rng(5))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_failure_changes_the_boundary_but_not_the_object(precise, kind):
    ious = []
    for seed in range(5):
        coarse = coarsen(precise, np.random.default_rng(seed), kind)
        ious.append(_iou(coarse, precise))
        assert coarse.dtype == np.uint8
        assert coarse.shape == precise.shape
        assert set(np.unique(coarse)) == {0, 1}
    assert 0.6 < min(ious) < 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_bool_and_in_the_order_of_pycocotools_are_coarsened_alike(precise, kind):
    expected = coarsen(precise, np.random.default_rng(0), kind)
    for same in (precise.astype(bool), np.asfortranarray(precise)):
        assert np.array_equal(coarsen(same, np.random.default_rng(0), kind), expected)


@pytest.mark.parametrize("kind", ["mask_head", "polygon", "grow", "wobble", "smooth", "shift"])
def test_less_strength_does_less_damage(precise, kind):
    weak, full = (
        np.mean([_iou(KINDS[kind](precise, np.random.default_rng(seed), strength), precise) for seed in range(8)])
        for strength in (0.2, 1.0)
    )
    assert weak > full


def test_the_mixture_leaves_some_masks_as_they_are(precise):
    masks = [coarsen(precise, np.random.default_rng(seed)) for seed in range(60)]
    untouched = sum(np.array_equal(mask, precise) for mask in masks)
    assert 1 <= untouched <= 15


def test_holes_survive_a_polygon():
    ring = np.zeros((200, 200), np.uint8)
    ring[40:160, 40:160] = 1
    ring[80:120, 80:120] = 0
    coarse = coarsen(ring, np.random.default_rng(0), "polygon")
    assert not coarse[90:110, 90:110].any()
    assert coarse[50:70, 50:150].all()


def test_a_swimming_contour_stays_smooth(precise):
    coarse = coarsen(precise, np.random.default_rng(0), "wobble")
    perimeter = [int((mask[:, 1:] != mask[:, :-1]).sum() + (mask[1:] != mask[:-1]).sum()) for mask in (precise, coarse)]
    assert perimeter[1] < 1.3 * perimeter[0]


def test_the_same_seed_gives_the_same_mask(precise):
    first, second, other = (coarsen(precise, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("side", [1, 2, 5, 20])
def test_tiny_objects_never_vanish(side):
    mask = np.zeros((50, 60), np.uint8)
    mask[10 : 10 + side, 20 : 20 + side] = 1
    for kind in ("mixed", *KINDS):
        for seed in range(10):
            assert coarsen(mask, np.random.default_rng(seed), kind).any()
