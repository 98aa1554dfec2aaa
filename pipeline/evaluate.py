"""What a refiner makes of coarse masks whose truth is known: the coarse masks are made from the ground truth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pycocotools import mask as rle

from model.coarsen import coarsen
from pipeline.metrics.boundary import boundary_f_score, iou
from pipeline.patch_dataset import Annotation
from pipeline.stages import decode_image

if TYPE_CHECKING:
    from model import Refiner

MEASURES = ("IoU", "F 1px", "F 3px")


@dataclass(frozen=True)
class Comparison:
    """One object's scores before and after, in the order of MEASURES."""

    category: str
    coarse: tuple[float, ...]
    refined: tuple[float, ...]


def _scores(mask: np.ndarray, target: np.ndarray) -> tuple[float, ...]:
    return iou(mask, target), boundary_f_score(mask, target, 1), boundary_f_score(mask, target, 3)


def compare(
    annotations: Iterable[Annotation], refiner: Refiner, nms_threshold: float, seed: int
) -> Iterator[Comparison]:
    """Coarsen each ground-truth mask (one generator per object, from `seed`), refine it, score both."""
    for i, annotation in enumerate(annotations):
        image = decode_image(annotation.image_path)
        target = rle.decode(annotation.segmentation)
        if not target.any():
            continue
        coarse = coarsen(target, np.random.default_rng([seed, i]))
        refined = refiner.refine(image, coarse, nms_threshold)
        yield Comparison(annotation.category, _scores(coarse, target), _scores(refined, target))


def table(comparisons: Iterable[Comparison]) -> str:
    """Mean scores per category and over all objects, before -> after, and the share of objects whose IoU fell."""
    groups: dict[str, list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        groups[comparison.category].append(comparison)
    everything = [comparison for group in groups.values() for comparison in group]
    lines = [f"{'':<24}{'objects':>8}" + "".join(f"{name:>20}" for name in MEASURES) + f"{'IoU fell':>10}"]
    for name, group in [*sorted(groups.items()), ("all", everything)]:
        before = np.mean([c.coarse for c in group], axis=0)
        after = np.mean([c.refined for c in group], axis=0)
        fell = np.mean([c.refined[0] < c.coarse[0] for c in group])
        cells = "".join(f"{f'{b:.4f} -> {a:.4f}':>20}" for b, a in zip(before, after))
        lines.append(f"{name:<24}{len(group):>8}{cells}{fell:>10.1%}")
    return "\n".join(lines)
