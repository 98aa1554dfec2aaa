"""What a training patch costs to cut and keep, beside the reference's way of three PNG files for each."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pipeline import rle
from pipeline.benchmark.made_dump import MadeDump
from pipeline.dump import reader
from pipeline.patch_dataset import PatchDataset
from pipeline.preparation import prepare
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


def measure_preparation(dump: MadeDump) -> PatchCost:
    """Prepare a data set from a made dump in this process, and write the same patches as single files."""
    root, width, height = dump.root, dump.scenery.width, dump.scenery.height
    source = reader(
        str(dump.predictions), str(dump.images), dump.scenery.form, image_pattern=dump.config("").image_pattern
    )
    images, annotations = [], []
    for i, ref in enumerate(source.list_frames()):
        images.append({"id": i, "file_name": ref.file_name, "width": width, "height": height})
        for instance in source.read(ref, width, height):
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": i,
                    "category_id": 1,
                    "segmentation": {
                        "size": [height, width],
                        "counts": rle.encode(instance.mask, instance.origin, width, height),
                    },
                }
            )
    truth = root / "truth.json"
    truth.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]})
    )
    config = PrepareConfig(
        ground_truth=str(truth), images=str(dump.images), output=str(root / "patches"), val_share=0, local=True
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
