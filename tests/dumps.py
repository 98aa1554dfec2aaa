"""Small generated dumps in every form, written by other means than the code under test."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pycocotools import mask as rle

from pipeline.config import RefineConfig
from pipeline.guard import GuardConfig
from tests.conftest import blob

SIZES = [(150, 200), (64, 64), (90, 40), (200, 130), (33, 70)]


@dataclass(frozen=True)
class Dump:
    """Where a generated dump lies, and the masks (H, W) uint8 0/1 in it."""

    root: Path
    masks: list[list[np.ndarray]]

    def config(self, form: str, output: str | Path, checkpoint: Path, **settings) -> RefineConfig:
        predictions = {"cityscapes": "cityscapes", "coco": "results.json", "parquet": "frames.parquet"}[form]
        listing = {"image_list": str(self.root / "images.json")} if form == "coco" else {}
        return RefineConfig(
            predictions=str(self.root / predictions),
            images=str(self.root / "images"),
            output=str(output),
            checkpoint=str(checkpoint),
            # A network with random weights changes every mask, and the guard would refuse them all.
            **{"frames_per_block": 2, "guard": GuardConfig(enabled=False), **listing, **settings},
        )


def make_dump(root: Path, frames: int = 5, seed: int = 0) -> Dump:
    """Frames of several sizes with 0 to 3 objects each, in all three forms below `root`."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    (root / "cityscapes").mkdir()
    masks, results, listed, rows = [], [], [], []
    for i in range(frames):
        height, width = SIZES[i % len(SIZES)]
        stem = f"frame_{i:03d}"
        image = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), (0, 0), 2)
        cv2.imwrite(str(root / "images" / f"{stem}.png"), image)
        objects = [blob(height, width, rng) for _ in range(3 - i % 4)]
        if i % 4 == 1:
            objects[0][:] = 0
        masks.append(objects)
        listed.append({"id": i + 10, "file_name": f"{stem}.png", "height": height, "width": width})
        lines, instances = [], []
        for k, mask in enumerate(objects):
            score = round(0.9 - 0.1 * k, 2)
            cv2.imwrite(str(root / "cityscapes" / f"{stem}_{k}.png"), mask * 255)
            lines.append(f"{stem}_{k}.png {24 + k} {score}\n")
            encoded = rle.encode(np.asfortranarray(mask))
            counts = encoded["counts"].decode()
            segmentation = {"size": [height, width], "counts": counts}
            results.append({"image_id": i + 10, "category_id": 24 + k, "segmentation": segmentation, "score": score})
            instances.append(
                {
                    "instance_id": str(k),
                    "category_id": 24 + k,
                    "score": score,
                    "size": [height, width],
                    "counts": counts,
                }
            )
        (root / "cityscapes" / f"{stem}_pred.txt").write_text("".join(lines))
        rows.append(
            {"frame_id": stem, "file_name": f"{stem}.png", "height": height, "width": width, "instances": instances}
        )
    (root / "results.json").write_text(json.dumps(results))
    (root / "images.json").write_text(json.dumps({"images": listed, "categories": [{"id": c} for c in range(24, 34)]}))
    instance = pa.struct(
        [
            ("instance_id", pa.string()),
            ("category_id", pa.int64()),
            ("score", pa.float64()),
            ("size", pa.list_(pa.int32())),
            ("counts", pa.string()),
        ]
    )
    schema = pa.schema(
        [
            ("frame_id", pa.string()),
            ("file_name", pa.string()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("instances", pa.list_(instance)),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), root / "frames.parquet")
    return Dump(root, masks)


def tree(root: Path) -> dict[str, bytes]:
    """Every output file's content by its path, the ledger left out."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "_ledger" not in path.parts
    }
