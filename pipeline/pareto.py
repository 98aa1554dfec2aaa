"""What refinement gains for how many patches: every setting tried on the same coarse masks, and the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from model import Refiner, checkpoint
from model.backend import Precision
from model.hrnet import multiply_adds
from pipeline.grading import Sample, scores
from pipeline.guard import GuardConfig, passed_over
from pipeline.metrics.boundary import WORSE_BY
from pipeline.metrics.overlap import Box, mask_within
from pipeline.patches import crop
from pipeline.proposals import PATCH_PX, TieOrder, boundary_strength, longest_stride, propose, row_major
from pipeline.records import Frame, Instance, cut_to_box
from pipeline.stages import assemble
from pipeline.work import Work

Network = Callable[[np.ndarray, float], np.ndarray]
"""Probabilities (N, P, P) uint16, 65535 = 1, of patches (N, P, P, 4) uint8 by a network whose input has a share (the
second argument) of its usual side."""


@dataclass(frozen=True)
class Second:
    """What is asked about the patches of which the network is not sure."""

    answers: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Probabilities (N, P, P) uint16 of patches (N, P, P, 4) uint8 and their boxes (N, 4) in the frame."""
    price: float
    """Passes of the network that one of its passes costs."""


WEIGHTS = {"mask_head": 3.0}
"""How much masks of one kind of failure count in means, others counting 1: mask heads are what most users have."""


HRNET48_PRICE = 39.0
"""Multiply-adds of HRNet-48 at 256 px over those of HRNet-18s at 128 px."""

FIRST_PASS_ZOOM = 0.5
"""Side of the network's input in a cheap first pass, as a share of the usual one."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to spend patches on an instance."""

    name: str
    nms_threshold: float = 0.25
    tie_order: TieOrder = longest_stride
    patch_px: int = PATCH_PX
    thinned: bool = False
    """Keep only the boxes that a greedy cover of the boundary needs (`thin`)."""
    zoom: float = 1.0
    """Side of the network's input as a share of the usual one."""
    confirm: float | None = None
    """Refine only patches of which a cheap first pass changes at least this share of the pixels."""
    doubt: float | None = None
    """Ask a second network about patches of which the first, by its own probabilities, expects to have at least this
    share of the pixels wrong."""
    bound: bool = False
    """The second network is the truth itself, at HRNet-48's price: no network could do better."""
    flip: bool = False
    iterations: int = 1


SETTINGS = (
    *(Setting(name=f"nms {t}", nms_threshold=t) for t in (0.05, 0.15, 0.25, 0.35, 0.55)),
    *(Setting(name=f"row-major {t}", nms_threshold=t, tie_order=row_major) for t in (0.25, 0.55)),
    Setting(name="cover", nms_threshold=0.55, thinned=True),
    *(Setting(name=f"patch {px}", patch_px=px) for px in (48, 80)),
    *(Setting(name=f"input x{zoom}", zoom=zoom) for zoom in (0.5, 0.75)),
    *(Setting(name=f"confirm {c:.0%}", confirm=c) for c in (0.01, 0.02)),
    Setting(name="flip", flip=True),
    Setting(name="twice", iterations=2),
    *(Setting(name=f"perfect {d:.0%}", doubt=d, bound=True) for d in (0.1, 0.08, 0.06, 0.04)),
)
"""What is compared; all take `BASELINE` where they say nothing else."""

WITH_SECOND = tuple(Setting(name=f"second {d:.0%}", doubt=d) for d in (0.1, 0.08, 0.06, 0.04))
"""What there is to compare besides where a second network is at hand."""

BOUNDS = frozenset(setting.name for setting in SETTINGS if setting.bound)
"""Names of the settings that nobody can choose."""

BASELINE = "nms 0.25"


