import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle

from pipeline.formats.cityscapes import CITYSCAPES_CLASSES
from pipeline.ground_truth import CITYSCAPES_VOID, CocoTruth, image_key, open_ground_truth
from pipeline.records import InputError
from tests.conftest import blob


def _coco(tmp_path, annotations, images=None):
    content = {
        "images": images or [{"id": 7, "file_name": "a/b.jpg", "width": 60, "height": 50}],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_coco_masks_are_read_from_compressed_plain_and_polygon_segmentations(tmp_path):
    mask = blob(50, 60, np.random.default_rng(0))
    encoded = rle.encode(np.asfortranarray(mask))
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    segmentations = [
        {"size": [50, 60], "counts": encoded["counts"].decode()},
        {"size": [50, 60], "counts": runs},
        [[10, 10, 30, 10, 30, 20, 10, 20]],
    ]
    url = _coco(
        tmp_path,
        [
            {"id": i, "image_id": 7, "category_id": 3, "segmentation": s, "iscrowd": int(i == 1)}
            for i, s in enumerate(segmentations)
        ],
    )
    truth = open_ground_truth(url, str(tmp_path))
    listing = truth.list_frames()
    frame = truth.read(listing.refs[0])
    assert listing.categories == {3: "cat"}
    assert (listing.refs[0].key, listing.refs[0].file_name) == ("b", "a/b.jpg")
    for instance in frame.instances[:2]:
        (x, y), (h, w) = instance.origin, instance.mask.shape
        whole = np.zeros((50, 60), bool)
        whole[y : y + h, x : x + w] = instance.mask
        assert np.array_equal(whole, mask)
        assert instance.area == mask.sum()
    assert frame.instances[2].area == 200
    assert [instance.crowd for instance in frame.instances] == [False, True, False]


@pytest.mark.parametrize("content", ["[]", "{", '{"images": [], "annotations": []}', '{"images": 3}'])
def test_a_file_that_is_no_ground_truth_is_named(tmp_path, content):
    (tmp_path / "truth.json").write_text(content)
    with pytest.raises(InputError, match=r"truth\.json: expected a COCO ground-truth json"):
        open_ground_truth(str(tmp_path / "truth.json"), str(tmp_path)).list_frames()


def test_an_annotation_with_a_wrong_mask_is_named(tmp_path):
    wrong = {"id": 5, "image_id": 7, "category_id": 3, "segmentation": {"size": [50, 61], "counts": "abc"}}
    truth = open_ground_truth(_coco(tmp_path, [wrong]), str(tmp_path))
    with pytest.raises(InputError, match=r"truth\.json: annotation 5 of a/b\.jpg: mask size"):
        truth.read(truth.list_frames().refs[0])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"category_id": "cat"}, "category_id 'cat', expected a whole number"),
        ({"area": "1"}, "area '1', expected a"),
        ({"iscrowd": "0"}, "iscrowd '0', expected 0 or 1"),
    ],
)
def test_an_annotation_with_a_wrong_value_is_named(tmp_path, other, message):
    annotation = {"id": 5, "image_id": 7, "category_id": 3, "segmentation": [[1, 1, 9, 1, 9, 9]]} | other
    truth = open_ground_truth(_coco(tmp_path, [annotation]), str(tmp_path))
    with pytest.raises(InputError, match=rf"truth\.json: annotation 5 of a/b\.jpg: {message}"):
        truth.read(truth.list_frames().refs[0])


@pytest.mark.parametrize("size", [(0, 50), (60, -1), (1 << 20, 1 << 20)])
def test_an_image_of_a_size_that_none_has_is_named(tmp_path, size):
    images = [{"id": 7, "file_name": "a.jpg", "width": size[0], "height": size[1]}]
    with pytest.raises(InputError, match=rf"truth\.json: expected .* a\.jpg of {size[0]} x {size[1]} pixels"):
        open_ground_truth(_coco(tmp_path, [], images), str(tmp_path)).list_frames()


def test_an_annotation_of_an_unlisted_image_is_refused(tmp_path):
    url = _coco(tmp_path, [{"id": 5, "image_id": 8, "category_id": 3, "segmentation": []}])
    with pytest.raises(InputError, match="annotation 5 has image_id 8"):
        open_ground_truth(url, str(tmp_path)).list_frames()


def test_images_of_one_name_are_called_by_their_folders_too(tmp_path):
    names = ("0/b.jpg", "1/b.jpg", "1/c.jpg")
    images = [{"id": i, "file_name": name, "width": 6, "height": 5} for i, name in enumerate(names)]
    refs = open_ground_truth(_coco(tmp_path, [], images), str(tmp_path)).list_frames().refs
    assert [ref.key for ref in refs] == ["0/b", "1/b", "c"]


