"""COCO results: one json with a list of entries, one instance each, that may be larger than memory."""

from __future__ import annotations

import hashlib
import json
import posixpath
import string
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np

from pipeline import rle, storage
from pipeline.confine import writable
from pipeline.formats import json_list
from pipeline.formats import parts as part_files
from pipeline.identity import digest, identified
from pipeline.records import Frame, FrameRef, InputError, Instance

NEARBY = 64 << 10
"""Entries with fewer bytes than that between them are read at once: another request would cost more."""

LARGEST_READ = 64 << 20
"""Bytes after which entries that lie close together are read in another request all the same."""

DEEPEST = 64
"""Lists and objects within each other in an entry's other keys, which are written again, deeper in Python's calls."""

LONGEST_ID = 1000
"""Characters of an image id that is text."""

WINDOW = 1 << 18
"""Entries held while a json is written in which the images are mixed."""

_VERDICT = {"status": (str,), "reason": (str,), "changed_pixels": (int,), "confidence": (int, float)}
"""Keys that say what an earlier refinement did, and the types of their values."""

_REWRITTEN = ("category_id", "segmentation", "bbox", "area", "score", *_VERDICT)


@dataclass(frozen=True)
class CocoReader:
    """Reads the results json `predictions`; images are found by their ids, below the folder `images`.

    Either `image_list` is given, a json whose `images` have `id` and `file_name` and whose `categories`, where it has
    any, are all that may occur; or `image_pattern`, such as `{image_id:012d}.jpg`.
    """

    predictions: str
    images: str
    image_list: str | None = None
    image_pattern: str | None = None
    any_category: bool = False
    """Also categories that the image list does not have."""

    def __post_init__(self) -> None:
        if (self.image_list is None) == (self.image_pattern is None):
            raise InputError(
                f"{self.predictions}: expected either image_list (a json whose `images` give ids their file names, as a"
                " ground truth) or image_pattern ('{image_id:012d}.jpg') beside COCO results"
            )
        if self.image_pattern is not None:
            _check_pattern(self.image_pattern)

    def list_frames(self, known: Mapping[str, str] | None = None) -> list[FrameRef]:
        """One reference per image in the order in which they first appear. Entries are seen one at a time.

        A frame's identity covers the bytes of its entries, and its image; not where in the file the entries are.
        InputError names the byte where the file is no list of objects, or the entry whose `image_id` is no id.
        """
        file_names, categories = _read_image_list(self.image_list) if self.image_list is not None else (None, None)
        owner_of: dict[str, int] = {}
        image_ids: list[int | str] = []
        unknown: dict[int, str] = {}
        spans, owners, contents = array("q"), array("q"), bytearray()
        for number, (offset, data, entry) in enumerate(json_list.scan(self.predictions)):
            image_id = entry.get("image_id")
            if type(image_id) not in (int, str) or not str(image_id)[:LONGEST_ID].isprintable():
                raise InputError(
                    f"{self._entry(number)}: expected a whole number or text as image_id, found {image_id!r:.40}"
                )
            if len(str(image_id)) > LONGEST_ID:
                raise InputError(f"{self._entry(number)}: expected an image_id of at most {LONGEST_ID} characters")
            owner = owner_of.setdefault(str(image_id), len(image_ids))
            if owner == len(image_ids):
                image_ids.append(image_id)
            elif type(image_id) is not type(image_ids[owner]):
                raise InputError(f"{self._entry(number)}: image_id {image_id!r}, expected numbers or text throughout")
            category = entry.get("category_id")
            foreign = categories is not None and type(category) is int and category not in categories
            if foreign and not self.any_category:
                message = f"unknown category {category}, expected one that {self.image_list} lists"
                unknown.setdefault(owner, f"{self._entry(number)}: {message}")
            spans.extend((offset, len(data)))
            owners.append(owner)
            if known is not None:
                contents += hashlib.blake2b(data, digest_size=8).digest()
        numbers = np.argsort(np.array(owners, np.int64), kind="stable")
        ends = np.cumsum(np.bincount(np.array(owners, np.int64), minlength=len(image_ids)))
        of_entry = np.array(spans, np.int64).reshape(-1, 2)
        of_content = np.frombuffer(contents, np.uint64)
        refs, predictions = [], []
        for owner, (image_id, mine) in enumerate(zip(image_ids, np.split(numbers, ends[:-1]))):
            file_name, error = self._file_name(image_id, file_names)
            refs.append(
                FrameRef(
                    frame_id=str(image_id),
                    file_name=file_name,
                    source=of_entry[mine].tobytes(),
                    positions=tuple(mine.tolist()),
                    error=f"{self._entry(int(mine[0]))}: {error}" if error else unknown.get(owner, ""),
                )
            )
            if known is not None:
                predictions.append(digest(of_content[mine].tobytes()))
        return refs if known is None else identified(refs, self.images, predictions)

    def identity(self, ref: FrameRef, instances: Sequence[Instance]) -> str:
        return ref.identity

    def _entry(self, number: int) -> str:
        return f"{self.predictions}: entry {number}"

    def _file_name(self, image_id: int | str, file_names: dict[int | str, str] | None) -> tuple[str, str]:
        """The image's file name, and what is wrong where there is none."""
        if file_names is not None:
            if image_id not in file_names:
                return "", f"image_id {image_id!r}, expected one that {self.image_list} lists"
            name = file_names[image_id]
        else:
            try:
                name = str(self.image_pattern).format(image_id=image_id)
            except (ValueError, MemoryError, OverflowError) as error:
                expected = f"expected one that the pattern {self.image_pattern} can take"
                return "", f"image_id {image_id!r}, {expected} ({error})"
        if not storage.stays_below(name):
            return "", f"image {name!r}, expected a path that stays below {self.images}"
        if not name.isprintable():
            return "", f"image {name!r}, expected a file name without control characters or half of a character"
        return name, ""

    def read(self, ref: FrameRef, width: int, height: int) -> Iterator[Instance]:
        """The instances of an image; an instance's id is its entry's number. InputError names the file and the entry.

        `extra` has all keys that the writer does not make anew, `image_id` among them as it was; an entry without a
        score counts as 1 and has None in `extra` as a mark. `status`, `reason`, `changed_pixels` and `confidence` are
        read where they have the values that the writer gives them.
        """
        for number, data in zip(ref.positions, self._bytes(ref.source)):
            try:
                instance = _instance(number, ref.frame_id, data, width, height)
            except InputError as error:
                raise InputError(f"{self._entry(number)}: {error}") from None
            yield instance

    def _bytes(self, source: bytes) -> Iterator[bytes]:
        spans = [(start, start + length) for start, length in np.frombuffer(source, np.int64).reshape(-1, 2).tolist()]
        first = 0
        for last, (_, end) in enumerate(spans):
            apart = last + 1 == len(spans) or spans[last + 1][0] - end > NEARBY
            if apart or end - spans[first][0] > LARGEST_READ:
                begin = spans[first][0]
                data = storage.read(self.predictions, begin, end)
                yield from (data[start - begin : stop - begin] for start, stop in spans[first : last + 1])
                first = last + 1


