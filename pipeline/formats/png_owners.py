"""Which frame of a Cityscapes folder a PNG belongs to: two frames that list one would overwrite each other's mask."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor

from pipeline import storage
from pipeline.confine import inside
from pipeline.records import InputError

_BREAK = re.compile(r"[^0-9A-Za-z]")


def owners_of(name: str, stems: Container[str]) -> int:
    """How many of the images called `stems` the file `name` is named after: `<stem>.png`, `<stem>_0.png`, ..."""
    return sum(name[: found.start()] in stems for found in _BREAK.finditer(name))


def shared(root: str, stems: Mapping[str, str], largest: int) -> dict[str, str]:
    """What is wrong with each list below the folder `root` that has the same PNG as another one, or one named after it.

    `stems` is the image's name by the path of its list.

    Lists of more than `largest` bytes, and those that cannot be read, are left to their frames' reading.
    """

    def pngs(path: str) -> set[str]:
        try:
            lines = storage.read(inside(root, path, largest)).decode("utf-8-sig", errors="replace").splitlines()
        except InputError:
            return set()
        folder = posixpath.dirname(path)
        return {posixpath.normpath(posixpath.join(folder, line.split()[0])) for line in lines if line.split()}

    all_stems = set(stems.values())
    first: dict[str, str] = {}
    twice: dict[str, str] = {}
    with ThreadPoolExecutor(16) as threads:
        for path, found in zip(stems, threads.map(pngs, stems)):
            for png in sorted(found):
                name = posixpath.basename(png)
                if not owners_of(name, (stems[path],)) and owners_of(name, all_stems):
                    twice.setdefault(path, f"{png} is named after another image, expected {stems[path]}*.png")
                    continue
                owner = first.setdefault(png, path)
                if owner != path:
                    message = f"expected every PNG in one list, {png} is in {owner} and {path}"
                    twice.setdefault(owner, message)
                    twice.setdefault(path, message)
    return twice
