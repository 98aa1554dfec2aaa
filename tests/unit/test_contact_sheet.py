import cv2
import numpy as np
import pytest

from pipeline.contact_sheet import CASING_COLOUR, CELL_PX, COARSE_COLOUR, GAP_PX, contact_sheet
from pipeline.patch_dataset import pack, write_shards


@pytest.fixture
def sheet(tmp_path):
    """Draws the contact sheet of a single patch: its rows of pixels (CELL_PX, W, 3) BGR."""

    def of(patch):
        write_shards(str(tmp_path / "data"), {"train": pack(patch[None], [{}])}, "part")
        contact_sheet(str(tmp_path / "data"), str(tmp_path / "sheet.png"), "train", 1, 0)
        return cv2.imread(str(tmp_path / "sheet.png"))[:CELL_PX]

    return of


def test_no_contour_is_drawn_along_a_border_beyond_which_the_mask_goes_on(sheet):
    patch = np.zeros((CELL_PX, CELL_PX, 5), np.uint8)
    patch[:, :20, 3] = 1
    coarse = sheet(patch)[:, CELL_PX + GAP_PX : 2 * CELL_PX + GAP_PX]
    drawn = (coarse == COARSE_COLOUR).all(axis=2)
    assert drawn[:, 19].all()
    assert drawn.sum() == CELL_PX
    cased = (coarse == CASING_COLOUR).all(axis=2)
    assert cased[:, [18, 20]].all()
    assert cased.sum() == 2 * CELL_PX


def test_the_three_views_of_a_patch_lie_apart(sheet):
    white = (sheet(np.zeros((64, 64, 5), np.uint8)) == 255).all(axis=(0, 2))
    edges = np.flatnonzero(np.diff(white.astype(int)) == 1)
    assert len(edges) == 3
    assert white[edges[0] + 1 : edges[0] + 1 + GAP_PX].all()
