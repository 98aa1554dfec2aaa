import cv2
import numpy as np

from pipeline.contact_sheet import COARSE_COLOUR, GAP_PX, _outlined, _views


def test_no_contour_is_drawn_along_a_border_beyond_which_the_mask_goes_on():
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :20] = 1
    view = _outlined(np.zeros((32, 32, 3), np.uint8), mask, COARSE_COLOUR)
    drawn = (view == COARSE_COLOUR).all(axis=2)
    assert drawn[:, 19].all()
    assert drawn.sum() == 32


def test_the_three_views_of_a_patch_lie_apart():
    patch = np.zeros((64, 64, 5), np.uint8)
    patch[16:48, 16:48, 3:] = 1
    views = _views(patch)
    white = (views == 255).all(axis=(0, 2))
    edges = np.flatnonzero(np.diff(white.astype(int)) == 1)
    assert len(edges) == 3
    assert white[edges[0] + 1 : edges[0] + 1 + GAP_PX].all()
    assert cv2.countNonZero(views[..., 0]) > 0
