"""A small dump to try the product on: photographs from scikit-image's wheel, coarse masks drawn here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline import storage
from pipeline.formats.cityscapes import CityscapesReader
from pipeline.progress import Summary
from pipeline.records import InputError, cut_to_box
from pipeline.report import ReportFrame, ReportInstance

IMAGES, COARSE, REFINED = "images", "coarse", "refined"
"""The folders of the demo."""
GRID_CELLS = 14
"""Side of the grid a mask head sees an instance on (Mask R-CNN, He et al. 2017); it is what makes a mask coarse."""


@dataclass(frozen=True, slots=True)
class DrawnInstance:
    """One instance as it is drawn: an outline by hand, before it is made coarse."""

    label: str
    category_id: int
    """A Cityscapes instance label (24 to 33). Only `person` means what it says; the others are placeholders."""
    score: float
    outline: str
    """`x,y x,y ...` in pixels of the photograph: a polygon; or `x1,y1 x2,y2`: the ellipse in that box."""


@dataclass(frozen=True, slots=True)
class Photograph:
    """One photograph of the demo, named as in `skimage.data`."""

    name: str
    credit: str
    instances: tuple[DrawnInstance, ...]


_COIN_BOXES = (
    "25,33 69,71",
    "78,41 117,77",
    "134,31 182,72",
    "190,25 236,70",
    "258,31 300,70",
    "301,19 361,75",
    "27,107 71,142",
    "81,104 119,148",
    "136,107 178,143",
    "183,108 228,142",
    "248,98 292,147",
    "314,103 353,147",
    "28,175 66,214",
    "78,178 127,214",
    "132,182 171,220",
    "192,167 240,213",
    "249,174 293,220",
    "318,159 376,214",
    "21,237 78,285",
    "90,241 131,283",
    "148,233 198,284",
    "217,243 265,291",
    "279,236 323,285",
    "333,250 377,287",
)

PHOTOGRAPHS = (
    Photograph(
        "astronaut",
        "Eileen Collins, NASA; public domain",
        (
            DrawnInstance(
                "person",
                24,
                0.99,
                "233,20 206,32 183,33 164,50 153,72 159,108 177,128 182,152 150,150 124,170 114,205 84,224 60,252 "
                "47,292 28,350 19,405 22,460 24,511 282,511 281,470 290,428 306,388 336,362 358,347 355,310 343,275 "
                "318,240 303,228 296,208 278,187 258,170 262,140 280,130 298,112 304,86 296,52 277,30 256,19",
            ),
            DrawnInstance(
                "helmet",
                25,
                0.96,
                "281,511 283,452 291,424 305,391 330,366 368,350 404,341 446,355 476,388 494,428 500,458 511,468 "
                "511,511",
            ),
            DrawnInstance(
                "shuttle model",
                27,
                0.81,
                "398,0 393,30 386,46 378,64 377,175 357,207 351,232 366,246 366,276 390,287 468,274 451,262 458,232 "
                "456,205 452,60 444,44 436,52 433,16 426,0",
            ),
        ),
    ),
    Photograph(
        "chelsea",
        "Chelsea the cat, Stefan van der Walt; CC0",
        (
            DrawnInstance(
                "cat",
                26,
                0.98,
                "40,0 36,40 35,90 26,116 0,130 0,299 292,299 308,277 322,248 318,226 345,198 356,165 365,126 354,96 "
                "362,70 374,40 388,18 394,0",
            ),
            DrawnInstance("eye", 32, 0.88, "142,82 200,149"),
            DrawnInstance("eye", 32, 0.84, "291,108 338,160"),
        ),
    ),
    Photograph(
        "coffee",
        "Coffee cup, Rachel Michetti, Pikolo Espresso Bar; CC0",
        (
            DrawnInstance(
                "spoon",
                33,
                0.86,
                "331,308 327,284 333,262 350,246 370,236 376,212 390,176 404,112 399,84 404,66 424,70 424,88 414,126 "
                "398,182 389,224 402,246 409,272 401,300 384,318 360,329",
            ),
            DrawnInstance(
                "cup",
                28,
                0.98,
                "172,104 178,74 200,45 236,24 284,16 336,24 374,43 398,74 409,108 402,160 388,204 366,240 334,268 "
                "296,287 262,286 234,306 208,307 196,288 200,262 217,238 196,212 180,182 174,144",
            ),
            DrawnInstance(
                "saucer",
                31,
                0.93,
                "186,70 146,98 108,134 84,172 76,214 82,256 100,294 136,332 184,364 240,384 300,393 356,381 408,357 "
                "446,322 470,280 481,234 474,182 456,142 420,105 408,140 394,190 390,222 404,248 411,275 402,302 "
                "384,322 360,331 338,318 328,292 326,272 300,286 262,289 236,307 206,308 193,286 199,260 214,238 "
                "195,214 180,186 171,150 169,110 176,80",
            ),
        ),
    ),
    Photograph(
        "rocket",
        "Falcon 9 before the launch of DSCOVR, SpaceX; public domain",
        (
            DrawnInstance(
                "rocket",
                30,
                0.97,
                "322,123 312,134 308,152 308,176 313,190 312,404 333,404 333,190 338,176 338,150 332,134",
            ),
            DrawnInstance("launch mount", 29, 0.74, "264,410 270,405 372,404 377,412 374,426 265,426"),
        ),
    ),
    Photograph(
        "coins",
        "Greek coins from Pompeii, Brooklyn Museum; no known copyright restrictions",
        tuple(DrawnInstance("coin", 33, round(0.97 - 0.01 * i, 2), box) for i, box in enumerate(_COIN_BOXES)),
    ),
)


def photograph(name: str) -> np.ndarray:
    """The photograph of that name as (H, W, 3) uint8 RGB, from scikit-image's wheel: nothing is downloaded.

    InputError where scikit-image is not installed: it is an extra, and only these photographs are taken from it.
    """
    try:
        from skimage import data
    except ImportError:
        raise InputError(
            "scikit-image is not installed, whose photographs these are: pip install -c constraints.txt -e '.[report]'"
        ) from None
    image = getattr(data, name)()
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def outline_points(outline: str) -> np.ndarray:
    """The (N, 2) int x, y of an outline's polygon; an ellipse becomes one of 72 points."""
    points = np.array([point.split(",") for point in outline.split()], int)
    if len(points) > 2:
        return points
    centre, radii = points.mean(axis=0), (points[1] - points[0]) / 2
    angle = np.arange(72) * (2 * np.pi / 72)
    return np.rint(centre + np.stack([np.cos(angle), np.sin(angle)], axis=1) * radii).astype(int)


