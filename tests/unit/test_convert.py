"""Files of the shapes that the libraries write, by other means than the code under test, and what becomes of them."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from jobs import convert as job
from pipeline.conversion import ConvertConfig, convert
from pipeline.records import InputError
from tests.conftest import blob

HEIGHT, WIDTH = 90, 120


@pytest.fixture
def masks() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [blob(HEIGHT, WIDTH, rng) for _ in range(3)]


@pytest.fixture
def image_list(tmp_path):
    images = [{"id": 139, "file_name": "000000000139.jpg"}, {"id": 7, "file_name": "city/street.jpg"}]
    path = tmp_path / "images.json"
    path.write_text(json.dumps({"images": images, "categories": [{"id": 30}, {"id": 10}, {"id": 20}]}))
    return str(path)


def run_lengths(mask: np.ndarray) -> dict:
    found = rle.encode(np.asfortranarray(mask))
    return {"size": [HEIGHT, WIDTH], "counts": found["counts"].decode()}


def converted(tmp_path: Path, library: str, source: Path, **settings) -> list[dict]:
    output = tmp_path / "results.json"
    convert(ConvertConfig(input=str(source), library=library, output=str(output), **settings))
    return json.loads(output.read_text())


def decoded(entry: dict) -> np.ndarray:
    return rle.decode(entry["segmentation"])


def coco_entry(mask: np.ndarray, **keys) -> dict:
    return (
        {"image_id": 139, "category_id": 3, "bbox": [1.5, 2.0, 30.0, 40.0], "score": 0.75}
        | keys
        | {"segmentation": run_lengths(mask)}
    )


def written(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_results_json_of_detectron2_is_passed_on_as_it_is(tmp_path, masks):
    entries = [coco_entry(mask) for mask in masks]
    source = written(tmp_path / "coco_instances_results.json", entries)
    assert converted(tmp_path, "detectron2", source) == entries


def test_the_job_says_what_it_has_written(tmp_path, masks, capsys, monkeypatch):
    source = written(tmp_path / "coco_instances_results.json", [coco_entry(mask) for mask in masks])
    output = tmp_path / "results.json"
    monkeypatch.setattr("sys.argv", ["convert.py", "--from", "detectron2", str(source), "--output", str(output)])
    assert job.main() == 0
    assert capsys.readouterr().out == f"wrote {output}: 3 instances in 1 images\n"


def test_labels_of_instances_predictions_pth_become_category_ids_in_the_order_of_the_ids(tmp_path, masks, image_list):
    instances = [coco_entry(mask, category_id=label) for label, mask in enumerate(masks)]
    source = tmp_path / "instances_predictions.pth"
    torch.save([{"image_id": 139, "instances": instances}, {"image_id": 7, "instances": []}], source)
    found = converted(tmp_path, "detectron2", source, image_list=image_list)
    assert [entry["category_id"] for entry in found] == [10, 20, 30]
    assert all(np.array_equal(decoded(entry), mask) for entry, mask in zip(found, masks))
    assert [entry["category_id"] for entry in converted(tmp_path, "detectron2", source)] == [0, 1, 2]


class Opened:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("library", "name"), [("detectron2", "a.pth"), ("torchvision", "a.pt"), ("mmdetection", "results.pkl")]
)
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, capsys, monkeypatch, library, name):
    ran = tmp_path / "ran"
    content = [{"image_id": 1, "instances": [Opened(ran)]}]
    source = tmp_path / name
    with source.open("wb") as file:
        pickle.dump(content, file) if library == "mmdetection" else torch.save(content, file)
    arguments = ["convert.py", "--from", library, str(source), "--output", str(tmp_path / "results.json")]
    monkeypatch.setattr("sys.argv", arguments)
    assert job.main() == 1
    assert not ran.exists()
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source}: ")
    assert error.count("\n") == 1
    assert "run code" in error or "run any code" in error


def test_segm_json_of_mmdetection_is_passed_on_as_it_is(tmp_path, masks):
    entries = [coco_entry(mask) for mask in masks]
    source = written(tmp_path / "work" / "results.segm.json", entries)
    assert converted(tmp_path, "mmdetection", source) == entries


def inferred(masks: list[np.ndarray]) -> dict:
    boxes = [[1.0, 2.0, 30.0, 40.0]] * len(masks)
    scores = [0.9 - 0.1 * number for number in range(len(masks))]
    return {
        "labels": [*range(len(masks))],
        "scores": scores,
        "bboxes": boxes,
        "masks": [run_lengths(mask) for mask in masks],
    }


def test_predictions_of_det_inferencer_go_by_their_file_names(tmp_path, masks):
    written(tmp_path / "out" / "preds" / "street.json", inferred(masks))
    written(tmp_path / "out" / "preds" / "empty.json", {"labels": [], "scores": [], "bboxes": []})
    found = converted(tmp_path, "mmdetection", tmp_path / "out" / "preds")
    assert [(entry["image_id"], entry["category_id"]) for entry in found] == [("street", k) for k in range(3)]
    assert [entry["score"] for entry in found] == inferred(masks)["scores"]
    assert all(np.array_equal(decoded(entry), mask) for entry, mask in zip(found, masks))


def test_an_image_list_gives_predictions_of_det_inferencer_ids_and_categories_in_its_order(tmp_path, masks, image_list):
    written(tmp_path / "preds" / "street.json", inferred(masks))
    found = converted(tmp_path, "mmdetection", tmp_path / "preds", image_list=image_list)
    assert [(entry["image_id"], entry["category_id"]) for entry in found] == [(7, 30), (7, 10), (7, 20)]


def test_predictions_json_of_ultralytics_is_named_by_the_image_list(tmp_path, masks, image_list):
    entries = [
        coco_entry(masks[0], image_id=139),
        coco_entry(masks[1], image_id="street"),
        coco_entry(masks[2], image_id=139, file_name="000000000139.jpg"),
    ]
    source = written(tmp_path / "predictions.json", entries)
    found = converted(tmp_path, "ultralytics", source, image_list=image_list)
    assert [entry["image_id"] for entry in found] == [139, 7, 139]
    assert [entry["category_id"] for entry in found] == [3, 3, 3]


def test_ids_of_ultralytics_that_are_numbers_and_text_are_refused_without_an_image_list(tmp_path, masks):
    source = written(tmp_path / "predictions.json", [coco_entry(masks[0]), coco_entry(masks[1], image_id="139")])
    with pytest.raises(InputError, match=r"predictions\.json: entry 1: image_id '139', expected numbers or text"):
        converted(tmp_path, "ultralytics", source)


def label_line(label: int, mask: np.ndarray, *confidence: float) -> str:
    outline = max(cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0], key=len)
    values = (label, *(outline.reshape(-1, 2) / (WIDTH, HEIGHT)).reshape(-1).astype(np.float32), *confidence)
    return ("%g " * len(values)).rstrip() % values + "\n"


@pytest.fixture
def images(tmp_path) -> str:
    (tmp_path / "images" / "city").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "images" / "city" / "street.jpg"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    return str(tmp_path / "images")


@pytest.mark.parametrize("confidence", [(), (0.25,)])
def test_label_files_of_ultralytics_give_masks_without_holes_back_pixel_by_pixel(tmp_path, masks, images, confidence):
    written(tmp_path / "labels" / "street.txt", "".join(label_line(5, mask, *confidence) for mask in masks))
    found = converted(tmp_path, "ultralytics", tmp_path / "labels", images=images)
    assert all(np.array_equal(decoded(entry), mask) for entry, mask in zip(found, masks, strict=True))
    assert [entry.get("score") for entry in found] == [confidence[0] if confidence else None] * 3
    assert {(entry["image_id"], entry["category_id"]) for entry in found} == {("street", 5)}


def test_a_label_line_without_polygon_is_an_instance_without_mask_and_is_counted(tmp_path, masks, images, monkeypatch):
    written(tmp_path / "labels" / "street.txt", label_line(5, masks[0], 0.5) + "2 0.25\n1 0.1 0.1 0.2 0.2 0.75\n")
    output = tmp_path / "results.json"
    config = ConvertConfig(input=str(tmp_path / "labels"), library="ultralytics", output=str(output), images=images)
    assert str(convert(config)) == f"wrote {output}: 3 instances (2 of them without a mask) in 1 images"
    entries = json.loads(output.read_text())
    assert [int(decoded(entry).sum()) for entry in entries[1:]] == [0, 0]
    assert [entry["score"] for entry in entries] == [0.5, 0.25, 0.75]


def torchvision_output(masks: list[np.ndarray]) -> dict[str, torch.Tensor]:
    probabilities = torch.from_numpy(np.stack(masks))[:, None].float() * 0.6 + 0.2
    return {
        "boxes": torch.zeros(len(masks), 4),
        "labels": torch.arange(1, len(masks) + 1),
        "scores": torch.tensor([0.5, 0.25, 0.125])[: len(masks)],
        "masks": probabilities,
    }


def test_outputs_of_torchvision_are_cut_at_the_threshold(tmp_path, masks):
    (tmp_path / "outputs").mkdir()
    torch.save(torchvision_output(masks), tmp_path / "outputs" / "street.pt")
    torch.save(
        {**torchvision_output(masks), **{k: v[:0] for k, v in torchvision_output(masks).items()}},
        tmp_path / "outputs" / "empty.pt",
    )
    found = converted(tmp_path, "torchvision", tmp_path / "outputs")
    assert all(np.array_equal(decoded(entry), mask) for entry, mask in zip(found, masks, strict=True))
    assert [(e["image_id"], e["category_id"], e["score"]) for e in found] == [
        ("street", 1, 0.5),
        ("street", 2, 0.25),
        ("street", 3, 0.125),
    ]
    full = converted(tmp_path, "torchvision", tmp_path / "outputs", mask_threshold=0.1)
    assert all(decoded(entry).all() for entry in full)


def test_outputs_of_torchvision_that_still_want_a_gradient_are_converted(tmp_path, masks):
    output = torchvision_output(masks)
    torch.save(output | {name: output[name].requires_grad_() for name in ("scores", "masks")}, tmp_path / "street.pt")
    found = converted(tmp_path, "torchvision", tmp_path / "street.pt")
    assert [entry["score"] for entry in found] == [0.5, 0.25, 0.125]
    assert all(np.array_equal(decoded(entry), mask) for entry, mask in zip(found, masks, strict=True))


BOX = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1.0}
GOOD = BOX | {"segmentation": {"size": [1, 1], "counts": "01"}}


@pytest.mark.parametrize(
    ("library", "name", "content", "line"),
    [
        ("detectron2", "a.json", [BOX], r"a\.json: entry 0: expected a segmentation; boxes alone cannot"),
        ("detectron2", "a.json", [GOOD, GOOD | {"score": "x"}], r"entry 1: expected a finite number as score"),
        ("detectron2", "a.json", [GOOD | {"image_id": None}], r"entry 0: expected a whole number or text as image_id"),
        ("detectron2", "a.json", [GOOD | {"category_id": 1.5}], r"entry 0: expected a whole number as category_id"),
        ("detectron2", "a.json", [GOOD | {"segmentation": "x"}], r"entry 0: expected run lengths .* or polygons"),
        (
            "detectron2",
            "a.json",
            [GOOD | {"segmentation": {"size": [1, 1], "counts": None}}],
            r"entry 0: expected run lengths .* or polygons",
        ),
        ("detectron2", "a.json", {"annotations": []}, r"a\.json: byte 0: expected a list"),
        ("detectron2", "a.json", [], r"a\.json: expected instances with masks, found none"),
        ("detectron2", "a.pth", "no archive", r"a\.pth: expected a file of torch\.save"),
        ("detectron2", "missing.json", None, r"missing\.json: no such file or folder"),
        (
            "mmdetection",
            "preds/a.json",
            {"labels": [1], "scores": [0.5], "bboxes": [[0, 0, 1, 1]]},
            r"a\.json: .*masks",
        ),
        (
            "mmdetection",
            "preds/a.json",
            {"labels": [1], "scores": [], "masks": [{}]},
            r"a\.json: expected lists of one",
        ),
        ("mmdetection", "preds/a.json", "{", r"a\.json: expected json"),
        (
            "mmdetection",
            "preds/a.json",
            {"labels": [1], "scores": [1], "masks": [{}]},
            r"a\.json: instance 0: expected",
        ),
        ("mmdetection", "preds/a.txt", "", r"preds: expected \.json files"),
        (
            "ultralytics",
            "labels/a.txt",
            "1 0.5 0.5",
            r"labels: label files do not tell .* expected --images, their folder",
        ),
        ("torchvision", "out/a.pt", "no archive", r"a\.pt: expected a file of torch\.save"),
        ("torchvision", "out/a.txt", "", r"out: expected \.pt files"),
    ],
)
def test_what_a_library_does_not_write_is_one_line_that_names_it_and_leaves_no_output(
    tmp_path, library, name, content, line
):
    source = tmp_path / name
    if content is not None:
        written(source, content)
    with pytest.raises(InputError, match=line) as error:
        converted(tmp_path, library, source.parent if "/" in name else source)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("0 0.1 0.1 0.2 0.2 0.3 x", r"street\.txt:1: expected 'class x1 y1"),
        ("0 0.1 0.1 0.2 0.2 0.3 4", r"street\.txt:1: expected coordinates from 0 to 1; track ids"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 4", r"street\.txt:1: expected a confidence from 0 to 1"),
        ("\n0 0.1 0.1 0.2 nan 0.3 0.3", r"street\.txt:2: expected coordinates"),
        ("0 0.1 0.1 0.2 0.2 0.75", r"labels: expected instances with masks, found none"),
    ],
)
def test_a_wrong_label_line_is_named(tmp_path, images, text, line):
    written(tmp_path / "labels" / "street.txt", text)
    with pytest.raises(InputError, match=line):
        converted(tmp_path, "ultralytics", tmp_path / "labels", images=images)


def test_label_files_of_two_runs_on_one_image_are_refused(tmp_path, masks, images):
    for run in ("predict", "predict2"):
        written(tmp_path / "runs" / run / "labels" / "street.txt", label_line(5, masks[0]))
    message = r"predict2/labels/street\.txt: expected one file for each image, predict/labels/street\.txt has the same"
    with pytest.raises(InputError, match=message):
        converted(tmp_path, "ultralytics", tmp_path / "runs", images=images)


def test_a_label_file_without_image_is_named(tmp_path, images):
    written(tmp_path / "labels" / "other.txt", "0 0.1 0.1 0.2 0.2 0.3 0.3")
    with pytest.raises(InputError, match=r"other\.txt: expected one image named other below .*, found none"):
        converted(tmp_path, "ultralytics", tmp_path / "labels", images=images)


def test_a_key_of_an_entry_that_is_called_empty_is_passed_on_like_any_other(tmp_path, masks):
    entries = [coco_entry(masks[0], empty="yes"), coco_entry(masks[1], empty=1)]
    source = written(tmp_path / "coco_instances_results.json", entries)
    assert converted(tmp_path, "detectron2", source) == entries


def test_empty_masks_of_a_results_json_are_counted(tmp_path, masks):
    nothing = np.zeros_like(masks[0])
    plain = coco_entry(nothing) | {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}}
    source = written(tmp_path / "coco_instances_results.json", [coco_entry(masks[0]), coco_entry(nothing), plain])
    found = convert(ConvertConfig(input=str(source), library="detectron2", output=str(tmp_path / "out.json")))
    assert (found.instances, found.empty) == (3, 2)


def test_the_job_names_the_categories_that_labels_have_become(tmp_path, masks):
    categories = [{"id": 0, "name": "fish"}, {"id": 1, "name": "\neel"}, {"id": 5}]
    listed = written(tmp_path / "images.json", {"images": [{"id": 7, "file_name": "a.jpg"}], "categories": categories})
    labels = written(tmp_path / "preds" / "a.json", inferred(masks) | {"labels": [2, 0, 2]}).parent
    output = str(tmp_path / "results.json")
    config = ConvertConfig(input=str(labels), library="mmdetection", output=output, image_list=str(listed))
    assert str(convert(config)).splitlines()[1] == "categories: 0 fish (1), 5 (2)"
    passed_on = written(tmp_path / "segm.json", [coco_entry(mask, category_id=2 - i) for i, mask in enumerate(masks)])
    config = ConvertConfig(input=str(passed_on), library="mmdetection", output=output, image_list=str(listed))
    assert str(convert(config)).splitlines()[1] == "categories: 0 fish (1), 1 \\neel (1), 2 which is not listed (1)"


def test_images_of_lvis_that_have_an_address_alone_are_listed(tmp_path, masks):
    images = [{"id": 139, "coco_url": "http://images.cocodataset.org/val2017/street.jpg"}]
    listed = written(tmp_path / "lvis.json", {"images": images, "categories": []})
    source = written(tmp_path / "preds" / "street.json", inferred(masks))
    found = converted(tmp_path, "mmdetection", source.parent, image_list=str(listed))
    assert {entry["image_id"] for entry in found} == {139}


def test_a_list_of_images_that_share_names_serves_where_images_go_by_their_ids(tmp_path, masks):
    images = [{"id": i, "file_name": f"video{i}/street.jpg"} for i in (139, 7)]
    listed = written(tmp_path / "images.json", {"images": images, "categories": [{"id": 30}]})
    source = tmp_path / "instances_predictions.pth"
    torch.save([{"image_id": 139, "instances": [coco_entry(masks[0], category_id=0)]}], source)
    assert converted(tmp_path, "detectron2", source, image_list=str(listed))[0]["category_id"] == 30
    written(tmp_path / "preds" / "street.json", inferred(masks))
    with pytest.raises(InputError, match=r"street\.json: image 'street', expected one that .* under a name of its own"):
        converted(tmp_path, "mmdetection", tmp_path / "preds", image_list=str(listed))


def test_images_and_labels_that_the_list_does_not_have_are_named(tmp_path, masks, image_list):
    written(tmp_path / "preds" / "other.json", inferred(masks))
    with pytest.raises(InputError, match=r"other\.json: image 'other', expected one that .*images\.json lists"):
        converted(tmp_path, "mmdetection", tmp_path / "preds", image_list=image_list)
    written(tmp_path / "more" / "street.json", inferred(masks) | {"labels": [0, 1, 3]})
    with pytest.raises(InputError, match=r"street\.json: instance 2: label 3, expected 0 to 2"):
        converted(tmp_path, "mmdetection", tmp_path / "more", image_list=image_list)


def test_tensors_of_other_shapes_are_named(tmp_path, masks):
    torch.save(torchvision_output(masks) | {"scores": torch.zeros(2)}, tmp_path / "street.pt")
    with pytest.raises(InputError, match=r"street\.pt: expected labels \(N\), scores \(N\) and masks \(N, 1, H, W\)"):
        converted(tmp_path, "torchvision", tmp_path / "street.pt")


@pytest.mark.parametrize("labels", [torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([True, True, False])])
def test_labels_that_are_no_whole_numbers_are_named_with_their_file(tmp_path, masks, labels):
    torch.save(torchvision_output(masks) | {"labels": labels}, tmp_path / "street.pt")
    with pytest.raises(InputError, match=r"street\.pt: expected whole numbers as labels, found (float32|bool)"):
        converted(tmp_path, "torchvision", tmp_path / "street.pt")


def test_an_output_in_place_of_the_images_or_their_list_is_refused(tmp_path, image_list, images):
    labels = written(tmp_path / "labels" / "street.txt", "0 0.1 0.1 0.2 0.2 0.3 0.3").parent
    for output in (image_list, images, f"{images}/city/street.jpg", f"{images}/results.json"):
        config = ConvertConfig(
            input=str(labels), library="ultralytics", output=output, images=images, image_list=image_list
        )
        with pytest.raises(InputError, match="expected an output apart from"):
            convert(config)
    assert "categories" in Path(image_list).read_text()


def test_an_output_in_place_of_the_input_is_refused(tmp_path, masks):
    source = written(tmp_path / "results.json", [coco_entry(masks[0])])
    with pytest.raises(InputError, match="expected an output apart from"):
        converted(tmp_path, "detectron2", source)
    assert source.read_text()