@dataclass(frozen=True)
class CocoWriter:
    """Writes `refined.json` below the folder `output`: a list of results, one entry per line.

    Beside COCO's keys entries have `status`, `reason`, `changed_pixels` and `confidence` (to four digits), as Instance
    explains them. Where the dump came from elsewhere, images are numbered from 1 in its order, entries also have the
    `file_name`, and `images.json` lists the images so that CocoReader can read the dump.
    """

    output: str
    result: ClassVar[str] = "refined.json"

    def withdraw(self, gone: Sequence[FrameRef], listed: Sequence[FrameRef]) -> None:
        """Nothing: frames that no part holds are not in the next json."""

    def commit(self, frames: Sequence[Frame]) -> str:
        return part_files.commit(self.output, frames)

    def finish(self, refs: Sequence[FrameRef], parts: Mapping[str, str]) -> list[str]:
        """Entries in the order of the input's json, or else by frame; memory is bounded by WINDOW and some parts."""
        held, in_order = part_files.Parts(self.output, parts), any(ref.positions for ref in refs)
        images: list[str] = []
        categories: set[int] = set()
        with storage.open_write(writable(self.output, self.result)) as file:
            lines = _by_position(refs, held) if in_order else _by_frame(refs, held, images, categories)
            json_list.write(file, lines)
        if in_order:
            return [self.result]
        with storage.open_write(writable(self.output, "images.json")) as file:
            file.write(b'{"images": ')
            json_list.write(file, images)
            file.write(b', "categories": ')
            json_list.write(file, (_dumps({"id": category, "name": str(category)}) for category in sorted(categories)))
            file.write(b"}\n")
        return [self.result, "images.json"]


