"""From other libraries' predictions to refined masks, and on into the libraries that read them."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pycocotools import mask as rle

from pipeline.config import RefineConfig
from pipeline.conversion import ConvertConfig, convert
from pipeline.formats.coco import CocoReader
from pipeline.predictions import frame_of_masks, write_frames
from pipeline.records import FRAME_SCHEMA, InputError
from pipeline.run import run
from tests.conftest import blob
from tests.dumps import make_dump

ROOT = Path(__file__).resolve().parents[2]


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    return make_dump(tmp_path_factory.mktemp("dump"))


@pytest.fixture(scope="module")
def refined(dump, checkpoint_path) -> Path:
    output = dump.root / "refined"
    run(dump.config("parquet", output, checkpoint_path, local=True), log=lambda line: None)
    return output


def test_label_files_are_converted_and_refined_without_any_ground_truth(dump, checkpoint_path, tmp_path):
    (tmp_path / "labels").mkdir()
    for number, masks in enumerate(dump.masks):
        lines = []
        for label, mask in enumerate(masks):
            outlines = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
            points = (outlines[0].reshape(-1, 2) / mask.shape[::-1]).reshape(-1) if outlines else ()
            lines.append(" ".join(f"{value:g}" for value in (label, *points, 0.5)))
        (tmp_path / "labels" / f"frame_{number:03d}.txt").write_text("\n".join(lines))
    results = tmp_path / "results.json"
    images = str(dump.root / "images")
    convert(ConvertConfig(input=str(tmp_path / "labels"), library="ultralytics", output=str(results), images=images))
    config = RefineConfig(
        predictions=str(results),
        images=images,
        output=str(tmp_path / "refined"),
        image_pattern="{image_id}.png",
        checkpoint=str(checkpoint_path),
        local=True,
    )
    summary = run(config, log=lambda line: None)
    with_objects = sum(bool(masks) for masks in dump.masks)
    assert (summary.frames, summary.quarantined) == (with_objects, {})
    entries = json.loads((tmp_path / "refined" / "refined.json").read_text())
    assert len(entries) == sum(len(masks) for masks in dump.masks)


class FakeModel:
    """Answers as Mask R-CNN of torchvision does: (N, 1, H, W) probabilities, labels from 1, scores in order."""

    def __call__(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        height, width = images[0].shape[1:]
        rng = np.random.default_rng(height)
        self.masks = [blob(height, width, rng) for _ in range(3)]
        probabilities = torch.from_numpy(np.stack(self.masks))[:, None].float() * 0.8 + 0.1
        scores = torch.tensor([0.9, 0.6, 0.3])
        return [
            {"boxes": torch.zeros(3, 4), "labels": torch.tensor([1, 44, 2]), "scores": scores, "masks": probabilities}
        ]


def test_the_torchvision_example_writes_a_dump_that_refine_reads(dump, checkpoint_path, tmp_path):
    model, frames = FakeModel(), tmp_path / "frames.parquet"
    images = dump.root / "images"
    assert write_frames(str(frames), example("from_torchvision").predicted(model, images)) == len(dump.masks)
    table = pq.read_table(frames)
    assert table.schema == FRAME_SCHEMA
    last = table.to_pylist()[-1]
    assert [(one["category_id"], round(one["score"], 3)) for one in last["instances"]] == [(1, 0.9), (44, 0.6)]
    mask_of = example("open_refined_parquet").mask_of
    assert all(np.array_equal(mask_of(one), mask) for one, mask in zip(last["instances"], model.masks))
    config = RefineConfig(
        predictions=str(frames),
        images=str(images),
        output=str(tmp_path / "refined"),
        checkpoint=str(checkpoint_path),
        local=True,
    )
    summary = run(config, log=lambda line: None)
    assert (summary.frames, summary.quarantined) == (len(dump.masks), {})


def test_masks_without_their_scores_are_refused_by_the_name_of_their_image():
    with pytest.raises(InputError, match=r"a\.png: expected masks \(N, H, W\), N categories and N scores"):
        frame_of_masks("a.png", np.zeros((2, 4, 4), bool), [1, 1], [0.5])


def test_probabilities_are_not_taken_for_masks():
    with pytest.raises(
        InputError, match=r"a\.png: expected masks of bool or whole numbers, found float32; give masks > 0\.5"
    ):
        frame_of_masks("a.png", np.full((1, 4, 4), 0.01, np.float32), [1], [0.5])
    assert frame_of_masks("a.png", np.zeros((0, 4, 4)), [], []).instances == []


def test_masks_may_be_tensors_or_a_list():
    masks = np.eye(4, dtype=bool)[None]
    for given in (torch.from_numpy(masks), [masks[0]]):
        (instance,) = frame_of_masks("a.png", given, np.array([3]), np.array([0.5])).instances
        assert (instance.category_id, instance.score, instance.area) == (3, 0.5, 4)


@pytest.mark.parametrize("library", ["pandas", "duckdb", "datasets"])
def test_a_refined_dump_opens_in(library, refined, tmp_path):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    statuses = [one["status"] for row in pq.read_table(refined).to_pylist() for one in row["instances"]]
    expected = {status: statuses.count(status) for status in set(statuses)}
    assert expected
    code = (
        "import json, sys; sys.path.insert(0, 'examples'); import open_refined_parquet as example;"
        f"print(json.dumps(example.with_{library}({str(refined)!r})))"
    )
    # In a process of its own: `datasets` reads where to cache, and whether to stay offline, when it is imported.
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_the_largest_mask_of_a_refined_dump_is_decoded(refined):
    pytest.importorskip("duckdb")
    file_name, mask = example("open_refined_parquet").largest_mask(str(refined))
    row = max(
        (
            (one["area"], row["file_name"], row["height"], row["width"])
            for row in pq.read_table(refined).to_pylist()
            for one in row["instances"]
        ),
    )
    assert (int(mask.sum()), file_name, *mask.shape) == row


def recipe(title: str) -> list[str]:
    """The Python blocks below a heading of the page on other libraries."""
    section = (ROOT / "docs" / "libraries.md").read_text().split(f"## {title}", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def elsewhere(dump, tmp_path, monkeypatch):
    """Works in another folder; (name, masks) of every frame of the dump that has objects."""
    monkeypatch.chdir(tmp_path)
    return [(f"frame_{number:03d}", masks) for number, masks in enumerate(dump.masks) if masks]


def run_lengths(mask: np.ndarray) -> dict:
    return {"size": [*mask.shape], "counts": rle.encode(np.asfortranarray(mask))["counts"].decode()}


def test_annotations_go_out_and_come_back_with_their_ids_crowds_and_those_of_frames_set_aside(
    dump, elsewhere, checkpoint_path
):
    images = [{"id": number, "file_name": f"{name}.png"} for number, (name, _) in enumerate(elsewhere)]
    objects = [
        {"id": 10 + number, "image_id": number, "category_id": 2, "segmentation": run_lengths(masks[0]), "iscrowd": 0}
        for number, (_, masks) in enumerate(elsewhere)
    ]
    crowd, missing = objects[0] | {"id": 99, "iscrowd": 1}, objects[0] | {"id": 98, "image_id": 97}
    images.append({"id": 97, "file_name": "missing.png"})
    categories = [{"id": 2, "name": "a"}]
    data = {"images": images, "categories": categories, "annotations": [crowd, missing, *objects]}
    Path("instances.json").write_text(json.dumps(data))
    there, back = recipe("Annotations")
    names: dict = {}
    exec(there, names)
    config = RefineConfig(
        predictions="results.json",
        images=str(dump.root / "images"),
        image_list="instances.json",
        output="refined",
        checkpoint=str(checkpoint_path),
        local=True,
    )
    assert run(config, log=lambda line: None).quarantined.keys() == {"97"}
    exec(back, names)
    after = json.loads(Path("instances_refined.json").read_text())
    assert (after["images"], after["categories"]) == (images, categories)
    assert after["annotations"][:2] == [crowd, missing]
    assert [one["id"] for one in after["annotations"][2:]] == [one["id"] for one in objects]
    assert all("status" in one for one in after["annotations"][2:])


def test_masks_of_sam_become_entries_with_their_keys(dump, elsewhere):
    Path("masks").mkdir()
    for name, masks in elsewhere:
        found = [{"segmentation": run_lengths(one), "predicted_iou": 0.5, "stability_score": 0.75} for one in masks]
        (Path("masks") / f"{name}.json").write_text(json.dumps(found))
    exec(recipe("Run lengths by image")[0], {})
    reader = CocoReader("results.json", str(dump.root / "images"), image_pattern="{image_id}.png")
    for ref, (name, masks) in zip(reader.list_frames(), elsewhere, strict=True):
        instances = list(reader.read(ref, *masks[0].shape[::-1]))
        assert ref.file_name == f"{name}.png"
        assert [(one.score, one.area, one.extra["stability_score"]) for one in instances] == [
            (0.5, np.count_nonzero(mask), 0.75) for mask in masks
        ]


def test_things_of_a_panoptic_png_and_numbers_of_an_indexed_one_are_the_objects_of_their_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = np.zeros((20, 30), int)
    ids[:5], ids[6:9, 3:8], ids[12:, 20:] = 70_001, 300, 66_000
    (tmp_path / "panoptic").mkdir()
    for name, image in (("a", ids), ("b", np.where(ids == 70_001, ids, 0))):
        # OpenCV writes blue first: the last of the three digits to the base of 256.
        cv2.imwrite(f"panoptic/{name}.png", np.stack([image >> 16, image >> 8 & 255, image & 255], 2).astype(np.uint8))
    stuff = {"id": 70_001, "category_id": 7}
    things = [{"id": 300, "category_id": 3}, {"id": 66_000, "category_id": 4}]
    panoptic = {
        "images": [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 5, "file_name": "a.png", "segments_info": [stuff, *things]},
            {"image_id": 6, "file_name": "b.png", "segments_info": [stuff]},
        ],
        "categories": [{"id": number, "isthing": int(number < 7)} for number in (3, 4, 7)],
    }
    Path("panoptic.json").write_text(json.dumps(panoptic))
    names: dict = {}
    whole, of_video = recipe("An image of ids")
    exec(whole, names)
    first, second = pq.read_table("frames.parquet").to_pylist()
    assert (first["file_name"], second["file_name"], second["instances"]) == ("a.jpg", "b.jpg", [])
    mask_of = example("open_refined_parquet").mask_of
    found = [(one["category_id"], mask_of(one)) for one in first["instances"]]
    assert [category for category, _ in found] == [3, 4]
    assert all(np.array_equal(mask, ids == one["id"]) for (_, mask), one in zip(found, things))
    image = pytest.importorskip("PIL.Image")
    Path("bear").mkdir()
    numbers = np.searchsorted([0, 300, 66_000, 70_001], ids).astype(np.uint8)
    indexed = image.fromarray(numbers, "P")
    indexed.putpalette([0, 0, 0, 0, 0, 128, 128, 0, 0, 0, 128, 0])
    indexed.save("bear/00000.png")
    exec(of_video, names)
    assert [(one.category_id, one.area) for one in names["frame"].instances] == [
        (number, np.count_nonzero(numbers == number)) for number in (1, 2, 3)
    ]
