"""What refinement changed, where there is no ground truth to say whether it helped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import cv2
import numpy as np

from pipeline.metrics.boundary import contour_region
from pipeline.metrics.overlap import Located, box_of, mask_within
from pipeline.records import Frame, InputError, Instance

# Whole numbers add up to the same sum in every order.
_UNIT = 1 << 20


@dataclass(frozen=True)
class ClassChanges:
    """Sums over the instances of one category. The sum of two is both together, in any order."""

    instances: int = 0
    changed_instances: int = 0
    pixels: int = 0
    """Of the coarse masks."""
    changed_pixels: int = 0
    contour_before: int = 0
    """Contour pixels of the coarse masks: their boundary's length in pixels."""
    contour_after: int = 0
    gradient_before: int = 0
    """Sum of the image's gradient over the contour pixels of the coarse masks, in units of 2**-20 grey levels."""
    gradient_after: int = 0

    def __add__(self, other: ClassChanges) -> ClassChanges:
        return ClassChanges(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def numbers(self) -> dict[str, float]:
        """Shares and means over the instances; NaN where there is no contour."""
        return {
            "instances": self.instances,
            "changed instances": _ratio(self.changed_instances, self.instances),
            "changed pixels": _ratio(self.changed_pixels, self.pixels),
            "contour before": _ratio(self.contour_before, self.instances),
            "contour after": _ratio(self.contour_after, self.instances),
            "gradient before": _ratio(self.gradient_before, self.contour_before * _UNIT),
            "gradient after": _ratio(self.gradient_after, self.contour_after * _UNIT),
        }


@dataclass(frozen=True)
class Changes:
    """Changes by category id."""

    categories: dict[int, ClassChanges] = field(default_factory=dict)

    @classmethod
    def merge(cls, records: Iterable[Changes]) -> Changes:
        """All of them together; their order and grouping make no difference."""
        categories: dict[int, ClassChanges] = {}
        for record in records:
            for category, one in record.categories.items():
                categories[category] = categories.get(category, ClassChanges()) + one
        return cls(dict(sorted(categories.items())))

    def total(self) -> ClassChanges:
        """Over all categories."""
        return sum(self.categories.values(), ClassChanges())


def changes(coarse: Frame, refined: Frame, image: np.ndarray) -> Changes:
    """Compare each instance of a frame with the one at the same place in its refined form.

    `image` is (H, W, 3) uint8. Its gradient is the magnitude of Sobel's, in grey levels per pixel; a contour that
    follows the image's edges has a high mean. InputError where the two frames or the image do not belong together.
    """
    _check(coarse, refined, image)
    gradient = sobel(image)
    parts = [
        Changes({before.category_id: _changes(before, after, gradient)})
        for before, after in zip(coarse.instances, refined.instances)
    ]
    return Changes.merge(parts)


def sobel(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sobel's differences of brightness across and down, each (H, W) int16, of an image (H, W, 3) uint8.

    Their magnitude is 8 times the gradient in grey levels per pixel: they weigh differences over two pixels with
    1, 2 and 1.
    """
    return cv2.spatialGradient(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


def changed_pixels(before: Located, after: Located) -> int:
    """Number of pixels that only one of the two masks has."""
    box = box_of(before, after)
    return int(np.count_nonzero(mask_within(before, box) != mask_within(after, box)))


def _changes(before: Instance, after: Instance, gradient: tuple[np.ndarray, np.ndarray]) -> ClassChanges:
    pixels, changed = before.area, changed_pixels(before, after)
    length_before, gradient_before = _along_contour(before, gradient)
    length_after, gradient_after = _along_contour(after, gradient)
    return ClassChanges(
        1, int(changed > 0), pixels, changed, length_before, length_after, gradient_before, gradient_after
    )


def _along_contour(region: Located, gradient: tuple[np.ndarray, np.ndarray]) -> tuple[int, int]:
    """Number of contour pixels, and the sum of the gradient over them in units of 2**-20 grey levels."""
    height, width = gradient[0].shape
    line, (left, top) = contour_region(region, width, height)
    rows, columns = np.divmod(np.flatnonzero(line), max(line.shape[1], 1))
    across, down = (part[rows + top, columns + left].astype(np.float64) for part in gradient)
    return len(rows), round(float(np.hypot(across, down).sum()) / 8 * _UNIT)


def _check(coarse: Frame, refined: Frame, image: np.ndarray) -> None:
    name = refined.file_name or refined.frame_id
    sizes = [(coarse.width, coarse.height), (refined.width, refined.height), (image.shape[1], image.shape[0])]
    if len(set(sizes)) > 1:
        found = ", ".join(f"{width} x {height}" for width, height in sizes)
        raise InputError(f"{name}: coarse masks, refined masks and image are {found}, expected one size")
    before, after = ([one.category_id for one in frame.instances] for frame in (coarse, refined))
    if before != after:
        found = f"{len(after)} refined instances of categories {sorted(set(after))}"
        expected = f"the {len(before)} of categories {sorted(set(before))} of the coarse frame in their order"
        raise InputError(f"{name}: {found}, expected {expected}")


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
