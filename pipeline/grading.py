"""How good some weights are: coarse masks of every kind of failure made from ground truth, refined, and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from model.coarsen import coarsen
from pipeline import storage
from pipeline.ground_truth import GroundTruth, TrueInstance, TruthRef, open_ground_truth
from pipeline.images import decode_image
from pipeline.metrics.boundary import COCO_RATIO, WORSE_BY, boundary_f_score, boundary_iou, dilation_px, iou
from pipeline.metrics.overlap import Region
from pipeline.records import InputError, cut_to_box, heading
from pipeline.training_patches import check_size, generator, whole_mask

MEASURES = ("IoU", "boundary IoU", "F 1px", "F 3px")


@dataclass(frozen=True)
class Grade:
    """One object's scores under one kind of failure, before and after, in the order of MEASURES."""

    key: str
    category: str
    kind: str
    coarse: tuple[float, ...]
    refined: tuple[float, ...]
    changed: bool
    """Whether the refined mask differs from the coarse one; it does not where the guard rejects it."""

    @property
    def worse(self) -> bool:
        return self.refined[0] < self.coarse[0] - WORSE_BY


@dataclass(frozen=True)
class Sample:
    """The objects of one image, made coarse by one kind of failure."""

    key: str
    kind: str
    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    categories: list[str]
    coarse: np.ndarray
    """(N, H, W) uint8 0/1, N > 0."""
    targets: np.ndarray
    """The precise masks, in the same form."""


def scores(mask: np.ndarray, target: np.ndarray) -> tuple[float, ...]:
    """How well a mask (H, W) uint8 0/1 agrees with the precise one, in the order of MEASURES."""
    dilation = dilation_px(mask.shape[1], mask.shape[0], COCO_RATIO)
    return (
        iou(mask, target),
        boundary_iou(Region(*cut_to_box(mask)), Region(*cut_to_box(target)), dilation),
        boundary_f_score(mask, target, 1),
        boundary_f_score(mask, target, 3),
    )


def samples(
    ground_truth: str, images: str, kinds: Sequence[str], aside: list[str], seed: int = 0, every: int = 1
) -> Iterator[Sample]:
    """Coarsen each object of every `every`-th image in every kind of model/coarsen.py.

    Coarse masks depend on the seed, the object and the kind alone. An image that is wrong, or whose annotations are,
    is added to `aside` with the reason. InputError where no image has an object.
    """
    truth = open_ground_truth(ground_truth, images)
    listing = truth.list_frames()
    found = False
    for ref in listing.refs[::every]:
        try:
            things, image = _objects(truth, ref, images)
        except InputError as error:
            found = True
            aside.append(f"{ref.key}: {error}")
            continue
        if not things:
            continue
        found = True
        targets = np.stack([whole_mask(true, image.shape) for true in things])
        categories = [listing.categories.get(true.category_id, str(true.category_id)) for true in things]
        for kind in kinds:
            names = [(seed, ref.key, true.instance_id, kind) for true in things]
            coarse = np.stack([coarsen(target, generator(*name), kind) for target, name in zip(targets, names)])
            yield Sample(ref.key, kind, image, categories, coarse, targets)
    if not found:
        raise InputError(f"{ground_truth}: no object to grade")


def _objects(truth: GroundTruth, ref: TruthRef, images: str) -> tuple[list[TrueInstance], np.ndarray]:
    """The objects of an image, and the image (H, W, 3) where it has any."""
    frame = truth.read(ref)
    if not frame.objects:
        return [], np.empty((0, 0, 3), np.uint8)
    image = decode_image(storage.join(images, ref.file_name))
    check_size(ref.file_name, image, frame)
    return frame.objects, image


def grade(samples: Iterable[Sample], refine: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Iterator[Grade]:
    """Refine coarse masks, and score both them and what they became against the truth.

    `refine` takes an image (H, W, 3) uint8 RGB and masks (N, H, W) uint8 0/1 and returns masks of that shape.
    """
    for sample in samples:
        refined = refine(sample.image, sample.coarse)
        for category, before, after, target in zip(sample.categories, sample.coarse, refined, sample.targets):
            changed = not np.array_equal(before, after)
            yield Grade(sample.key, category, sample.kind, scores(before, target), scores(after, target), changed)


def table(grades: Sequence[Grade], by: str = "kind") -> str:
    """Mean scores per `kind` or `category` and over all, before -> after, and the share of objects that got worse."""
    names = list(dict.fromkeys(getattr(graded, by) for graded in grades))
    groups = [(name, [graded for graded in grades if getattr(graded, by) == name]) for name in names]
    width = 2 + max(22, *(len(heading(name)) for name in [*names, ""]))
    lines = [f"{'':<{width}}{'objects':>8}" + "".join(f"{name:>20}" for name in MEASURES) + f"{'worse':>8}"]
    for name, group in [*groups, ("all", list(grades))]:
        before = np.mean([graded.coarse for graded in group], axis=0)
        after = np.mean([graded.refined for graded in group], axis=0)
        worse = np.mean([graded.worse for graded in group])
        cells = "".join(f"{f'{b:.4f} -> {a:.4f}':>20}" for b, a in zip(before, after))
        lines.append(f"{heading(name):<{width}}{len(group):>8}{cells}{worse:>8.1%}")
    return "\n".join(lines)
