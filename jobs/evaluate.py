"""Measure a refiner on photographs with precise masks: coarse masks made from them, before and after."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import tyro

from model import Refiner
from pipeline.evaluate import compare, table
from pipeline.patch_dataset import load_annotations
from pipeline.records import InputError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Coarsen ground-truth masks the way mask heads fail, refine them, and print IoU and boundary F-score."""

    annotations: list[str]
    """COCO ground-truth json files with RLE masks."""
    images: str
    """Folder of the images they name."""
    checkpoint: str = "hrnet18s_128"
    """Bundled weights by name, our .safetensors, or the reference's .pth."""
    nms_threshold: float = 0.25
    seed: int = 0
    every: int = 1
    """Take only every so many-th object."""


def main() -> int:
    config = tyro.cli(EvaluateConfig)
    try:
        refiner = Refiner.from_checkpoint(config.checkpoint)
        found = [annotation for path in config.annotations for annotation in load_annotations(path, config.images)]
        print(table(compare(found[:: config.every], refiner, config.nms_threshold, config.seed)))
    except (InputError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
