import cv2
import numpy as np
import pytest

from model.compose import lay_over


@pytest.fixture
def scene():
    """A grey image with one square object, and a donor with a white disc on black."""
    image = np.full((200, 240, 3), 90, np.uint8)
    mask = np.zeros((200, 240), np.uint8)
    mask[50:150, 60:180] = 1
    donor = np.zeros((120, 100, 3), np.uint8)
    outline = cv2.circle(np.zeros((120, 100), np.uint8), (50, 60), 40, 1, -1)
    donor[outline != 0] = 255
    return image, mask, donor, outline


def test_the_laid_object_hides_what_is_below_and_its_mask_is_where_the_image_changed(scene):
    image, mask, donor, outline = scene
    for seed in range(10):
        below = mask.copy()
        out, laid = lay_over(image, [below], donor, outline, np.random.default_rng(seed))
        assert out.shape == image.shape
        assert out.dtype == np.uint8
        assert not (below & laid).any()
        assert np.array_equal(below | (mask & laid), mask)
        core = cv2.erode(laid, np.ones((7, 7), np.uint8)) != 0
        far = cv2.dilate(laid, np.ones((9, 9), np.uint8)) == 0
        assert (out[core] != image[core]).any(axis=1).mean() > 0.99
        assert np.array_equal(out[far], image[far])


def test_the_same_generator_gives_the_same_picture(scene):
    image, mask, donor, outline = scene
    results = [lay_over(image, [mask.copy()], donor, outline, np.random.default_rng(3)) for _ in range(2)]
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])
