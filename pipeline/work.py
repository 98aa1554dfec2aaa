"""What a frame carries through the stages, and what the driver is told of it."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from pipeline import storage
from pipeline.records import Frame, fault


@dataclass(slots=True)
class Work:
    """One frame on its way through the stages, without its image."""

    frame_id: str
    frame: Frame | None = None
    boxes: list[np.ndarray] = field(default_factory=list)
    """Per instance the (n, 4) int32 boxes of its patches; the patches themselves travel beside, in this order."""
    error: str = ""
    """Why the frame is set aside; empty while all is well."""
    in_pieces: bool = False
    """Whether it has more patches than may travel (`stages.IN_PIECES`), so that none do."""
    seconds: dict[str, float] = field(default_factory=dict)
    refined_at: float = 0.0
    """Unix time at which its patches left the network."""
    file_name: str = ""
    identity: str = ""
    """What its inputs were when it was read."""
    counts: dict[str, int] = field(default_factory=dict)
    """What it took: `bytes_read`, `bytes_written`, and `batch_places`, the patches that fit the network's batches."""
    arithmetic: str = ""
    """What refined it (`Refiner.arithmetic`)."""
    sealed: bytes = b""
    """Frame and boxes, while they are not needed: who passes a frame on need not take all its masks apart."""

    @property
    def patches(self) -> int:
        return sum(map(len, self.boxes))

    def seal(self) -> None:
        """Put frame and boxes away until `open`."""
        self.sealed = pickle.dumps((self.frame, self.boxes), pickle.HIGHEST_PROTOCOL)
        self.frame, self.boxes = None, []

    def open(self) -> None:
        """Take frame and boxes out again, where they were put away."""
        if self.sealed:
            self.frame, self.boxes = pickle.loads(self.sealed)
            self.sealed = b""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Note how long `stage` takes here, and the bytes that it reads."""
        started, read = time.perf_counter(), storage.traffic["read"]
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
            self.count("bytes_read", storage.traffic["read"] - read)

    def count(self, what: str, number: int) -> None:
        """Add `number` to one of the `counts`."""
        if number:
            self.counts[what] = self.counts.get(what, 0) + number

    def set_aside(self, error: Exception) -> None:
        """Note why the frame cannot be finished, and let go of what was made of it."""
        self.error = fault(self.file_name, error)
        self.frame, self.boxes, self.sealed, self.in_pieces = None, [], b"", False


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the driver is told about a frame that is finished or set aside."""

    frame_id: str
    error: str
    part: str
    instances: int
    refined: int
    patches: int
    seconds: dict[str, float]
    refined_at: float
    reasons: dict[str, int] = field(default_factory=dict)
    """Number of instances that have a reason (`guard.REASONS`), by reason."""
    file_name: str = ""
    identity: str = ""
    """What the frame's inputs were (`pipeline.identity`); empty where it was set aside."""
    counts: dict[str, int] = field(default_factory=dict)
    """As `Work.counts`; what frames took together is with one of them."""
    arithmetic: str = ""
