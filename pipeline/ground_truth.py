"""Precise masks of a data set: COCO json, or a Cityscapes `gtFine` folder of instance id images."""

from __future__ import annotations

import json
import posixpath
import sys
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import cv2
import numpy as np

from pipeline import rle, storage
from pipeline.formats.cityscapes import CITYSCAPES_CLASSES, IMAGES
from pipeline.formats.coco import image_file_name
from pipeline.identity import digest
from pipeline.images import decoded
from pipeline.records import FrameRef, InputError, cut_to_box

CITYSCAPES_VOID = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
"""The Cityscapes label ids that its evaluation ignores, as far as they are ids of pixels."""

MAX_PIXELS = 1 << 30
"""Largest image that OpenCV decodes; what a json says of an image without showing it is believed up to there."""

INSTANCE_IDS = "_gtFine_instanceIds.png"
LEFT_IMAGE = "_leftImg8bit"


@dataclass(frozen=True, slots=True)
class TruthRef:
    """One annotated image as listed; small enough to travel to a worker."""

    key: str
    """Names the image in predictions and ground truth alike: see `image_key`."""
    file_name: str
    """The image's path below the image root; for Cityscapes `<city>/<name>_leftImg8bit.png`."""
    source: Any
    """Where the annotations lie; only the ground truth that made the reference looks inside."""
    order: int = 0
    """Its place among all images by their ids: the order in which COCO's tools see predictions of equal score."""


@dataclass(slots=True)
class TrueInstance:
    """One annotated object."""

    instance_id: str
    """Unique in its image: the annotation's id, or the number in the id image."""
    category_id: int
    mask: np.ndarray
    """(h, w) bool, cut to its bounding box; (0, 0) for an empty mask."""
    origin: tuple[int, int]
    """(x, y) of the mask's top left pixel in the image."""
    crowd: bool
    """Stands for a group whose members are not told apart."""
    area: float
    """As the annotation says (COCO sorts objects into sizes by it), or else the mask's pixels."""


@dataclass(slots=True)
class TrueFrame:
    """All annotated objects of one image of `width` x `height` pixels."""

    width: int
    height: int
    instances: list[TrueInstance]
    void: np.ndarray | None = None
    """(H, W) bool: the pixels that Cityscapes leaves out of the evaluation; None where there is no such thing."""
    negative_categories: frozenset[int] | None = None
    """LVIS: categories known to be absent. Those neither here nor annotated were not looked for. None: all were."""
    not_exhaustive_categories: frozenset[int] = frozenset()
    """LVIS: categories of which some objects may not be annotated."""

    @property
    def objects(self) -> list[TrueInstance]:
        """Those told apart, no crowds, that have a pixel."""
        return [one for one in self.instances if not one.crowd and one.mask.size]


@dataclass(frozen=True)
class Listing:
    """What a ground truth holds: the name of every category by its id, and every image in its order."""

    categories: dict[int, str]
    refs: list[TruthRef]
    frequencies: dict[int, str] = field(default_factory=dict)
    """LVIS: whether a category is rare (`r`), common (`c`) or frequent (`f`); empty elsewhere."""


class GroundTruth(Protocol):
    """What every form of ground truth offers; small and picklable."""

    def list_frames(self) -> Listing:
        """Every image, also those without objects. InputError where the file or folder is no ground truth."""

    def identities(self, refs: Sequence[TruthRef]) -> list[str]:
        """A few characters for each image that change whenever its annotations may have."""

    def read(self, ref: TruthRef) -> TrueFrame:
        """The objects of one image; InputError names the file and the annotation that is wrong."""


def image_key(file_name: str, shared: Container[str] = ()) -> str:
    """What an image is called everywhere: its name without folder, extension and Cityscapes' `_leftImg8bit`.

    With its folder where the name is `shared` with images of other folders, as frames of videos are.
    """
    path = posixpath.splitext(file_name)[0].removesuffix(LEFT_IMAGE)
    name = posixpath.basename(path)
    return path if name in shared else name


