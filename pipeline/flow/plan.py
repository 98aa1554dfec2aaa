"""What a run does to every frame, small enough to travel to any process, and its steps as calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pipeline import storage
from pipeline.formats import Reader, Writer
from pipeline.guard import GuardConfig
from pipeline.isolation import ChildError, isolated
from pipeline.limits import LimitsConfig
from pipeline.records import FrameRef, InputError
from pipeline.stages import Cutting, Receipt, Work, assemble, commit, extract, refine, refine_in_pieces, set_aside

if TYPE_CHECKING:
    from model import Refiner


@dataclass(frozen=True)
class Stages:
    """The stages of one run, with everything they need to know."""

    reader: Reader
    writer: Writer
    images: str
    cutting: Cutting
    guard: GuardConfig
    limits: LimitsConfig

    def extract(self, ref: FrameRef) -> tuple[Work, np.ndarray]:
        """Read a frame and cut its patches (N, P, P, 4) uint8."""
        # Frames are worked on side by side; threads within one would only get in each other's way.
        cv2.setNumThreads(1)
        return extract(ref, self.reader, self.images, self.cutting, self.guard, self.limits)

    def refine(self, works: Sequence[Work], patches: Sequence[np.ndarray], refiner: Refiner) -> list[np.ndarray]:
        """Foreground probabilities (n, P, P) uint16 of each frame's patches; frames in pieces are finished here."""
        for work in works:
            if work.in_pieces:
                refine_in_pieces(work, refiner, self.images, self.cutting, self.guard, self.limits)
        return refine(works, patches, refiner, self.cutting.padding)

    def finish(self, works: Sequence[Work], probabilities: Sequence[np.ndarray]) -> list[Receipt]:
        """Reassemble the frames and write them."""
        cv2.setNumThreads(1)
        for work, part in zip(works, probabilities):
            assemble(work, part, self.guard)
        return commit(works, self.writer)

    def extract_isolated(self, ref: FrameRef) -> tuple[Work, np.ndarray]:
        """As `extract`, in a child process: a frame that ends it, or takes too long, is set aside."""
        with isolated(2 * self.limits.memory_bytes) as child:
            try:
                return child.call(self.extract, ref, seconds=self.limits.seconds)
            except ChildError as death:
                work = Work(ref.frame_id, file_name=ref.file_name)
                set_aside(work, InputError(f"{ref.file_name}: reading it {death}"))
                return work, self._no_patches()

    def refine_isolated(
        self, works: Sequence[Work], patches: Sequence[np.ndarray], load: Callable[[], Refiner]
    ) -> tuple[list[Work], list[np.ndarray]]:
        """As `refine`, frame by frame with a network in a child process; also the frames, as the child leaves them."""
        refined = []
        with isolated() as child:
            for work, part in zip(works, patches):
                try:
                    refined.append(child.call(self._refine_one, work, part, load))
                except ChildError as death:
                    set_aside(work, InputError(f"{work.file_name}: refining it {death}"))
                    refined.append((work, self._no_patches()[..., 0].astype(np.uint16)))
        return [work for work, _ in refined], [part for _, part in refined]

    def finish_isolated(self, works: Sequence[Work], probabilities: Sequence[np.ndarray]) -> list[Receipt]:
        """As `finish`, in a child process: of a block that ends it, the frame that did it is set aside."""
        with isolated(2 * self.limits.memory_bytes) as child:
            try:
                return child.call(self.finish, works, probabilities, seconds=len(works) * self.limits.seconds)
            except ChildError as death:
                if len(works) == 1:
                    set_aside(works[0], InputError(f"{works[0].file_name}: writing it {death}"))
                    return commit(works, self.writer)
        return [receipt for work, part in zip(works, probabilities) for receipt in self.finish_isolated([work], [part])]

    def _refine_one(self, work: Work, patches: np.ndarray, load: Callable[[], Refiner]) -> tuple[Work, np.ndarray]:
        (probabilities,) = self.refine([work], [patches], load())
        return work, probabilities

    def _no_patches(self) -> np.ndarray:
        side = self.cutting.patch_px + 2 * self.cutting.padding
        return np.zeros((0, side, side, 4), np.uint8)


@dataclass(frozen=True)
class Plan:
    """A run: its stages, its network, and the frames to do."""

    stages: Stages
    load_refiner: Callable[[], Refiner]
    refs: list[FrameRef]
    frames_per_block: int | None = None
    """Frames that are refined and committed together; by their patches (`blocks`) where None."""
    place: dict[str, Any] = field(default_factory=dict)
    """Where it runs, told by what runs it: `placement`, number of `machines`, `pool`, `ray_data_stats`."""


@lru_cache(maxsize=1)
def load_refiner(checkpoint: str, precision: Any, batch_size: int | None, cpu_backend: Any) -> Refiner:
    """The network of a checkpoint, in the process that will run it; `cpu_backend` where that has no GPU."""
    import torch

    from model import Refiner
    from model.checkpoint import load

    backend = "torch" if torch.cuda.is_available() else cpu_backend
    network = load(checkpoint, storage.read(checkpoint))
    return Refiner(network, precision=precision, batch_size=batch_size, backend=backend)
