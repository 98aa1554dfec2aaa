"""Train the refiner on photographs with precise masks; coarse masks are made on the way."""

from __future__ import annotations

import itertools
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from model import checkpoint
from model.checkpoint import CheckpointError
from model.fit import FitConfig, FitError, fit
from model.hrnet import RefinementNetwork
from pipeline.patch_dataset import load_annotations, stream
from pipeline.records import InputError

SAVE_EVERY_STEPS = 100


@dataclass(frozen=True)
class TrainConfig:
    """Train the refiner in one process from COCO ground truth alone."""

    annotations: str
    """COCO ground-truth json with RLE masks."""
    images: str
    """Folder of the images it names."""
    output: Path
    """Where to write the weights (.safetensors), also every 100 steps."""
    batch_size: int = 24
    """Patches per step; the steps of the first part take three times as many, at a quarter of the area."""
    quarter_share: float = 0.4
    """Share of the steps that train on the 32 px middle of each patch, which costs a quarter."""
    start: str | None = None
    """Weights to go on from instead of starting from scratch: a bundled name, .safetensors or .pth."""
    fit: FitConfig = field(default_factory=FitConfig)


def main() -> int:
    config = tyro.cli(TrainConfig)
    try:
        _train(config)
    except (InputError, CheckpointError, FitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _train(config: TrainConfig) -> None:
    sources = load_annotations(config.annotations, config.images)
    first = round(config.quarter_share * config.fit.steps)
    batches = itertools.chain(
        itertools.islice(stream(sources, 3 * config.batch_size, config.fit.seed, side_px=32), first),
        stream(sources, config.batch_size, config.fit.seed + 1),
    )
    card = {"annotations": Path(config.annotations).name, "objects": len(sources), "steps": config.fit.steps}
    started, recent = time.monotonic(), 0.0

    def report(step: int, loss: float, average: RefinementNetwork) -> None:
        nonlocal recent
        recent = loss if step == 1 else 0.98 * recent + 0.02 * loss
        if step % 10 == 0:
            elapsed = time.monotonic() - started
            left = elapsed / step * (config.fit.steps - step)
            print(f"step {step}/{config.fit.steps}  loss {recent:.4f}  {elapsed:.0f} s  eta {left:.0f} s", flush=True)
        if step % SAVE_EVERY_STEPS == 0:
            checkpoint.save(average, config.output, {**card, "trained_steps": step})

    network = fit(config.fit, batches, report, checkpoint.load(config.start) if config.start else None)
    checkpoint.save(network, config.output, {**card, "trained_steps": config.fit.steps})
    print(f"wrote {config.output}: {json.dumps(card)}")


if __name__ == "__main__":
    sys.exit(main())