def _check_pattern(pattern: str) -> None:
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
    except ValueError:
        names = set()
    if names != {"image_id"}:
        raise InputError(f"image_pattern is {pattern!r}: expected a name such as '{{image_id:012d}}.jpg'")


def image_file_name(image: Mapping[str, Any]) -> str:
    """The path that a COCO json gives an image.

    LVIS names an image by its address alone, which ends in COCO's folder and file name.
    """
    if "file_name" in image:
        return image["file_name"]
    return posixpath.join(*image["coco_url"].split("/")[-2:])


def read_images(url: str) -> tuple[list[tuple[Any, str]], dict[Any, str]]:
    """Id and file name of every image that a COCO json lists, and the names of its categories by id, if it has any.

    InputError where it is no such json.
    """
    data = storage.read(url)
    try:
        content = json.loads(data)
        images = [(image["id"], image_file_name(image)) for image in content["images"]]
        categories = {one["id"]: str(one.get("name", "")) for one in content.get("categories") or ()}
        # What has no hash, such as a list, is no id.
        hash(tuple(image_id for image_id, _ in images))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{url}: expected json: {error}") from None
    except (KeyError, TypeError, AttributeError):
        expected = '{"images": [{"id", "file_name"}, ...], "categories": [{"id"}, ...]}'
        raise InputError(f"{url}: expected {expected}, the categories may be left out") from None
    if not all(isinstance(name, str) for _, name in images):
        raise InputError(f"{url}: expected text as file_name of every image")
    return images, categories


def _read_image_list(url: str) -> tuple[dict[int | str, str], set[int] | None]:
    """The file name of each image id, and the category ids where the file lists them."""
    images, categories = read_images(url)
    file_names = dict(images)
    if len(file_names) != len(images):
        raise InputError(f"{url}: expected every image id once")
    return file_names, set(categories) or None


def _instance(number: int, frame_id: str, data: bytes, width: int, height: int) -> Instance:
    try:
        entry = json.loads(data)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or str(entry.get("image_id")) != frame_id:
        raise InputError(f"expected the entry of image {frame_id} that was listed here; the file has changed")
    category, score = entry.get("category_id"), entry.get("score", 1.0)
    if type(category) is not int or abs(category) >> 63:
        raise InputError(f"expected a whole number as category_id, found {category!r:.40}")
    if type(score) not in (int, float) or not abs(score) <= sys.float_info.max:
        raise InputError(f"expected a finite number as score, found {score!r:.40}")
    segmentation = entry.get("segmentation")
    # Tools that make polygons of masks write none for a mask without pixels.
    mask, origin = np.zeros((0, 0), bool), (0, 0)
    if segmentation != []:
        mask, origin = rle.of_segmentation(segmentation, width, height)
    extra = {key: value for key, value in entry.items() if key not in _REWRITTEN}
    if "score" not in entry:
        extra["score"] = None
    if not all(_is_shallow(value, DEEPEST) for value in extra.values()):
        raise InputError(f"expected at most {DEEPEST} lists and objects within each other")
    verdict = {name: entry[name] for name, types in _VERDICT.items() if type(entry.get(name)) in types}
    if any(type(value) is not str and not abs(value) < 1 << 63 for value in verdict.values()):
        raise InputError(f"expected numbers that an earlier run wrote in {' and '.join(_VERDICT)}")
    verdict = {name: value if type(value) is not str else _without_halves(value) for name, value in verdict.items()}
    return Instance(str(number), category, float(score), mask, origin, extra=extra, **verdict)