def test_two_images_of_one_name_in_one_folder_are_refused(tmp_path):
    images = [{"id": i, "file_name": f"0/b.{i}", "width": 6, "height": 5} for i in range(2)]
    with pytest.raises(InputError, match=r"two images are called 0/b: 0/b\.0 and 0/b\.1"):
        open_ground_truth(_coco(tmp_path, [], images), str(tmp_path)).list_frames()


def test_two_images_of_one_id_are_refused(tmp_path):
    images = [{"id": 7, "file_name": name, "width": 6, "height": 5} for name in ("a.jpg", "b.jpg")]
    with pytest.raises(InputError, match=r"truth\.json: two images have the id 7, expected one"):
        open_ground_truth(_coco(tmp_path, [], images), str(tmp_path)).list_frames()


@pytest.mark.parametrize("category", ["a", None, 1.5, 1 << 63])
def test_a_category_whose_id_is_no_whole_number_is_refused(tmp_path, category):
    path = tmp_path / "truth.json"
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": category, "name": "b"}]}
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"truth\.json: category .*, expected a whole number of 64 bits as id"):
        CocoTruth(str(path)).list_frames()


def test_an_annotation_of_a_category_beyond_64_bits_is_named(tmp_path):
    path = tmp_path / "truth.json"
    image = {"id": 1, "file_name": "a.png", "width": 4, "height": 4}
    annotation = {"id": 7, "image_id": 1, "category_id": 1 << 63, "segmentation": [[0, 0, 3, 0, 3, 3]]}
    path.write_text(json.dumps({"images": [image], "annotations": [annotation], "categories": []}))
    truth = CocoTruth(str(path))
    with pytest.raises(InputError, match=r"annotation 7 of a\.png: category_id 9223372036854775808, expected a whole"):
        truth.read(truth.list_frames().refs[0])


def test_cityscapes_ids_are_told_apart_from_groups_and_stuff(tmp_path):
    ids = np.full((20, 30), 7, np.uint16)
    ids[2:6, 3:9] = 26003
    ids[10:14, 3:9] = 24000
    ids[15:18, 20:25] = 26
    (tmp_path / "ulm").mkdir()
    cv2.imwrite(str(tmp_path / "ulm" / "ulm_1_2_gtFine_instanceIds.png"), ids)
    truth = open_ground_truth(str(tmp_path), str(tmp_path))
    listing = truth.list_frames()
    assert listing.categories == CITYSCAPES_CLASSES
    assert [(ref.key, ref.file_name) for ref in listing.refs] == [("ulm_1_2", "ulm/ulm_1_2_leftImg8bit.png")]
    frame = truth.read(listing.refs[0])
    found = {i.instance_id: (i.category_id, i.origin, i.mask.shape, i.crowd, i.area) for i in frame.instances}
    assert found == {
        "26003": (26, (3, 2), (4, 6), False, 24),
        "24000": (24, (3, 10), (4, 6), False, 24),
        "26": (26, (20, 15), (3, 5), True, 15),
    }


def test_the_classes_of_cityscapes_are_those_of_its_own_scripts():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    assert {label.id: label.name for label in labels if label.hasInstances and label.id > 0} == CITYSCAPES_CLASSES
    assert {label.id for label in labels if label.ignoreInEval and label.id >= 0} == set(CITYSCAPES_VOID)


@pytest.mark.parametrize(
    "content",
    [b"", b"rubbish", b"\x89PNG\r\n\x1a\nrubbish", cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()],
)
def test_a_file_that_is_no_image_of_ids_is_named(tmp_path, content):
    (tmp_path / "ulm_1_2_gtFine_instanceIds.png").write_bytes(content)
    truth = open_ground_truth(str(tmp_path), str(tmp_path))
    with pytest.raises(InputError, match=r"instanceIds\.png: expected a PNG with one channel of instance ids"):
        truth.read(truth.list_frames().refs[0])


def test_cityscapes_images_are_found_by_name_in_a_flat_folder_too(tmp_path):
    (tmp_path / "truth" / "ulm").mkdir(parents=True)
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "truth" / "ulm" / "ulm_1_2_gtFine_instanceIds.png"), np.zeros((4, 4), np.uint16))
    (tmp_path / "images" / "ulm_1_2_leftImg8bit.jpg").touch()
    refs = open_ground_truth(str(tmp_path / "truth"), str(tmp_path / "images")).list_frames().refs
    assert [ref.file_name for ref in refs] == ["ulm_1_2_leftImg8bit.jpg"]


def test_a_folder_without_id_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected files \\*_gtFine_instanceIds"):
        open_ground_truth(str(tmp_path), str(tmp_path)).list_frames()


def test_an_image_is_called_the_same_in_predictions_and_ground_truth():
    assert image_key("ulm/ulm_1_2_leftImg8bit.png") == image_key("ulm_1_2.png") == "ulm_1_2"
