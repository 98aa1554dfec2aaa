"""From other libraries' predictions to refined masks, and on into the libraries that read them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config import RefineConfig
from pipeline.conversion import ConvertConfig, convert
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
