import math

import numpy as np
import pytest

from pipeline.metrics.boundary import contour
from pipeline.metrics.changes import Changes, changes, sobel
from pipeline.records import InputError
from tests.scenes import frame_of, instance, square

IMAGE = np.full((60, 100, 3), 50, np.uint8)
IMAGE[10:40, 20:50] = 150


def _frame(*masks: np.ndarray, category: int = 1):
    return frame_of(*(instance(mask, category) for mask in masks), size=(60, 100))


def test_pixels_lengths_and_edges_of_a_movedsquare():
    one = changes(_frame(square(25)), _frame(square(20)), IMAGE).categories[1]
    assert (one.instances, one.changed_instances, one.pixels, one.changed_pixels) == (1, 1, 900, 300)
    assert one.contour_before == one.contour_after == contour(square(20)).sum()
    gradient = np.hypot(*(part.astype(float) for part in sobel(IMAGE))) / 8
    for name, left in (("gradient before", 25), ("gradient after", 20)):
        assert one.numbers()[name] == pytest.approx(gradient[contour(square(left)) != 0].mean(), rel=1e-5)
    assert one.gradient_after > one.gradient_before
    for sides in ((20, 40), (40, 20)):
        small_and_large = (_frame(square(25, side)) for side in sides)
        assert changes(*small_and_large, IMAGE).total().changed_pixels == 40**2 - 20**2


def test_the_gradient_of_a_ramp_is_its_slope():
    ramp = np.repeat(np.arange(100, dtype=np.uint8)[None, :, None] * 2, 60, axis=0).repeat(3, axis=2)
    across, down = sobel(ramp)
    assert (across[:, 1:-1] == 2 * 8).all()
    assert (down == 0).all()


def test_empty_masks_have_no_contour():
    empty = np.zeros((60, 100), bool)
    one = changes(_frame(empty), _frame(empty), IMAGE).total()
    assert one.changed_pixels == one.contour_before == 0
    assert math.isnan(one.numbers()["gradient after"])
    assert changes(_frame(square(20)), _frame(empty), IMAGE).total().changed_pixels == 900
    assert changes(_frame(empty), _frame(square(20)), IMAGE).total().changed_pixels == 900


def test_parts_merge_per_category_in_any_order():
    parts = [changes(_frame(square(a), category=a % 2), _frame(square(3 * a), category=a % 2), IMAGE) for a in range(5)]
    grouped = [parts[4], Changes.merge(parts[1::-1]), Changes(), Changes.merge(parts[3:1:-1])]
    assert Changes.merge(parts) == Changes.merge(grouped)
    assert Changes.merge(parts).total().instances == 5
    assert sorted(Changes.merge(parts).categories) == [0, 1]


def test_frames_that_do_not_belong_together_are_one_clear_error():
    with pytest.raises(InputError, match=r"^frame.png: .* are 100 x 60, 100 x 60, 60 x 100, expected one size"):
        changes(_frame(), _frame(), IMAGE.transpose(1, 0, 2))
    with pytest.raises(InputError, match=r"^frame.png: 1 refined instances of categories \[2\], expected the 2 of"):
        changes(_frame(square(1), square(2)), _frame(square(1), category=2), IMAGE)
