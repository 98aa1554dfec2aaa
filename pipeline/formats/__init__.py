"""The forms a dump comes in and goes out as; each is one module that reads and writes its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

from pipeline.records import Frame, FrameRef, Instance


class Reader(Protocol):
    """Reads one dump. Small and picklable: it travels to every worker."""

    predictions: str

    def list_frames(self, known: Mapping[str, str] | None = None) -> list[FrameRef]:
        """Every frame of the dump in a fixed order, without opening more files than needed to name them.

        With `known`, the identity of every frame id that an earlier run has recorded, references have their `identity`.
        A problem with one frame becomes that reference's `error`; InputError is for a dump that cannot be read at all.
        """

    def read(self, ref: FrameRef, width: int, height: int) -> Iterator[Instance]:
        """The instances of one frame whose image is `width` x `height`; InputError where anything is wrong with one.

        A mask is decoded when its instance is asked for, so that a caller can stop before they fill the memory.
        """

    def identity(self, ref: FrameRef, instances: Sequence[Instance]) -> str:
        """What to record of a frame that was read: the reference's identity without what did not matter to it."""


class Writer(Protocol):
    """Writes one refined dump. Small and picklable."""

    output: str

    result: ClassVar[str]
    """Path, below the output, of a file that `finish` always makes; empty where it has nothing to do."""

    def commit(self, frames: Sequence[Frame]) -> str:
        """Write some finished frames from a worker, so that a repeat overwrites the same files with the same bytes.

        Returns the path, below the output, of the part that holds them; empty where the frames are the final output.
        """

    def finish(self, refs: Sequence[FrameRef], parts: Mapping[str, str]) -> list[str]:
        """Make the final output from the parts, from the driver, when all frames are committed.

        Returns the paths of its files, below the output; none where the committed frames are the final output.

        `refs` are the frames of the whole dump in order, `parts` says which part holds a frame id; frames it does not
        name were set aside and are left out.
        """

    def withdraw(self, gone: Sequence[FrameRef], listed: Sequence[FrameRef]) -> None:
        """Remove the files of committed frames, but for those that some frame of `listed` will replace.

        Of `gone` only `frame_id` and `file_name` are known. Nothing to do where `finish` makes the files.
        """
