"""From the files that other libraries write their predictions to, to the COCO results json that `refine` reads.

files --library--> entries, one instance each --named and checked--> json, one entry at a time
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from pipeline import storage
from pipeline.conversion import detectron2, mmdetection, torchvision, ultralytics
from pipeline.conversion.entries import Entry, check_entry, is_empty
from pipeline.conversion.image_list import ImageList, read_image_list
from pipeline.formats import json_list
from pipeline.outputs import check_apart
from pipeline.records import InputError, printable

SHOWN = 20
"""Categories that the job names."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Convert the instance masks of another library to a COCO results json.

    Images are named in it by their ids in `image_list`; without one, by the ids the library gave them, or else by their
    file names without extension, which `--image-pattern '{image_id}.jpg'` of jobs/refine.py finds.
    """

    input: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]
    """The file or folder that the library has written; any fsspec URL."""
    library: Annotated[Literal["detectron2", "mmdetection", "ultralytics", "torchvision"], tyro.conf.arg(name="from")]
    """The library that has written it."""
    output: str
    """The COCO results json to write; any fsspec URL."""
    image_list: str | None = None
    """A json whose `images` have `id` and `file_name`; labels become the ids of its `categories`, where it has any."""
    images: str | None = None
    """Label files of ultralytics only: the folder the images lie in, whose sizes they do not tell."""
    mask_threshold: float = 0.5
    """Torchvision only: probability above which a pixel is the object's."""

    def __post_init__(self) -> None:
        if not 0 <= self.mask_threshold < 1:
            raise InputError(f"mask_threshold is {self.mask_threshold}: expected a number from 0 to 1")


@dataclass(frozen=True)
class Converted:
    """What a conversion has written."""

    output: str
    instances: int
    images: int
    empty: int
    """Instances whose mask has no pixel."""
    categories: Mapping[str, int]
    """Instances of each category, called by its id and name; empty where no list tells names."""

    def __str__(self) -> str:
        empty = f" ({self.empty} of them without a mask)" if self.empty else ""
        wrote = f"wrote {self.output}: {self.instances} instances{empty} in {self.images} images"
        if not self.categories:
            return wrote
        shown = [f"{printable(name)} ({count})" for name, count in [*self.categories.items()][:SHOWN]]
        more = [f"{len(self.categories) - SHOWN} more"] if len(self.categories) > SHOWN else []
        return f"{wrote}\ncategories: {', '.join(shown + more)}"


def convert(config: ConvertConfig) -> Converted:
    """Convert predictions, one entry after the other; the output appears whole, or not at all.

    InputError names the file, and the entry or line in it, that is not what the library writes.
    """
    for source in (config.input, config.image_list, config.images):
        if source is not None:
            check_apart(config.output, source)
    listed = read_image_list(config.image_list) if config.image_list is not None else ImageList()
    image_ids: dict[str, type] = {}
    counts = {"instances": 0, "empty": 0}
    of_category: Counter[int] = Counter()

    def lines() -> Iterator[str]:
        for place, entry in _entries(config, listed):
            check_entry(place, entry)
            counts["instances"] += 1
            counts["empty"] += is_empty(entry)
            of_category[entry["category_id"]] += 1
            image_id = entry["image_id"]
            if image_ids.setdefault(str(image_id), type(image_id)) is not type(image_id):
                raise InputError(f"{place}: image_id {image_id!r}, expected numbers or text throughout")
            yield json.dumps(entry, separators=(",", ":"))

    with storage.open_write(config.output) as file:
        json_list.write(file, lines())
        if counts["instances"] == counts["empty"]:
            # Label files of models without masks have boxes that look like polygons of two points.
            raise InputError(f"{config.input}: expected instances with masks, found none")
    named = {
        f"{category} {listed.categories.get(category, 'which is not listed')}".rstrip(): of_category[category]
        for category in sorted(of_category if listed.categories else ())
    }
    return Converted(config.output, counts["instances"], len(image_ids), counts["empty"], named)


def _entries(config: ConvertConfig, listed: ImageList) -> Iterator[tuple[str, Entry]]:
    if config.images is not None and config.library != "ultralytics":
        raise InputError(f"images is for label files of ultralytics; {config.input} is read as of {config.library}")
    if not storage.exists(config.input):
        raise InputError(f"{config.input}: no such file or folder")
    readers: dict[str, Any] = {
        "detectron2": lambda: detectron2.entries(config.input, listed),
        "mmdetection": lambda: mmdetection.entries(config.input, listed),
        "ultralytics": lambda: ultralytics.entries(config.input, listed, config.images),
        "torchvision": lambda: torchvision.entries(config.input, listed, config.mask_threshold),
    }
    return readers[config.library]()
