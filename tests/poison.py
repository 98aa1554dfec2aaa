"""Readers and networks that do to their process what decoders and drivers do to it on a bad day."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.formats.cityscapes import CityscapesReader
from pipeline.records import FrameRef, Instance


@dataclass(frozen=True)
class PoisonedReader(CityscapesReader):
    """Reads what a Cityscapes reader does, until it comes to a frame with one of these ids."""

    kills: tuple[str, ...] = ()
    hangs: tuple[str, ...] = ()
    fills: tuple[str, ...] = ()

    def read(self, ref: FrameRef, width: int, height: int) -> Iterator[Instance]:
        if ref.frame_id in self.kills:
            os.kill(os.getpid(), signal.SIGSEGV)
        if ref.frame_id in self.hangs:
            time.sleep(3600)
        if ref.frame_id in self.fills:
            yield Instance("", 0, 1.0, np.ones((40000, 40000), bool))
        yield from super().read(ref, width, height)


class Blur:
    """In the network's place, a thousand times faster: the coarse mask with soft edges."""

    batch_size = 4
    arithmetic = "none"
    places = 0

    def probabilities(self, *patches: np.ndarray) -> np.ndarray:
        masks = np.concatenate(patches)[..., 3] * np.uint16(65535)
        return np.array([cv2.blur(mask, (5, 5)) for mask in masks], np.uint16).reshape(masks.shape)

    def each(self, blocks: Iterable[Sequence[np.ndarray]]) -> Iterator[np.ndarray]:
        for block in blocks:
            self.places += -(-sum(map(len, block)) // self.batch_size) * self.batch_size
            yield self.probabilities(*block)


class PoisonedNetwork(Blur):
    """Does not survive patches with a blue pixel in the corner of the image."""

    def probabilities(self, *patches: np.ndarray) -> np.ndarray:
        if any((part[..., :3] == (1, 2, 255)).all(axis=-1).any() for part in patches):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().probabilities(*patches)


def load_poisoned(*_: object) -> PoisonedNetwork:
    return PoisonedNetwork()
