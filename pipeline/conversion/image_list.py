"""Which id an image has, and which category a model's label means: told by a COCO json, or left as they are."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.confine import inside
from pipeline.formats.coco import read_images
from pipeline.records import InputError

Name = TypeVar("Name", str, int)

LONGEST_NUMBER = 100
"""Digits of a file name that may be a number."""


def stem(path: str) -> str:
    """A file's name without folders and extension."""
    return posixpath.splitext(posixpath.basename(path.replace("\\", "/")))[0]


def one_each(url: str, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Of the files of a folder by their paths below it, of which each is about one image: its name, and the file.

    InputError where two have the same name.
    """
    seen: dict[str, str] = {}
    for path in paths:
        name, file = stem(path), inside(url, path)
        if (first := seen.setdefault(name, path)) != path:
            raise InputError(f"{file}: expected one file for each image, {first} has the same name")
        yield name, file


@dataclass(frozen=True)
class ImageList:
    """The images and categories of a COCO json; without one, names and labels stay what they are."""

    url: str = ""
    ids: Mapping[str, int | str] = field(default_factory=dict)
    """By file name without folders and extension; of several with the same name none."""
    numbers: Mapping[int, int | str] = field(default_factory=dict)
    """The ids of images whose names are numbers, by these; of several with the same number none."""
    categories: Mapping[int, str] = field(default_factory=dict)
    """Names by id, in the order of the file; empty where it has none."""

    def image_id(self, place: str, name: Any) -> Any:
        """The id of the image whose file name is `name`, without its extension; a number may have lost leading zeros.

        InputError names `place` where the list does not have the image, or several of this name.
        """
        if not self.url:
            return name
        if name in self.ids:
            return self.ids[str(name)]
        if name in self.numbers:
            return self.numbers[int(name)]
        raise InputError(f"{place}: image {name!r}, expected one that {self.url} lists, and under a name of its own")

    def category(self, place: str, label: Any, ordered: bool = False) -> Any:
        """The category of a model's label, counted from 0 in the order of the file, or of the ids where `ordered`."""
        if not self.categories or type(label) is not int:
            return label
        if not 0 <= label < len(self.categories):
            known = f"0 to {len(self.categories) - 1} for the categories of {self.url}"
            raise InputError(f"{place}: label {label}, expected {known}")
        return (sorted(self.categories) if ordered else [*self.categories])[label]


def read_image_list(url: str) -> ImageList:
    """The images and categories of a COCO json, annotations or not. InputError where it is none."""
    images, categories = read_images(url)
    ids = [(stem(name), image_id) for image_id, name in images]
    if not all(type(one) is int for one in categories):
        raise InputError(f"{url}: expected whole numbers as ids of categories")
    numbered = [(int(name), image_id) for name, image_id in ids if name.isdecimal() and len(name) <= LONGEST_NUMBER]
    return ImageList(url, _told_apart(ids), _told_apart(numbered), categories)


def _told_apart(ids: Sequence[tuple[Name, int | str]]) -> dict[Name, int | str]:
    times = Counter(name for name, _ in ids)
    return {name: image_id for name, image_id in ids if times[name] == 1}
