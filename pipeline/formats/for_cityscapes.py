"""Keeps frames that have no place in a Cityscapes folder out of an output that is written as one."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.formats import Reader
from pipeline.formats.cityscapes import LABEL_IDS, base_path
from pipeline.records import FrameRef, InputError, Instance


@dataclass(frozen=True)
class ReaderForCityscapes:
    """Reads as `reader` does, whose dump is of another form, but for frames that a Cityscapes folder cannot hold."""

    reader: Reader

    @property
    def predictions(self) -> str:
        return self.reader.predictions

    def list_frames(self, known: Mapping[str, str] | None = None) -> list[FrameRef]:
        """A frame that would overwrite an earlier one gets an error.

        Frames are named after their images there, which frames of another form may share; also those of other folders,
        as the images of a Cityscapes folder are found by their names alone.
        """
        owners: dict[str, str] = {}
        kept = []
        for ref in self.reader.list_frames(known):
            owner = owners.setdefault(posixpath.basename(base_path(ref)), ref.frame_id)
            if owner != ref.frame_id and not ref.error:
                expected = "expected one frame per image in a Cityscapes folder"
                ref = replace(ref, error=f"{ref.file_name}: {expected}, frame {owner} has it as well")
            kept.append(ref)
        return kept

    def read(self, ref: FrameRef, width: int, height: int) -> Iterator[Instance]:
        """InputError names the first instance whose category is no label id of Cityscapes, before it is refined."""
        for instance in self.reader.read(ref, width, height):
            if instance.category_id not in LABEL_IDS:
                raise InputError(
                    f"{ref.file_name}: instance {instance.instance_id}: category {instance.category_id}, expected a"
                    f" label id of Cityscapes, {LABEL_IDS[0]} to {LABEL_IDS[-1]}, in an output in its form"
                )
            yield instance

    def identity(self, ref: FrameRef, instances: Sequence[Instance]) -> str:
        return self.reader.identity(ref, instances)
