"""What a run does to every frame, small enough to travel to any process, and its steps as calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from model.backend import Backend, Precision, UnsupportedError
from model.heap import keep_freed_memory
from pipeline import storage
from pipeline.config import Device
from pipeline.formats import Reader, Writer
from pipeline.guard import GuardConfig
from pipeline.isolation import ChildError, isolated
from pipeline.limits import LimitsConfig
from pipeline.records import FrameRef, InputError
from pipeline.stages import Block, Cutting, assemble, commit, extract, refine, refine_in_pieces
from pipeline.work import Receipt, Work

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
        _prepare_process()
        return extract(ref, self.reader, self.images, self.cutting, self.guard, self.limits)

    def refine(self, blocks: Iterable[Block], refiner: Refiner) -> Iterator[Block]:
        """Of blocks of frames and their patches, the frames and probabilities; frames in pieces are finished here.

        InputError where the machine cannot run the network so.
        """
        try:
            for works, probabilities in refine(blocks, refiner, self.cutting.padding):
                for work in works:
                    if work.in_pieces:
                        refine_in_pieces(work, refiner, self.images, self.cutting, self.guard, self.limits)
                yield works, probabilities
        except UnsupportedError as error:
            raise InputError(str(error)) from None

    def finish(self, works: Sequence[Work], probabilities: Sequence[np.ndarray]) -> list[Receipt]:
        """Reassemble the frames and write them."""
        _prepare_process()
        for work, part in zip(works, probabilities):
            assemble(work, part, self.guard)
        return commit(works, self.writer)

    def extract_all(self, refs: Sequence[FrameRef]) -> Block:
        """Read frames and cut their patches; the frames are sealed."""
        works, patches = [], []
        for ref in refs:
            work, part = self.extract(ref)
            work.seal()
            works.append(work)
            patches.append(part)
        return works, patches

    def extract_isolated(self, refs: Sequence[FrameRef]) -> Block:
        """As `extract_all`, in a child process: a frame that ends it, or takes too long, is set aside."""
        try:
            with isolated(2 * self.limits.memory_bytes) as child:
                works, patches = child.call(self.extract_all, refs, seconds=self.limits.seconds)
        except ChildError as death:
            if len(refs) > 1:
                alone = [self.extract_isolated([ref]) for ref in refs]
                return [work for works, _ in alone for work in works], [part for _, parts in alone for part in parts]
            work = Work(refs[0].frame_id, file_name=refs[0].file_name)
            work.set_aside(InputError(f"{work.file_name}: reading it {death}"))
            return [work], [self.cutting.no_patches]
        if len(refs) > 1:
            # The others may have left a frame too little memory.
            for i, work in enumerate(works):
                if work.error:
                    (works[i],), (patches[i],) = self.extract_isolated([refs[i]])
        return works, patches

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
                    work.set_aside(InputError(f"{work.file_name}: refining it {death}"))
                    refined.append((work, self.cutting.no_patches[..., 0].astype(np.uint16)))
        return [work for work, _ in refined], [part for _, part in refined]

    def finish_isolated(self, works: Sequence[Work], probabilities: Sequence[np.ndarray]) -> list[Receipt]:
        """As `finish`, in a child process: of a block that ends it, the frame that did it is set aside."""
        with isolated(2 * self.limits.memory_bytes) as child:
            try:
                return child.call(self.finish, works, probabilities, seconds=self.limits.seconds)
            except ChildError as death:
                if len(works) == 1:
                    works[0].set_aside(InputError(f"{works[0].file_name}: writing it {death}"))
                    return commit(works, self.writer)
        return [receipt for work, part in zip(works, probabilities) for receipt in self.finish_isolated([work], [part])]

    def _refine_one(self, work: Work, patches: np.ndarray, load: Callable[[], Refiner]) -> tuple[Work, np.ndarray]:
        ((_, (probabilities,)),) = self.refine([([work], [patches])], load())
        return work, probabilities


def _prepare_process() -> None:
    # Frames are worked on side by side; threads within one would only get in each other's way.
    cv2.setNumThreads(1)
    keep_freed_memory()


@dataclass(frozen=True)
class Plan:
    """A run: its stages, its network, and the frames to do."""

    stages: Stages
    load_refiner: Callable[[], Refiner]
    refs: list[FrameRef]
    frames_per_block: int | None = None
    """Frames that are refined and committed together; by their patches (`blocks`) where None."""
    device: Device = "auto"
    """What `load_refiner` loads the network for."""
    ledger: bool = False
    """Whether there is a ledger on the output, by which every machine can tell that it sees the same one."""
    place: dict[str, Any] = field(default_factory=dict)
    """Where it runs, told by what runs it: `placement`, number of `machines`, `pool`, `ray_data_stats`."""


@lru_cache(maxsize=1)
def load_refiner(
    checkpoint: str,
    precision: Precision,
    batch_size: int | None,
    cpu_backend: Backend,
    gpu_backend: Backend = "auto",
    device: Device = "auto",
) -> Refiner:
    """The network of a checkpoint, in the process that will run it, by the backend for what that has.

    InputError where this machine cannot calculate in the precision.
    """
    import torch

    from model import Refiner
    from model.checkpoint import load

    on_gpu = torch.cuda.is_available() and device != "cpu"
    on, backend = ("cuda", gpu_backend) if on_gpu else ("cpu", cpu_backend)
    network = load(checkpoint, storage.read(checkpoint))
    try:
        return Refiner(network, on, precision=precision, batch_size=batch_size, backend=backend)
    except torch.OutOfMemoryError:
        raise InputError(f"{on} has no memory left for the network of {checkpoint}") from None
    except UnsupportedError as error:
        raise InputError(str(error)) from None
