"""A card shows one instance with its surroundings, and stays small whatever the frame and the masks are."""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest

from pipeline.records import Instance, cut_to_box
from pipeline.report import Card, View, make_card
from pipeline.report.cards import (
    CLOSE_UP_PX,
    CLOSE_UPS,
    OVERVIEW_BYTES,
    OVERVIEW_PX,
    PATH_CORNERS,
    SMALLEST_WINDOW_PX,
)


def box_instance(size: tuple[int, int], x: int, y: int, width: int, height: int) -> Instance:
    mask = np.zeros(size, bool)
    mask[y : y + height, x : x + width] = True
    return Instance("0", 24, 0.9, *cut_to_box(mask))


def card(size: tuple[int, int], *sides: Instance, image: np.ndarray | None = None) -> Card:
    if image is None:
        ramp = np.add.outer(np.arange(size[0]), np.arange(size[1])) % 256
        image = np.repeat(ramp.astype(np.uint8)[..., None], 3, axis=2)
    return make_card("car", "note", image, *sides)


def drawn(view: View, path: str) -> np.ndarray:
    """The mask that the path encloses in the view, drawn on a canvas that reaches as far beyond it as the path does."""
    beyond = 40
    canvas = np.zeros((view.height + 2 * beyond, view.width + 2 * beyond), np.uint8)
    for outline in re.findall(r"M[^z]*z", path):
        at = np.array([int(v) for v in re.findall(r"^M(-?\d+) (-?\d+)", outline)[0]])
        corners = [at]
        for axis, step in re.findall(r"([hv])(-?\d+)", outline):
            at = at + (np.array([int(step), 0]) if axis == "h" else np.array([0, int(step)]))
            corners.append(at)
        for (x, y1), (_, y2) in zip(corners[1:], corners[2:] + corners[:1]):
            canvas[min(y1, y2) + beyond : max(y1, y2) + beyond, x + beyond :] ^= 1
    return canvas[beyond:-beyond, beyond:-beyond] != 0


def picture(view: View) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(view.jpeg, np.uint8), cv2.IMREAD_COLOR)


def test_a_view_is_the_window_of_the_frame_with_the_masks_in_it() -> None:
    size = (400, 600)
    one = card(size, box_instance(size, 200, 100, 90, 60), box_instance(size, 205, 100, 90, 60))
    view = one.overview
    x1, y1, x2, y2 = view.box
    assert (view.width, view.height) == (x2 - x1, y2 - y1)
    assert picture(view).shape == (view.height, view.width, 3)
    assert abs(int(picture(view)[5, 5, 0]) - (x1 + 5 + y1 + 5) % 256) < 12
    expected = np.zeros(size, bool)
    expected[100:160, 200:290] = True
    assert (drawn(view, view.coarse) == expected[y1:y2, x1:x2]).all()
    assert view.truth is None


def test_an_overview_holds_all_masks_with_their_surroundings() -> None:
    size = (800, 1200)
    sides = [box_instance(size, 300, 300, 100, 100), box_instance(size, 320, 300, 100, 100)]
    x1, y1, x2, y2 = card(size, *sides, box_instance(size, 500, 340, 60, 160)).overview.box
    assert x1 <= 300 - 52
    assert x2 >= 560 + 52
    assert y1 <= 300 - 40
    assert y2 >= 500 + 40


@pytest.mark.parametrize("corner", [(0, 0), (590, 390)])
def test_a_small_instance_at_the_border_is_shown_with_surroundings_inside_the_frame(corner: tuple[int, int]) -> None:
    size = (400, 600)
    x1, y1, x2, y2 = card(size, *[box_instance(size, *corner, 10, 10)] * 2).overview.box
    assert 0 <= x1 <= corner[0] < x2 <= 600
    assert 0 <= y1 <= corner[1] < y2 <= 400
    assert x2 - x1 >= SMALLEST_WINDOW_PX
    assert y2 - y1 >= SMALLEST_WINDOW_PX


def test_a_frame_smaller_than_a_close_up_is_shown_whole() -> None:
    one = card((20, 30), box_instance((20, 30), 5, 5, 9, 9), box_instance((20, 30), 6, 5, 9, 9))
    assert one.overview.box == (0, 0, 30, 20)
    assert [view.box for view in one.close_ups] == [(0, 0, 30, 20)]


def test_no_contour_runs_along_the_border_of_a_view() -> None:
    size = (100, 100)
    view = card(size, *[box_instance(size, 0, 0, 100, 50)] * 2).overview
    assert view.box == (0, 0, 100, 96)
    assert re.fullmatch(r"M-8 -8h116v58h-116(v-58)?z", view.coarse)


def test_close_ups_show_where_the_masks_differ_at_full_resolution() -> None:
    size = (750, 1000)
    coarse, refined = box_instance(size, 100, 100, 700, 600), box_instance(size, 100, 100, 720, 600)
    one = card(size, coarse, refined)
    assert max(one.overview.width, one.overview.height) <= OVERVIEW_PX
    assert len(one.close_ups) == CLOSE_UPS
    for view in one.close_ups:
        x1, _, x2, _ = view.box
        assert (view.width, view.height) == (CLOSE_UP_PX, CLOSE_UP_PX)
        assert x1 < 800 < 820 < x2
        columns = drawn(view, view.coarse) ^ drawn(view, view.refined)
        assert columns.any(axis=0).sum() == 20


def test_close_ups_of_a_large_photograph_are_large_enough_to_show_both_contours() -> None:
    size = (1500, 2000)
    coarse, refined = box_instance(size, 100, 100, 1600, 1200), box_instance(size, 100, 100, 1700, 1200)
    for view in card(size, coarse, refined).close_ups:
        assert view.box[0] < 1700 < 1800 < view.box[2]


def test_where_nothing_changed_close_ups_show_the_difference_from_the_truth() -> None:
    size = (300, 300)
    same, truth = box_instance(size, 50, 50, 100, 100), box_instance(size, 50, 50, 140, 100)
    assert card(size, same, same).close_ups == ()
    first = card(size, same, same, truth).close_ups[0]
    assert first.truth is not None
    assert first.box[0] < 170 < first.box[2]


def test_an_emptied_mask_is_shown_where_the_coarse_one_was() -> None:
    size = (300, 400)
    gone = Instance("0", 24, 0.9, np.zeros((0, 0), bool))
    one = card(size, box_instance(size, 200, 100, 50, 50), gone)
    assert one.overview.refined == ""
    assert one.overview.box[0] <= 200 < 250 <= one.overview.box[2]
    assert card(size, gone, gone).overview.box == (0, 0, 400, 300)


def test_a_card_of_noise_is_bounded_in_pictures_and_contours() -> None:
    rng = np.random.default_rng(0)
    size = (1100, 1600)
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    speckled = [Instance("0", 24, 0.9, *cut_to_box(rng.random(size) < share)) for share in (0.4, 0.5)]
    one = card(size, *speckled, image=image)
    assert len(one.overview.jpeg) <= OVERVIEW_BYTES
    for view in (one.overview, *one.close_ups):
        assert len(re.findall("[hv]", view.coarse)) <= PATH_CORNERS
        assert len(re.findall("[hv]", view.refined)) <= PATH_CORNERS
    assert sum(len(view.jpeg) for view in one.close_ups) < 24_000