def _is_shallow(value: Any, deepest: int) -> bool:
    if type(value) not in (list, dict):
        return True
    return deepest > 0 and all(
        _is_shallow(one, deepest - 1) for one in (value.values() if type(value) is dict else value)
    )


def _without_halves(text: str) -> str:
    r"""Text with U+FFFD for halves of characters, as `\ud800` in a json is one; they cannot be written."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _by_frame(
    refs: Sequence[FrameRef], held: part_files.Parts, images: list[str], categories: set[int]
) -> Iterator[str]:
    for place, table in held.in_order(refs):
        row = table.to_pylist()[0]
        image = {"id": place + 1, "file_name": row["file_name"], "height": row["height"], "width": row["width"]}
        images.append(_dumps(image))
        for instance, extra in zip(row["instances"], row["extra"]):
            categories.add(instance["category_id"])
            yield _line(instance, {"image_id": place + 1, "file_name": row["file_name"]} | json.loads(extra))


def _by_position(refs: Sequence[FrameRef], held: part_files.Parts) -> Iterator[str]:
    """Every window of entries is put together from the parts that have some of them; most often these are few."""
    refs = [ref for ref in refs if ref.frame_id in held.of_frame]
    paths = {path: number for number, path in enumerate(dict.fromkeys(held.of_frame[ref.frame_id] for ref in refs))}
    counts = np.array([len(ref.positions) for ref in refs], np.int64)
    positions = np.fromiter(chain.from_iterable(ref.positions for ref in refs), np.int64, counts.sum())
    frames = np.repeat(np.arange(len(refs)), counts)
    numbers = np.arange(len(frames)) - np.repeat(np.cumsum(counts) - counts, counts)
    part_of = np.array([paths[held.of_frame[ref.frame_id]] for ref in refs], np.int64)
    order, names = np.argsort(positions, kind="stable"), [*paths]
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        lines = [""] * len(window)
        by_part = np.argsort(part_of[frames[window]], kind="stable")
        cuts = np.flatnonzero(np.diff(part_of[frames[window[by_part]]])) + 1
        pieces = np.split(by_part, cuts)
        used = [names[part_of[frames[window[slots[0]]]]] for slots in pieces]
        for slots, _ in zip(pieces, held.ahead(used)):
            wanted = [(refs[frames[entry]].frame_id, int(numbers[entry])) for entry in window[slots]]
            for slot, (instance, extra) in zip(slots, held.instances(wanted)):
                lines[slot] = _line(instance, extra)
        yield from lines


def _line(instance: dict[str, Any], extra: dict[str, Any]) -> str:
    entry = {
        "image_id": extra["image_id"],
        "category_id": instance["category_id"],
        "segmentation": {"size": instance["size"], "counts": instance["counts"]},
        "bbox": instance["bbox"],
        "area": instance["area"],
        "score": instance["score"],
        "status": instance["status"],
        "reason": instance["reason"],
        "changed_pixels": instance["changed_pixels"],
        "confidence": round(instance["confidence"], 4),
    }
    if "score" in extra:
        del entry["score"]
    return _dumps(entry | {key: value for key, value in extra.items() if key not in ("image_id", "score")})


def _dumps(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
