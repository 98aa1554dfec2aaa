"""The forms a dump comes in and goes out as; each is one module that reads and writes its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from pipeline.records import Frame, FrameRef, Instance


class Reader(Protocol):
    """Reads one dump. Small and picklable: it travels to every worker."""

    def list_frames(self) -> list[FrameRef]:
        """Every frame of the dump in a fixed order, without opening more files than needed to name them.

        A problem with one frame becomes that reference's `error`; InputError is for a dump that cannot be read at all.
        """

    def read(self, ref: FrameRef, width: int, height: int) -> list[Instance]:
        """The instances of one frame whose image is `width` x `height`; InputError where anything is wrong with one."""


class Writer(Protocol):
    """Writes one refined dump. Small and picklable."""

    def commit(self, frames: Sequence[Frame]) -> str:
        """Write some finished frames from a worker, so that a repeat overwrites the same files with the same bytes.

        Returns the path, below the output, of the part that holds them; empty where the frames are the final output.
        """

    def finish(self, refs: Sequence[FrameRef], parts: Mapping[str, str]) -> None:
        """Make the final output from the parts, from the driver, when all frames are committed.

        `refs` are the frames of the whole dump in order, `parts` says which part holds a frame id; frames it does not
        name were set aside and are left out.
        """
