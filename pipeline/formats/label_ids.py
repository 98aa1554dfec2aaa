"""Keeps frames with classes that Cityscapes does not know out of an output that is written as a Cityscapes folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.formats import Reader
from pipeline.formats.cityscapes import LABEL_IDS
from pipeline.records import FrameRef, InputError, Instance


@dataclass(frozen=True)
class LabelIdReader:
    """Reads as `reader` does, but for frames with a category that a Cityscapes folder cannot be read with again."""

    reader: Reader

    @property
    def predictions(self) -> str:
        return self.reader.predictions

    def list_frames(self, known: Mapping[str, str] | None = None) -> list[FrameRef]:
        return self.reader.list_frames(known)

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