def _shared(file_names: Iterable[str]) -> set[str]:
    """The names of images that several of these files have."""
    return {name for name, times in Counter(map(image_key, file_names)).items() if times > 1}


def paired(
    truth: Sequence[TruthRef], dumps: Mapping[str, Sequence[FrameRef]]
) -> tuple[list[TruthRef], dict[str, dict[str, FrameRef]]]:
    """Annotated images, and the frames of each dump, under keys by which one finds the other.

    InputError with the dump's name where two of its frames have one image.
    """
    shared = _shared(ref.file_name for ref in truth).union(
        *(_shared(ref.file_name or ref.frame_id for ref in refs) for refs in dumps.values())
    )
    annotated = [replace(ref, key=image_key(ref.file_name, shared)) for ref in truth]
    return annotated, {name: _by_image(name, refs, shared) for name, refs in dumps.items()}


def _by_image(name: str, refs: Iterable[FrameRef], shared: Container[str]) -> dict[str, FrameRef]:
    found: dict[str, FrameRef] = {}
    for ref in refs:
        key = image_key(ref.file_name or ref.frame_id, shared)
        if ref.positions and not ref.file_name:
            # An image_id of a json that is listed nowhere; another image may have this number as its name.
            key = f"image_id/{ref.frame_id}"
        if found.setdefault(key, ref) is not ref:
            raise InputError(f"{name}: two frames are called {key}: {found[key].frame_id}, {ref.frame_id}")
    return found


def open_ground_truth(url: str, images: str) -> GroundTruth:
    """COCO (or LVIS) json, or a Cityscapes `gtFine` folder, told by what is there. InputError where it is neither.

    `images` is the folder of the images, in which those of Cityscapes are looked for by name.
    """
    if storage.is_dir(url):
        return CityscapesTruth(url, images)
    if not url.lower().endswith(".json"):
        raise InputError(f"{url}: expected a COCO ground-truth json or a Cityscapes gtFine folder")
    return CocoTruth(url)


@dataclass(frozen=True)
class CocoTruth:
    """A COCO ground-truth json: RLE or polygons, crowds marked by `iscrowd`."""

    url: str

    def list_frames(self) -> Listing:
        try:
            content = json.loads(storage.read(self.url))
            categories = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
            for category in categories:
                _check_category(category, f"{self.url}: category ")
            of_image: dict[Any, list[dict[str, Any]]] = {}
            for entry in content["images"]:
                if of_image.setdefault(entry["id"], found := []) is not found:
                    raise InputError(f"{self.url}: two images have the id {entry['id']!r}, expected one")
            for entry in content["annotations"]:
                if entry["image_id"] not in of_image:
                    found = f"annotation {entry.get('id')!r} has image_id {entry['image_id']!r}"
                    raise InputError(f"{self.url}: {found}, expected one of the file's images")
                of_image[entry["image_id"]].append({name: entry.get(name) for name in _KEPT})
            frequencies = {entry["id"]: entry["frequency"] for entry in content["categories"] if "frequency" in entry}
            place = {image_id: i for i, image_id in enumerate(sorted(of_image))}
            refs = []
            for entry in content["images"]:
                name = image_file_name(entry)
                federated = None
                if "neg_category_ids" in entry:
                    incomplete = entry.get("not_exhaustive_category_ids", [])
                    federated = (frozenset(entry["neg_category_ids"]), frozenset(incomplete))
                width, height = int(entry["width"]), int(entry["height"])
                if min(width, height) < 1 or width * height > MAX_PIXELS:
                    raise ValueError(f"{name} of {width} x {height} pixels")
                source = (width, height, of_image[entry["id"]], federated)
                refs.append(TruthRef(image_key(name), name, source, place[entry["id"]]))
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise InputError(
                f"{self.url}: expected a COCO ground-truth json with images (id, file_name, width, height), annotations"
                f" (image_id, category_id, segmentation) and categories (id, name); {type(error).__name__}: {error}"
            ) from None
        return Listing(categories, _distinct(self.url, refs), frequencies)

    def identities(self, refs: Sequence[TruthRef]) -> list[str]:
        return [digest(json.dumps(ref.source, default=sorted)) for ref in refs]

    def read(self, ref: TruthRef) -> TrueFrame:
        width, height, entries, federated = ref.source
        instances = []
        for entry in entries:
            try:
                instances.append(_instance(entry, width, height))
            except InputError as error:
                raise InputError(f"{self.url}: annotation {entry['id']!r} of {ref.file_name}: {error}") from None
        negative, not_exhaustive = federated or (None, frozenset())
        return TrueFrame(
            width,
            height,
            instances,
            negative_categories=negative,
            not_exhaustive_categories=not_exhaustive,
        )