def coarse_masks(photo: Photograph) -> list[np.ndarray]:
    """One (H, W) bool coarse mask per instance of the photograph."""
    masks = []
    for instance in photo.instances:
        drawn = np.zeros(photograph(photo.name).shape[:2], np.uint8)
        cv2.fillPoly(drawn, [outline_points(instance.outline)], 1)
        masks.append(_through_grid(drawn))
    return masks


def _through_grid(mask: np.ndarray) -> np.ndarray:
    """The mask (H, W) uint8 0/1 as a head returns it: averaged on a grid, interpolated back, cut at one half; bool."""
    held, (x, y) = cut_to_box(mask)
    # A margin of one cell, so that the contour closes inside the grid; what the frame cuts off goes on beyond it.
    margin = -(-max(held.shape) // (GRID_CELLS - 2))
    rows, columns = (slice(start, start + size + 2 * margin) for start, size in zip((y, x), held.shape))
    window = np.pad(mask, margin, mode="edge")[rows, columns].astype(np.float32)
    grid = cv2.resize(window, (GRID_CELLS, GRID_CELLS), interpolation=cv2.INTER_AREA)
    coarse = np.zeros(np.add(mask.shape, 2 * margin), bool)
    coarse[rows, columns] = cv2.resize(grid, window.shape[::-1], interpolation=cv2.INTER_LINEAR) > 0.5
    return coarse[margin:-margin, margin:-margin]


def write_dump(root: str) -> None:
    """Write the photographs to `root`/images and their coarse masks to `root`/coarse, as a Cityscapes dump.

    A repeat overwrites the same files with the same bytes and forgets what was done in `root`/refined, so that the demo
    shows a whole run each time, whatever the weights and settings of the one before.
    """
    for photo in PHOTOGRAPHS:
        storage.put(f"{root}/{IMAGES}/{photo.name}.png", _png(photograph(photo.name)[..., ::-1]))
        lines = []
        for number, (instance, mask) in enumerate(zip(photo.instances, coarse_masks(photo))):
            file_name = f"{photo.name}_{number}.png"
            storage.put(f"{root}/{COARSE}/{file_name}", _png(mask.astype(np.uint8) * 255))
            lines.append(f"{file_name} {instance.category_id} {instance.score}\n")
        storage.put(f"{root}/{COARSE}/{photo.name}_pred.txt", "".join(lines).encode())
    ledger = f"{root}/{REFINED}/_ledger"
    if storage.is_dir(ledger):
        for path in storage.find(ledger, (".json", ".jsonl", ".csv")):
            storage.remove(f"{ledger}/{path}")


def report_frames(root: str) -> Iterator[ReportFrame]:
    """The demo's frames for the report, one at a time, once `root`/coarse has been refined to `root`/refined."""
    readers = [CityscapesReader(f"{root}/{folder}", f"{root}/{IMAGES}") for folder in (COARSE, REFINED)]
    refs = [{ref.frame_id: ref for ref in reader.list_frames()} for reader in readers]
    for photo in PHOTOGRAPHS:
        if photo.name not in refs[1]:
            continue
        image = photograph(photo.name)
        height, width = image.shape[:2]
        coarse, refined = (reader.read(by_id[photo.name], width, height) for reader, by_id in zip(readers, refs))
        instances = [
            ReportInstance(drawn.label, before, after)
            for drawn, before, after in zip(photo.instances, coarse, refined, strict=True)
        ]
        yield ReportFrame(photo.name, image, instances, photo.credit)


def facts(summary: Summary, weights: str) -> dict[str, str]:
    """What the head of the report says of the run."""
    return {
        "frames": f"{summary.frames:,}",
        "instances": f"{summary.instances:,}",
        "patches": f"{summary.patches:,}",
        "seconds": f"{summary.wall_s:.1f}",
        "weights": weights,
    }


def _png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()
