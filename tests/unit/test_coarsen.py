import numpy as np
import pytest

from model.coarsen import KINDS, coarsen
from tests.conftest import blob


@pytest.fixture
def precise():
    return blob(300, 400, np.random.default_rng(5))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_failure_changes_the_boundary_but_not_the_object(precise, kind):
    rng = np.random.default_rng(1)
    for _ in range(5):
        coarse = KINDS[kind](precise, rng)
        iou = (coarse & precise).sum() / (coarse | precise).sum()
        assert coarse.dtype == np.uint8
        assert coarse.shape == precise.shape
        assert set(np.unique(coarse)) == {0, 1}
        assert 0.6 < iou < 1.0


def test_the_same_seed_gives_the_same_mask(precise):
    first, second, other = (coarsen(precise, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("side", [1, 2, 5, 20])
def test_tiny_objects_never_vanish(side):
    mask = np.zeros((50, 60), np.uint8)
    mask[10 : 10 + side, 20 : 20 + side] = 1
    for seed in range(30):
        assert coarsen(mask, np.random.default_rng(seed)).any()
