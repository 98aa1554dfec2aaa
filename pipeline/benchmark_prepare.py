"""What a training patch costs to cut and keep, beside the reference's way of three PNG files for each."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pipeline import rle
from pipeline.benchmark import HEIGHT, INSTANCES, WIDTH, make_dump
from pipeline.patch_dataset import PatchDataset
from pipeline.preparation import prepare
from pipeline.records import cut_to_box
from pipeline.training_patches import PrepareConfig


@dataclass(frozen=True)
class PatchCost:
    """Of the same patches in both forms."""

    patches: int
    prepare_per_s: float
    """Patches/s of the whole preparation: decoding, coarsening, proposing, cropping, writing."""
    shards_mb_per_1000: float
    files_per_s: float
    """Patches/s of nothing but encoding and writing three PNG files each."""
    files_mb_per_1000: float
    """As the disk allots them, in blocks."""


def measure_preparation(root: Path, frames: int) -> PatchCost:
    """Prepare a data set from a made dump in this process, and write the same patches as single files."""
    make_dump(root, frames)
    images, annotations = [], []
    for i, path in enumerate(sorted((root / "images").iterdir())[:frames]):
        images.append({"id": i, "file_name": path.name, "width": WIDTH, "height": HEIGHT})
        for k in range(INSTANCES):
            mask = cv2.imread(str(root / "coarse" / f"{path.stem}_{k}.png"), cv2.IMREAD_GRAYSCALE)
            counts = rle.encode(*cut_to_box(mask), WIDTH, HEIGHT)
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": i,
                    "category_id": 1,
                    "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts},
                }
            )
    truth = root / "truth.json"
    truth.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]})
    )
    config = PrepareConfig(
        ground_truth=str(truth), images=str(root / "images"), output=str(root / "patches"), val_share=0, local=True
    )
    started = time.perf_counter()
    card = prepare(config, log=lambda line: None).card
    seconds = time.perf_counter() - started
    count = card["patches"]["train"]
    spent, blocks = _as_files(root / "files", np.concatenate(list(PatchDataset([config.output], "train").iterate(512))))
    return PatchCost(count, count / seconds, card["bytes"] / 1e3 / count, count / spent, blocks / 1e3 / count)


def _as_files(folder: Path, patches: np.ndarray) -> tuple[float, int]:
    """Write each patch as image, coarse mask and target; returns seconds and the bytes that the disk allots."""
    folder.mkdir()
    started = time.perf_counter()
    for i, patch in enumerate(patches):
        for name, pixels in (("image", patch[..., 2::-1]), ("coarse", patch[..., 3] * 255), ("target", patch[..., 4])):
            (folder / f"{i}_{name}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    seconds = time.perf_counter() - started
    return seconds, sum(path.stat().st_blocks * 512 for path in folder.iterdir())
