import cv2
import numpy as np
import pytest

from pipeline.patches import crop, paste
from pipeline.proposals import propose
from pipeline.records import cut_to_box
from tests.conftest import blob, golden_cases


def _crops_by_padding_the_frame(image, mask, boxes, padding):
    """The same crops by the plainest means: pad the whole frame, slice."""
    margin = 200
    image = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
    mask = np.pad(mask, margin)
    crops = []
    for x1, y1, x2, y2 in boxes + margin:
        window = slice(y1 - padding, y2 + padding), slice(x1 - padding, x2 + padding)
        crops.append(np.concatenate([image[window], mask[window][..., None]], axis=-1))
    return np.stack(crops)


def _pasted_by_a_plain_loop(mask, boxes, probabilities):
    """Reassembly pixel by pixel in exact arithmetic."""
    refined = mask.astype(bool).copy()
    height, width = mask.shape
    for y in range(height):
        for x in range(width):
            over = [
                int(p[y - y1, x - x1])
                for (x1, y1, x2, y2), p in zip(boxes.tolist(), probabilities)
                if y1 <= y < y2 and x1 <= x < x2
            ]
            if over:
                refined[y, x] = 2 * sum(over) > 65535 * len(over)
    return refined


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize(("height", "width"), [(150, 200), (64, 64), (40, 90), (1, 1)])
def test_crops_are_slices_of_the_zero_padded_frame(height, width, padding):
    rng = np.random.default_rng(height)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = blob(height, width, rng) if height > 1 else np.ones((1, 1), np.uint8)
    inside, origin = cut_to_box(mask)
    boxes = propose(inside, origin, (width, height), 0.25)
    assert len(boxes)
    crops = crop(image, inside, origin, boxes, padding)
    assert np.array_equal(crops, _crops_by_padding_the_frame(image, mask, boxes, padding))


@pytest.mark.parametrize(("height", "width"), [(90, 120), (64, 64), (40, 70)])
def test_reassembly_equals_a_plain_loop_over_pixels(height, width):
    rng = np.random.default_rng(width)
    mask = blob(height, width, rng)
    inside, origin = cut_to_box(mask)
    boxes = propose(inside, origin, (width, height), 0.55)
    probabilities = rng.integers(0, 65536, (len(boxes), 64, 64), dtype=np.uint16)
    refined, (left, top), mean = paste(inside, origin, (width, height), boxes, probabilities)
    full = np.zeros((height, width), bool)
    full[top : top + refined.shape[0], left : left + refined.shape[1]] = refined
    assert np.array_equal(full, _pasted_by_a_plain_loop(mask, boxes, probabilities))
    covered = ~np.isnan(mean)
    assert covered.any()
    assert np.array_equal(
        refined[covered & (np.abs(mean - 0.5) > 1e-4)], mean[covered & (np.abs(mean - 0.5) > 1e-4)] > 0.5
    )


def test_an_average_of_exactly_one_half_is_background():
    boxes = np.array([[0, 0, 64, 64], [0, 0, 64, 64]], np.int32)
    probabilities = np.stack([np.full((64, 64), 65535, np.uint16), np.zeros((64, 64), np.uint16)])
    refined, _, mean = paste(np.ones((64, 64), bool), (0, 0), (64, 64), boxes, probabilities)
    assert not refined.any()
    assert np.all(mean == 0.5)


def test_one_step_above_one_half_decides_however_many_patches_cover_a_pixel():
    boxes = np.tile(np.array([0, 0, 64, 64], np.int32), (256, 1))
    probabilities = np.zeros((256, 64, 64), np.uint16)
    probabilities[::2] = 65535
    probabilities[1, 5, 6] = 1
    refined, _, _ = paste(np.ones((64, 64), bool), (0, 0), (64, 64), boxes, probabilities)
    assert np.argwhere(refined).tolist() == [[5, 6]]


def test_without_patches_the_coarse_mask_stays():
    refined, origin, mean = paste(
        np.ones((3, 4), bool), (7, 8), (20, 20), np.zeros((0, 4), np.int32), np.zeros((0, 64, 64), np.uint16)
    )
    assert refined.shape == (3, 4)
    assert refined.all()
    assert origin == (7, 8)
    assert np.isnan(mean).all()


@pytest.mark.parametrize("threshold", ["015", "025", "055"])
def test_crops_and_refined_masks_equal_the_references(golden, threshold):
    compared = 0
    for case, expected in golden_cases(golden):
        mask = cv2.imread(str(golden / "inputs" / "masks" / case["mask"]), cv2.IMREAD_GRAYSCALE)
        image = cv2.imread(str(golden / "inputs" / "images" / case["image"]))
        inside, origin = cut_to_box(mask)
        boxes = expected[f"boxes_t{threshold}"]
        if threshold == "025":
            crops = crop(image, inside, origin, boxes)
            assert np.array_equal(crops[..., :3], expected["img_t025"])
            assert np.array_equal(crops[..., 3] * 255, expected["mask_t025"])
        probabilities = expected[f"prob18s_t{threshold}"]
        fixed_point = np.rint(probabilities * 65535).astype(np.uint16)
        refined, (left, top), _ = paste(inside, origin, mask.shape[::-1], boxes, fixed_point)
        full = np.zeros(mask.shape, bool)
        full[top : top + refined.shape[0], left : left + refined.shape[1]] = refined
        total, count = np.zeros(mask.shape), np.zeros(mask.shape)
        for (x1, y1, x2, y2), probability in zip(boxes, probabilities):
            total[y1:y2, x1:x2] += probability
            count[y1:y2, x1:x2] += 1
        undecided = np.abs(total / np.maximum(count, 1) - 0.5) < 1e-4
        differs = full != expected[f"refined18s_t{threshold}"]
        assert not (differs & ~undecided).any(), case["name"]
        compared += 1
    assert compared == 14