_KEPT = ("id", "category_id", "segmentation", "iscrowd", "area")


def _check_category(category: Any, place: str) -> None:
    if type(category) is not int or abs(category) >> 63:
        raise InputError(f"{place}{category!r:.40}, expected a whole number of 64 bits as id")


def _instance(entry: dict[str, Any], width: int, height: int) -> TrueInstance:
    category, area = entry["category_id"], entry["area"]
    _check_category(category, "category_id ")
    if area is not None and not (type(area) in (int, float) and abs(area) <= sys.float_info.max):
        raise InputError(f"area {area!r:.40}, expected a finite number")
    if entry["iscrowd"] not in (None, 0, 1):
        raise InputError(f"iscrowd {entry['iscrowd']!r:.40}, expected 0 or 1")
    mask, origin = rle.of_segmentation(entry["segmentation"], width, height)
    area = area if area is not None else int(np.count_nonzero(mask))
    return TrueInstance(str(entry["id"]), category, mask, origin, bool(entry["iscrowd"]), area)


@dataclass(frozen=True)
class CityscapesTruth:
    """A folder with `<name>_gtFine_instanceIds.png` files, flat or by city; so may be the folder of the images."""

    url: str
    images: str

    def list_frames(self) -> Listing:
        found = storage.find(self.url, (INSTANCE_IDS.lower(),))
        if not found:
            raise InputError(f"{self.url}: expected files *{INSTANCE_IDS}, found none")
        images = {image_key(path): path for path in storage.find(self.images, IMAGES)}
        refs = []
        for path in found:
            name = path[: -len(INSTANCE_IDS)]
            # Where there is no image, the error is to name the file that Cityscapes would have.
            file_name = images.get(image_key(name), f"{name}{LEFT_IMAGE}.png")
            refs.append(TruthRef(image_key(name), file_name, path))
        return Listing(CITYSCAPES_CLASSES, _distinct(self.url, refs))

    def identities(self, refs: Sequence[TruthRef]) -> list[str]:
        return storage.versions_of(self.url, [ref.source for ref in refs])

    def read(self, ref: TruthRef) -> TrueFrame:
        ids = read_instance_ids(storage.join(self.url, ref.source))
        instances = []
        for number in np.unique(ids).tolist():
            # Numbers below 1000 are label ids: of a countable class, a group whose members are not told apart.
            category = number // 1000 if number >= 1000 else number
            if category in CITYSCAPES_CLASSES:
                mask, origin = cut_to_box(ids == number)
                area = int(np.count_nonzero(mask))
                instances.append(TrueInstance(str(number), category, mask, origin, number < 1000, area))
        height, width = ids.shape
        return TrueFrame(width, height, instances, void=np.isin(ids, CITYSCAPES_VOID))


def read_instance_ids(url: str) -> np.ndarray:
    """A Cityscapes `instanceIds` image (H, W): label id, or label id * 1000 + number for an object told apart."""
    ids = decoded(storage.read(url), cv2.IMREAD_UNCHANGED)
    if ids is None or ids.ndim != 2:
        raise InputError(f"{url}: expected a PNG with one channel of instance ids")
    return ids


def _distinct(url: str, refs: list[TruthRef]) -> list[TruthRef]:
    refs, _ = paired(refs, {})
    seen: dict[str, str] = {}
    for ref in refs:
        if ref.key in seen:
            raise InputError(f"{url}: two images are called {ref.key}: {seen[ref.key]} and {ref.file_name}")
        seen[ref.key] = ref.file_name
    return refs
