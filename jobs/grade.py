"""Grade weights on photographs with precise masks: `python jobs/grade.py --ground-truth G.json --images I`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import chain

import numpy as np

from model import Refiner
from model.backend import UnsupportedError
from model.checkpoint import CheckpointError
from model.refiner import Precision
from pipeline import storage
from pipeline.config import parse
from pipeline.grading import grade, samples, table
from pipeline.guard import GuardConfig
from pipeline.pareto import BASELINE, SETTINGS, WEIGHTS, WITH_SECOND, network_of, second_of, trials
from pipeline.pareto_report import plot, points
from pipeline.pareto_report import table as pareto_table
from pipeline.records import InputError
from pipeline.redaction import redacted


@dataclass(frozen=True, kw_only=True)
class GradeConfig:
    """Make coarse masks from ground truth in several kinds of failure, refine them, and score both."""

    ground_truth: tuple[str, ...]
    """COCO json files, or Cityscapes gtFine folders; any fsspec URL."""
    images: str
    """The folder of their images."""
    checkpoint: str = "hrnet18s_128"
    """Bundled weights by name, our .safetensors, or the reference's .pth."""
    kinds: tuple[str, ...] = ("mask_head", "polygon", "grow", "wobble")
    """Kinds of failure of model/coarsen.py, or `mixed`."""
    nms_threshold: float = 0.25
    iterations: int = 1
    """Refine so many times, each time what the last has made."""
    precision: Precision = "auto"
    """Arithmetic of the network; figures are the same on CPUs of different kinds with fp32 only."""
    flip: bool = False
    """Average the network's answers to each patch and its mirror image."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    every: int = 1
    """Take only every so many-th image."""
    seed: int = 0
    output: str | None = None
    """A json to write with the scores of every object."""
    pareto: str | None = None
    """Grade every way to spend patches instead, and write pareto.json and pareto.svg into this folder."""
    second_checkpoint: str | None = None
    """With `pareto`: a larger network, as HRNet-48, tried on the patches of which the first is not sure."""


def main() -> int:
    try:
        config = parse(GradeConfig, sys.argv[1:])
        if config.second_checkpoint and not config.pareto:
            raise InputError("second_checkpoint is tried by --pareto alone: expected both")
        if config.pareto:
            compare(config, config.pareto)
            return 0
        refiner = Refiner.from_checkpoint(config.checkpoint, precision=config.precision, flip=config.flip)

        def refine(image: np.ndarray, masks: np.ndarray) -> np.ndarray:
            for _ in range(config.iterations):
                masks = refiner.refine(image, masks, config.nms_threshold, config.guard)
            return masks

        grades = []
        for path in config.ground_truth:
            grades += grade(path, config.images, refine, config.kinds, config.seed, config.every)
    except (InputError, CheckpointError, UnsupportedError, OSError) as error:
        print(redacted(f"error: {error}"), file=sys.stderr)
        return 1
    print(table(grades, "kind"))
    print(table(grades, "category"))
    if config.output:
        storage.put(config.output, json.dumps([asdict(graded) for graded in grades]).encode())
    return 0


def compare(config: GradeConfig, folder: str) -> None:
    """Try all settings of `pipeline.pareto` on the same coarse masks; write every trial, their table and the plot."""
    if config.nms_threshold != 0.25 or config.iterations != 1 or config.flip or config.output:
        raise InputError("--pareto tries settings of its own: expected no nms-threshold, iterations, flip or output")
    masks = (samples(path, config.images, config.kinds, config.seed, config.every) for path in config.ground_truth)
    settings, network, second = SETTINGS, network_of(config.checkpoint, config.precision), None
    if config.second_checkpoint:
        settings += WITH_SECOND
        second = second_of(config.second_checkpoint, config.checkpoint, config.precision)
    tried = list(trials(chain.from_iterable(masks), settings, network, config.guard, second))
    if not tried:
        raise InputError(f"{config.images}: every coarse mask is smaller than guard.min_area = {config.guard.min_area}")
    found = points(tried, WEIGHTS, BASELINE, config.seed)
    print(pareto_table(found))
    content = {"points": [asdict(point) for point in found], "trials": [asdict(trial) for trial in tried]}
    storage.put(storage.join(folder, "pareto.json"), json.dumps(content).encode())
    storage.put(storage.join(folder, "pareto.svg"), plot(found, BASELINE).encode())


if __name__ == "__main__":
    sys.exit(main())