@dataclass(frozen=True)
class Trial:
    """What one setting made of one coarse mask."""

    key: str
    kind: str
    setting: str
    boundary_px: int
    """Pixels of the coarse boundary band, two pixels wide."""
    uncovered_px: int
    """Those of them that lie in no patch."""
    patches: int
    cost: float
    """Network time in passes of one patch at the usual input size: a pass at half the side counts a quarter."""
    coarse: tuple[float, ...]
    """Scores before, in the order of MEASURES."""
    refined: tuple[float, ...]

    @property
    def worse(self) -> bool:
        return self.refined[0] < self.coarse[0] - WORSE_BY


def thin(boxes: np.ndarray, coarse: np.ndarray, origin: tuple[int, int]) -> np.ndarray:
    """The boxes (n, 4) of (N, 4) that cover as much of the boundary as all do, in the order a greedy cover takes them.

    `coarse` (h, w) lies at `origin` = (x, y). Each box is the one that covers most of what is left.
    """
    y, x = np.nonzero(boundary_strength(np.pad(coarse, 1)))
    x, y = x + (origin[0] - 1), y + (origin[1] - 1)
    x1, y1, x2, y2 = boxes.T[:, :, None]
    inside = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    kept = []
    left = inside.any(axis=0)
    while left.any():
        best = int((inside & left).sum(axis=1).argmax())
        kept.append(best)
        left &= ~inside[best]
    return boxes[kept]


def _boxes(instance: Instance, size: tuple[int, int], setting: Setting) -> np.ndarray:
    boxes = propose(
        instance.mask,
        instance.origin,
        size,
        setting.nms_threshold,
        patch_px=setting.patch_px,
        tie_order=setting.tie_order,
    )
    return thin(boxes, instance.mask, instance.origin) if setting.thinned else boxes


def network_of(path_or_name: str, precision: Precision = "auto") -> Network:
    """The network of a checkpoint (`checkpoint.load`) at every size of input that is asked for."""
    refiners: dict[float, Refiner] = {}

    def probabilities(patches: np.ndarray, zoom: float) -> np.ndarray:
        if zoom not in refiners:
            network = checkpoint.load(path_or_name)
            network.config = replace(network.config, input_px=round(zoom * network.config.input_px))
            refiners[zoom] = Refiner(network, precision=precision)
        return refiners[zoom].probabilities(patches)

    return probabilities


