"""Cityscapes results: a `<image>_pred.txt` per image that lists one PNG per instance."""

from __future__ import annotations

import hashlib
import math
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pipeline import storage
from pipeline.confine import inside, writable
from pipeline.formats.mask_png import decode_png, encode_png, largest_png
from pipeline.formats.png_owners import owners_of, shared
from pipeline.identity import digest
from pipeline.records import Frame, FrameRef, InputError, Instance
from pipeline.stores import AwayError

PRED = "_pred.txt"
LARGEST_LIST = 64 << 20
"""Bytes of a `_pred.txt`; lists of real frames have some thousand."""
IMAGES = (".png", ".jpg", ".jpeg")
CITYSCAPES_CLASSES = {
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    29: "caravan",
    30: "trailer",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
"""The Cityscapes classes whose objects are told apart, by label id."""
LABEL_IDS = tuple(CITYSCAPES_CLASSES)


@dataclass(frozen=True)
class CityscapesReader:
    """Reads the folder `predictions`; images are found below the folder `images` by name, flat or by city.

    A frame's id is the path of its `_pred.txt` below `predictions` without that ending: `<city>/<image>` or `<image>`.
    """

    predictions: str
    images: str

    def list_frames(self, known: Mapping[str, str] | None = None) -> list[FrameRef]:
        """One reference per `_pred.txt`, by path. InputError where there is none or one of the folders is missing.

        Only where names alone do not tell which frame a PNG belongs to, the lists are read to see that none is shared.
        A frame's identity covers its `_pred.txt`, its image, and the files below `predictions` whose names begin with
        the image's, as those of its PNGs nearly always do; `+` all others, for the frame that reads one of them.
        """
        listed: dict[str, str] = {}
        others: list[tuple[str, str, str]] = []
        for path, version in storage.versions(self.predictions):
            if path.lower().endswith(PRED):
                listed[path] = version
            else:
                others.append((posixpath.basename(path), path, version))
        if not listed:
            raise InputError(f"{self.predictions}: expected files named <image>{PRED} in or below this folder")
        images, same = defaultdict(list), defaultdict(list)
        for path, version in storage.versions(self.images):
            if path.lower().endswith(IMAGES):
                images[posixpath.splitext(posixpath.basename(path))[0]].append((path, version))
        paths = sorted(listed)
        for path in paths:
            same[_stem(path)].append(path)
        told = all(owners_of(name, same) == 1 for name, path, _ in others if path.lower().endswith(".png"))
        twice = {} if told else shared(self.predictions, {path: _stem(path) for path in paths}, LARGEST_LIST)
        refs = [
            self._ref(path, sorted(images.get(_stem(path), [])), same[_stem(path)], twice.get(path, ""), told)
            for path in paths
        ]
        if known is None:
            return refs
        own, whole = _files_by_stem(same, others)
        identities = []
        for ref in refs:
            path, _ = ref.source
            stem = _stem(path)
            image = [value for found in images.get(stem, []) for value in found]
            identities.append(f"{digest(*image)}.{digest(listed[path], own[stem])}+{whole}")
        return [replace(ref, identity=identity) for ref, identity in zip(refs, identities)]

    def _ref(self, path: str, found: list[tuple[str, str]], same: list[str], twice: str, told: bool) -> FrameRef:
        stem, error = _stem(path), twice
        images = [image for image, _ in found]
        if len(same) > 1:
            error = f"expected one {stem}{PRED}, found {' and '.join(same)}"
        elif len(images) > 1:
            error = f"expected one image named {stem} below {self.images}, found {' and '.join(images)}"
        elif not images:
            error = f"expected an image {stem}.png (or .jpg, .jpeg) below {self.images}"
        # Python holds bytes that are no UTF-8 as characters that cannot be written.
        frame_id = path[: -len(PRED)].encode(errors="backslashreplace").decode()
        if frame_id != path[: -len(PRED)] or not _is_text(frame_id):
            error, images = "expected a file name in UTF-8 without control characters", []
        return FrameRef(
            frame_id=frame_id,
            file_name=images[0] if len(images) == 1 and _is_text(images[0]) else "",
            source=(path, told),
            error=error and str(InputError(f"{storage.join(self.predictions, path)}: {error}")),
        )

    def identity(self, ref: FrameRef, instances: Sequence[Instance]) -> str:
        """Without all other files, where every PNG has a name that begins with the image's."""
        stem = _stem(ref.source[0])
        own = all(posixpath.basename(instance.instance_id).startswith(stem) for instance in instances)
        return ref.identity.partition("+")[0] if own else ref.identity

    def read(self, ref: FrameRef, width: int, height: int) -> Iterator[Instance]:
        """The instances in the order of the lines; an instance's id is its PNG's path as the line has it.

        Any non-zero colour is the object. InputError names the `_pred.txt` and line, or the PNG.
        """
        path, told = ref.source
        file = inside(self.predictions, path, LARGEST_LIST)
        try:
            lines = storage.read(file).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise InputError(f"{file}: expected text in UTF-8") from None
        folder, stem = posixpath.dirname(path), _stem(path)
        seen: dict[str, int] = {}
        for number, line in enumerate(lines, 1):
            if fields := line.split():
                try:
                    name, label, score = _fields(fields)
                    first = seen.setdefault(posixpath.normpath(name), number)
                    if first != number:
                        raise InputError(f"expected every PNG once, {name} is also in line {first}")
                    if not storage.stays_below(name):
                        raise InputError(f"{name!r:.200}: expected a path that stays below {posixpath.dirname(file)}")
                    url = inside(self.predictions, posixpath.join(folder, name), largest_png(width, height))
                    own = not name.lower().endswith(".png") or owners_of(posixpath.basename(name), (stem,))
                    if told and not own and storage.exists(url):
                        raise InputError(f"{name} is named after another image, expected {stem}*.png")
                except AwayError:
                    raise
                except InputError as error:
                    raise InputError(f"{file}:{number}: {error}") from None
                mask, origin = decode_png(url, storage.read(url), width, height)
                yield Instance(name, label, score, mask, origin)


@dataclass(frozen=True)
class CityscapesWriter:
    """Writes below the folder `output`; nothing is left to do when all frames are committed."""

    output: str
    keeps_names: bool = True
    """Instance ids are the PNGs' paths, as CityscapesReader gives them; else they are names of another form."""
    result: ClassVar[str] = ""

    def commit(self, frames: Sequence[Frame]) -> str:
        """Each frame's PNGs (8-bit gray, 0 and 255, full frame), then its `_pred.txt`, in the frame's order.

        PNGs that an earlier `_pred.txt` of the frame lists and this one does not are removed.
        Paths are those of the input where it was a Cityscapes folder. Elsewhere a frame is named after its image,
        and its PNGs `<image>_<number>.png`.
        """
        for frame in frames:
            base = base_path(frame)
            folder = posixpath.dirname(base)
            names = self._png_names(frame, posixpath.basename(base))
            # Before anything is written: where the list's name is too long, the PNGs' may still do.
            listed, lines = self._listed_pngs(base), []
            # Before the list is replaced: a run killed in between finds them in it again. And before PNGs are written:
            # where a file system does not tell a from A, they may be other names of these.
            for path in listed - {posixpath.normpath(posixpath.join(folder, name)) for name in names}:
                storage.remove(writable(self.output, path))
            for instance, name in zip(frame.instances, names):
                png = encode_png(instance.mask, instance.origin, frame.width, frame.height)
                storage.put(writable(self.output, posixpath.join(folder, name)), png)
                lines.append(f"{name} {instance.category_id} {float(instance.score)!r}\n")
            storage.put(writable(self.output, base + PRED), "".join(lines).encode())
        return ""

    def _png_names(self, frame: Frame, stem: str) -> list[str]:
        names = [instance.instance_id for instance in frame.instances]
        fit = all(name.endswith(".png") and storage.stays_below(name) and not re.search(r"\s", name) for name in names)
        if self.keeps_names and fit and len({*names}) == len(names):
            return names
        # A line is split at white space, so there can be none in a PNG's name.
        stem = re.sub(r"[\s%]", lambda found: f"%{ord(found[0]):02X}", stem)
        return [f"{stem}_{number:03d}.png" for number in range(len(names))]

    def _listed_pngs(self, base: str) -> set[str]:
        """Paths of the PNGs that the `_pred.txt` of a frame in the output lists."""
        data = storage.read_if_there(inside(self.output, base + PRED, LARGEST_LIST))
        fields = (line.split() for line in (data or b"").decode(errors="replace").splitlines())
        paths = {posixpath.normpath(posixpath.join(posixpath.dirname(base), line[0])) for line in fields if line}
        # A file that was there before is not trusted: only PNGs below the output are the frame's.
        return {path for path in paths if path.endswith(".png") and storage.stays_below(path)}

    def finish(self, refs: Sequence[FrameRef], parts: Mapping[str, str]) -> list[str]:
        """Nothing: the committed frames are the final output."""
        return []

    def withdraw(self, gone: Sequence[FrameRef], listed: Sequence[FrameRef]) -> None:
        """Remove the PNGs of each frame and then its `_pred.txt`, so that one killed in between can be repeated."""
        kept = {base_path(ref) for ref in (listed if gone else ()) if ref.file_name and not ref.error}
        storage.at_once(self._remove, {base_path(ref) for ref in gone} - kept)

    def _remove(self, base: str) -> None:
        if not storage.stays_below(base) or not storage.exists(f"{self.output}/{base}{PRED}"):
            return
        for path in sorted(self._listed_pngs(base)):
            storage.remove(writable(self.output, path))
        storage.remove(writable(self.output, base + PRED))


def _files_by_stem(stems: Iterable[str], files: list[tuple[str, str, str]]) -> tuple[dict[str, str], str]:
    """For each stem a digest of all files (name, path, version) whose name begins with it; and one of all files."""
    whole = hashlib.blake2b(digest_size=8)
    own = {}
    # In order of names, those that begin with a stem follow right behind it.
    begun: list[tuple[str, Any]] = []
    for name, path, version in sorted([*files, *((stem, "", "") for stem in stems)]):
        while begun and not name.startswith(begun[-1][0]):
            stem, made = begun.pop()
            own[stem] = made.hexdigest()
        if not path:
            begun.append((name, hashlib.blake2b(digest_size=8)))
            continue
        entry = digest(path, version).encode()
        for _, made in [*begun, ("", whole)]:
            made.update(entry)
    own.update((stem, made.hexdigest()) for stem, made in begun)
    return own, whole.hexdigest()


def _stem(path: str) -> str:
    return posixpath.basename(path)[: -len(PRED)]


def _is_text(name: str) -> bool:
    """Whether a name can be written, and on one line."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name)


def _fields(fields: list[str]) -> tuple[str, int, float]:
    if len(fields) != 3:
        raise InputError(f"expected '<png> <labelID> <score>', got {len(fields)} fields")
    name, label, score = fields
    try:
        label_id = int(label)
    except ValueError:
        raise InputError(f"expected a whole number as label id, got {label!r:.40}") from None
    if label_id not in LABEL_IDS:
        raise InputError(f"unknown category {label_id!s:.40}, expected {LABEL_IDS[0]} to {LABEL_IDS[-1]}")
    try:
        value = float(score)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"expected a finite number as score, got {score!r:.40}")
    return name, label_id, value


def base_path(frame: Frame | FrameRef) -> str:
    """The path of a frame's `_pred.txt` without that ending."""
    image = posixpath.splitext(frame.file_name)[0]
    # Only a Cityscapes folder names its frames after their images; its frame ids also know the city's folder.
    same = posixpath.basename(frame.frame_id) == posixpath.basename(image)
    return frame.frame_id if same and storage.stays_below(frame.frame_id) else image
