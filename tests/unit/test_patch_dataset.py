import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle

from pipeline.patch_dataset import load_annotations, stream, training_patches
from pipeline.records import InputError
from tests.conftest import blob


@pytest.fixture
def annotations(tmp_path):
    rng = np.random.default_rng(0)
    entries, images = [], []
    for i in range(2):
        cv2.imwrite(str(tmp_path / f"{i}.png"), rng.integers(0, 256, (160, 180, 3), dtype=np.uint8))
        encoded = rle.encode(np.asfortranarray(blob(160, 180, rng)))
        segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
        entries.append({"image_id": i, "category_id": 1, "segmentation": segmentation, "iscrowd": 0})
        images.append({"id": i, "file_name": f"{i}.png"})
    entries.append({**entries[0], "iscrowd": 1})
    path = tmp_path / "truth.json"
    categories = [{"id": 1, "name": "thing"}]
    path.write_text(json.dumps({"images": images, "annotations": entries, "categories": categories}))
    return path


def test_crowds_are_left_out(annotations, tmp_path):
    assert [p.image_path for p in load_annotations(str(annotations), str(tmp_path))] == [
        str(tmp_path / "0.png"),
        str(tmp_path / "1.png"),
    ]


@pytest.mark.parametrize("content", ["[]", "{", '{"images": [], "annotations": []}', '{"images": 3}'])
def test_a_file_that_is_no_ground_truth_is_named(tmp_path, content):
    (tmp_path / "truth.json").write_text(content)
    with pytest.raises(InputError, match=r"truth\.json: "):
        load_annotations(str(tmp_path / "truth.json"), str(tmp_path))


def test_patches_show_image_coarse_mask_and_target_of_one_place():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (150, 150, 3), dtype=np.uint8)
    target = blob(150, 150, rng)
    coarse = np.roll(target, 3, axis=1)
    patches = training_patches(image, coarse, target, 0.25)
    assert len(patches) > 3
    whole = np.concatenate([image, coarse[..., None], target[..., None]], axis=-1)
    windows = np.lib.stride_tricks.sliding_window_view(whole, (64, 64, 5))[:, :, 0]
    for patch in patches:
        assert (windows == patch).all(axis=(2, 3, 4)).sum() == 1


def test_batches_depend_on_the_seed_alone(annotations, tmp_path):
    sources = load_annotations(str(annotations), str(tmp_path))

    def batches(seed, **settings):
        return next(stream(sources, 8, seed, buffer=20, **settings))

    assert np.array_equal(batches(1), batches(1))
    assert not np.array_equal(batches(1), batches(2))
    assert batches(1).shape == (8, 64, 64, 5)
    assert batches(1, side_px=32).shape == (8, 32, 32, 5)