class Remembering:
    """A network that passes no patch twice, for settings that share patches."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.known: dict[tuple[float, bytes], np.ndarray] = {}

    def __call__(self, patches: np.ndarray, zoom: float) -> np.ndarray:
        keys = [(zoom, patch.tobytes()) for patch in patches]
        new = [i for i, key in enumerate(keys) if key not in self.known]
        if new:
            for i, answer in zip(new, self.network(patches[new], zoom)):
                self.known[keys[i]] = answer
        return np.stack([self.known[key] for key in keys])


def second_of(path_or_name: str, first: str, precision: Precision = "auto") -> Second:
    """The network of a checkpoint as the second beside that of the checkpoint `first`; its price by multiply-adds."""
    price = multiply_adds(checkpoint.load(path_or_name)) / multiply_adds(checkpoint.load(first))
    network = network_of(path_or_name, precision)
    return Second(lambda patches, boxes: network(patches, 1.0), price)


def _truth(target: np.ndarray) -> Second:
    """The precise mask (H, W) uint8 0/1 in a network's place."""

    def answers(patches: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        # A frame narrower than a patch has boxes that stick out; beyond it there is no object.
        height, width = patches.shape[1:3]
        whole = np.pad(target, ((0, height), (0, width)))
        parts = [whole[y : y + height, x : x + width] for x, y in boxes[:, :2].tolist()]
        return np.stack(parts).astype(np.uint16) * np.uint16(65535)

    return Second(answers, HRNET48_PRICE)


def _answers(
    patches: np.ndarray, boxes: np.ndarray, setting: Setting, network: Network, second: Second | None
) -> tuple[np.ndarray, float]:
    """Probabilities (N, P, P) uint16 of the patches, N > 0, in their boxes (N, 4), and what they cost."""
    if setting.doubt is not None and second:
        answers, cost = _full(patches, setting, network)
        wrong = np.minimum(answers, np.uint16(65535) - answers).mean(axis=(1, 2)) / 65535
        if (unsure := wrong >= setting.doubt).any():
            answers[unsure] = second.answers(patches[unsure], boxes[unsure])
            cost += second.price * int(unsure.sum())
        return answers, cost
    if setting.confirm is None:
        return _full(patches, setting, network)
    first = network(patches, FIRST_PASS_ZOOM) > 32767
    doubtful = (first != (patches[..., 3] != 0)).mean(axis=(1, 2)) >= setting.confirm
    answers = patches[..., 3].astype(np.uint16) * np.uint16(65535)
    cost = len(patches) * FIRST_PASS_ZOOM**2
    if doubtful.any():
        answers[doubtful], more = _full(patches[doubtful], setting, network)
        cost += more
    return answers, cost


def _full(patches: np.ndarray, setting: Setting, network: Network) -> tuple[np.ndarray, float]:
    answers, cost = network(patches, setting.zoom), len(patches) * setting.zoom**2
    if setting.flip:
        mirrored = network(np.ascontiguousarray(patches[:, :, ::-1]), setting.zoom)[:, :, ::-1]
        answers, cost = ((answers.astype(np.uint32) + mirrored + 1) >> 1).astype(np.uint16), 2 * cost
    return answers, cost


def attempt(
    image: np.ndarray,
    coarse: np.ndarray,
    setting: Setting,
    network: Network,
    guard: GuardConfig,
    second: Second | None = None,
) -> tuple[np.ndarray, int, float, int]:
    """Refine one coarse mask (H, W), not empty, of an image (H, W, 3) uint8 RGB under a setting.

    `second` is for settings with `doubt`. Returns the refined mask (H, W) bool, the number of patches, their cost, and
    the number of pixels of the coarse boundary that lie in no patch.
    """
    height, width = image.shape[:2]
    instance = Instance("0", 0, 1.0, *cut_to_box(coarse))
    patches, cost, uncovered = 0, 0.0, 0
    for iteration in range(setting.iterations):
        boxes = np.zeros((0, 4), np.int32)
        if not passed_over(instance.mask, guard):
            boxes = _boxes(instance, (width, height), setting)
        if iteration == 0:
            uncovered = _uncovered(coarse, boxes)
        if not len(boxes):
            break
        patches_of = crop(image, instance.mask, instance.origin, boxes)
        answers, more = _answers(patches_of, boxes, setting, network, second)
        patches, cost = patches + len(boxes), cost + more
        work = Work("0", Frame("0", "", width, height, [instance]), [boxes])
        assemble(work, answers, guard)
        if work.error:
            raise RuntimeError(work.error)
    return mask_within(instance, Box(0, 0, width, height)), patches, cost, uncovered


def _uncovered(coarse: np.ndarray, boxes: np.ndarray) -> int:
    band = boundary_strength(coarse) > 0
    for x1, y1, x2, y2 in boxes.tolist():
        band[y1:y2, x1:x2] = False
    return int(np.count_nonzero(band))


def trials(
    samples: Iterable[Sample],
    settings: Sequence[Setting],
    network: Network,
    guard: GuardConfig,
    second: Second | None = None,
) -> Iterator[Trial]:
    """Try all settings on every coarse mask of `grading.samples`, except on those that the guard passes over.

    `second` is what settings with `doubt` ask, unless they are a `bound`.
    """
    for sample in samples:
        for coarse, target in zip(sample.coarse, sample.targets):
            if passed_over(coarse != 0, guard):
                continue
            remembering = Remembering(network)
            before = scores(coarse, target)
            boundary = int(np.count_nonzero(boundary_strength(coarse)))
            for setting in settings:
                asked = _truth(target) if setting.bound else second
                refined, patches, cost, uncovered = attempt(sample.image, coarse, setting, remembering, guard, asked)
                after = scores(refined.view(np.uint8), target)
                yield Trial(sample.key, sample.kind, setting.name, boundary, uncovered, patches, cost, before, after)
