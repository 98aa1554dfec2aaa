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
    """What is wrong, by path, with lists that name a PNG which another list names too, or is named after another image.

    `stems` has the path below the folder `root` of every list, and the name of the image that it is about. Lists that
    cannot be read, or of more than `largest` bytes, are passed over: reading their frames will say so.
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
