"""What flows through the pipeline: frames and their instances, and the one Arrow schema they are stored under."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from pipeline.redaction import redacted

LONGEST_HEADING = 50
"""Characters of a name at the head of a table's row."""
LONGEST_MESSAGE = 2000
"""Characters of an error line; names and values that it quotes come from the input, which may have any length."""


def printable(text: str) -> str:
    r"""Text for one line of a log, with `\n`, `\x1b`, ... for what would end the line or move the cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def heading(name: str) -> str:
    """A name as the head of a row in a table for people: `printable`, and cut where it is very long."""
    text = printable(name)
    return text if len(text) <= LONGEST_HEADING else f"{text[: LONGEST_HEADING - 3]}..."


class InputError(ValueError):
    """Something is wrong with an input; the one-line message names the file (and line) and what was expected.

    Whatever it is made from, the message has no secrets of a URL, and no character that is not printable: names may
    have line ends, terminal codes, or bytes that are no text.
    """

    def __init__(self, message: str = "") -> None:
        # First cut generously: a secret that ends behind the cut could not be told.
        message = printable(redacted(message[: 10 * LONGEST_MESSAGE])[: LONGEST_MESSAGE + 1])
        super().__init__(message if len(message) <= LONGEST_MESSAGE else f"{message[: LONGEST_MESSAGE - 3]}...")


def fault(file_name: str, error: Exception) -> str:
    """One line on why an image's frame is set aside: what an InputError says; of any other exception also its type."""
    if not isinstance(error, InputError):
        error = InputError(f"{file_name}: {type(error).__name__}: {' '.join(str(error).split())}")
    return str(error)


@dataclass(frozen=True, slots=True)
class FrameRef:
    """One frame of a dump as listed: enough for a worker to read it, small enough to keep by the million."""

    frame_id: str
    """Unique in the dump: the image's name without extension, or the COCO image id."""
    file_name: str
    """The image's path below the image root; empty where the listing found none."""
    source: Any = None
    """Where the predictions lie; only the format that made the reference looks inside."""
    positions: tuple[int, ...] = ()
    """The place of each instance in a dump that has one order over all frames (COCO json); empty elsewhere."""
    error: str = ""
    """What the listing found wrong with this frame; it is then set aside instead of refined."""
    identity: str = ""
    """Changes with the frame's image and predictions, as `pipeline.identity` has it; empty where nobody asked."""


@dataclass(slots=True)
class Instance:
    """One object in one frame. The mask is coarse when read and refined once the frame has been assembled."""

    instance_id: str
    """Unique in its frame: the PNG's path in a Cityscapes folder, the entry's number in a COCO json."""
    category_id: int
    score: float
    mask: np.ndarray
    """(h, w) bool, cut to its bounding box; (0, 0) for an empty mask."""
    origin: tuple[int, int] = (0, 0)
    """(x, y) of the mask's top left pixel in the frame."""
    status: str = "kept"
    """`refined`; `kept` where the network was not asked; `rejected` where its mask was not believed."""
    reason: str = ""
    """Why an instance was kept or rejected, or pieces of its change taken back: one of `guard.REASONS`, or empty."""
    changed_pixels: int = 0
    """Pixels in which the mask differs from the coarse one; 0 unless refined."""
    confidence: float = 1.0
    """Mean of 2 * |p - 0.5| over the boundary band that the network found, also if it was rejected; 1 where kept."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The entry's other keys, carried through unchanged."""

    @property
    def area(self) -> int:
        """Number of object pixels."""
        return int(np.count_nonzero(self.mask))

    @property
    def bbox(self) -> list[int]:
        """COCO's [x, y, width, height] in pixels; all 0 for an empty mask."""
        height, width = self.mask.shape
        return [*self.origin, width, height] if self.mask.size else [0, 0, 0, 0]


@dataclass(slots=True)
class Frame:
    """One image with all its instances, in the input's order."""

    frame_id: str
    file_name: str
    width: int
    height: int
    instances: list[Instance]


def cut_to_box(mask: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """The mask (H, W), any non-zero value being the object, as bool cut to its bounding box, and the box's (x, y)."""
    binary = mask if mask.dtype in (bool, np.uint8) else mask.astype(bool)
    left, top, width, height = cv2.boundingRect(binary.view(np.uint8)) if mask.size else (0, 0, 0, 0)
    return mask[top : top + height, left : left + width].astype(bool), (left, top)


INSTANCE_TYPE = pa.struct(
    [
        ("instance_id", pa.string()),
        ("category_id", pa.int64()),
        ("score", pa.float64()),
        ("size", pa.list_(pa.int32())),
        ("counts", pa.string()),
        ("bbox", pa.list_(pa.int32())),
        ("area", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("changed_pixels", pa.int64()),
        ("confidence", pa.float32()),
    ]
)
"""`size` is [height, width] and `counts` the compressed COCO run-length string, over the whole frame."""

FRAME_SCHEMA = pa.schema(
    [
        ("frame_id", pa.string()),
        ("file_name", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("instances", pa.list_(INSTANCE_TYPE)),
    ]
)
