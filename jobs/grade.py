"""Grade weights on photographs with precise masks: `python jobs/grade.py --ground-truth G.json --images I`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np

from jobs import ended
from model import Refiner
from model.backend import Precision
from model.coarsen import KINDS
from pipeline import storage
from pipeline.bounds import check_bounds, check_nms_threshold
from pipeline.config import parse
from pipeline.grading import Sample, grade, samples, table
from pipeline.guard import GuardConfig
from pipeline.outputs import check_apart, check_writable
from pipeline.pareto import BASELINE, SETTINGS, WEIGHTS, WITH_SECOND, network_of, second_of, trials
from pipeline.pareto_report import plot, points
from pipeline.pareto_report import table as pareto_table
from pipeline.records import InputError


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
    """Patches that overlap more than this IoU are thinned out."""
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
    """Of the coarse masks: the same seed makes the same ones."""
    output: str | None = None
    """A json to write with the scores of every object."""
    pareto: str | None = None
    """Grade every way to spend patches instead, and write pareto.json and pareto.svg into this folder."""
    second_checkpoint: str | None = None
    """With `pareto`: a larger network, as HRNet-48, tried on the patches of which the first is not sure."""

    def __post_init__(self) -> None:
        for name in ("ground_truth", "kinds"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty: expected at least one")
        for kind in self.kinds:
            if kind not in ("mixed", *KINDS):
                raise InputError(f"kinds is {kind!r}: expected mixed, {', '.join(KINDS)}")
        check_nms_threshold(self.nms_threshold)
        for name, least in (("iterations", 1), ("every", 1), ("seed", 0)):
            check_bounds(self, name, least)


def main() -> int:
    """Exit status: 0 when objects were graded, also where some images were set aside; 1 when none could be.

    130 after Ctrl-C.
    """
    return ended(_grade)


def _grade() -> int:
    aside: list[str] = []
    config = parse(GradeConfig, sys.argv[1:])
    if config.second_checkpoint and not config.pareto:
        raise InputError("second_checkpoint is tried by --pareto alone: expected both")
    if config.pareto:
        compare(config, config.pareto, aside)
    else:
        score(config, aside)
    for reason in aside:
        print(f"set aside    {reason}")
    if aside:
        print(f"{len(aside)} images were set aside and count in no number")
    return 0


def score(config: GradeConfig, aside: list[str]) -> None:
    """Refine the coarse masks as the settings say; print the scores, and write those of every object."""
    if config.output:
        _check_outputs(config, config.output)
    refiner = Refiner.from_checkpoint(config.checkpoint, precision=config.precision, flip=config.flip)

    def refine(image: np.ndarray, masks: np.ndarray) -> np.ndarray:
        for _ in range(config.iterations):
            masks = refiner.refine(image, masks, config.nms_threshold, config.guard)
        return masks

    grades = list(grade(_samples(config, aside), refine))
    print(table(grades, "kind"))
    print(table(grades, "category"))
    print(f"{sum(not graded.changed for graded in grades)} of {len(grades)} masks came out as they went in")
    if config.output:
        storage.put(config.output, json.dumps([asdict(graded) for graded in grades]).encode())


def _check_outputs(config: GradeConfig, *outputs: str) -> None:
    for output in outputs:
        for path in config.ground_truth:
            check_apart(output, path)
        check_writable(output)


def _samples(config: GradeConfig, aside: list[str]) -> Iterator[Sample]:
    """Those of every ground truth; InputError where all images were set aside."""
    sample = None
    for path in config.ground_truth:
        for sample in samples(path, config.images, config.kinds, aside, config.seed, config.every):
            yield sample
    if sample is None:
        raise InputError(f"all {len(aside)} images with objects were set aside, the first as {aside[0]}")


def compare(config: GradeConfig, folder: str, aside: list[str]) -> None:
    """Try all settings of `pipeline.pareto` on the same coarse masks; write every trial, their table and the plot."""
    if config.nms_threshold != 0.25 or config.iterations != 1 or config.flip or config.output:
        raise InputError("--pareto tries settings of its own: expected no nms-threshold, iterations, flip or output")
    content_file, plot_file = (storage.join(folder, name) for name in ("pareto.json", "pareto.svg"))
    _check_outputs(config, content_file, plot_file)
    settings, network, second = SETTINGS, network_of(config.checkpoint, config.precision), None
    if config.second_checkpoint:
        settings += WITH_SECOND
        second = second_of(config.second_checkpoint, config.checkpoint, config.precision)
    tried = list(trials(_samples(config, aside), settings, network, config.guard, second))
    if not tried:
        raise InputError(f"{config.images}: every coarse mask is smaller than guard.min_area = {config.guard.min_area}")
    found = points(tried, WEIGHTS, BASELINE, config.seed)
    print(pareto_table(found))
    content = {"points": [asdict(point) for point in found], "trials": [asdict(trial) for trial in tried]}
    storage.put(content_file, json.dumps(content).encode())
    storage.put(plot_file, plot(found, BASELINE).encode())


if __name__ == "__main__":
    sys.exit(main())
