"""Image files of others as arrays."""

from __future__ import annotations

from contextlib import suppress
from typing import Literal

import cv2
import numpy as np

from pipeline import storage
from pipeline.limits import check_image
from pipeline.records import InputError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_COMPRESSION, _MOST_TIFF_TAGS = 259, 4096
_TIFF_COMPRESSIONS = {1, 2, 3, 4, 5, 7, 8, 32773, 32946}
"""None, those of fax, LZW, JPEG, Deflate, PackBits, and Deflate by its old number."""

_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")


def decode_image(url: str, memory_bytes: int | None = None) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB.

    InputError names a file that is missing, cannot be decoded, or would not fit `memory_bytes`.
    """
    data = storage.read(url)
    if memory_bytes is not None:
        check_image(url, data, memory_bytes)
    image = decoded(data, cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise InputError(f"{url}: expected an image that OpenCV can decode")
    return image


def decoded(data: bytes, flags: int) -> np.ndarray | None:
    """The image in the bytes of a file as OpenCV decodes it with these flags; None where it cannot."""
    if data.startswith(PNG_SIGNATURE):
        # OpenCV takes memory for a part of a PNG as long as the part says it is, gigabytes for a file of 100 bytes, and
        # unpacks animations and colour profiles that nobody asked for.
        data = _plain_png(data) or b""
    elif data.startswith(_TIFF) and _tiff_compression(data) not in _TIFF_COMPRESSIONS:
        # Of one that it does not know, as JPEG 2000 in slides of tissue, OpenCV makes a black image.
        return None
    with suppress(cv2.error):  # an empty file, or one with more pixels than OpenCV takes
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    return None


def _tiff_compression(data: bytes) -> int:
    """How the pixels of a TIFF are packed: a number of its list of tags, 1 where that does not say."""
    order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"

    def number(start: int, size: int) -> int:
        return int.from_bytes(data[start : start + size], order)

    large = number(2, 2) == 43
    first = number(8, 8) if large else number(4, 4)
    count, entry = (8, 20) if large else (2, 12)
    tags = min(number(first, count), _MOST_TIFF_TAGS)
    for start in range(first + count, first + count + entry * tags, entry):
        if number(start, 2) == _COMPRESSION:
            return number(start + entry - (8 if large else 4), 2)
    return 1


def _plain_png(data: bytes) -> bytes | None:
    """The PNG without all that is not its pixels; None where its parts do not fit into it, or it has no end."""
    kept, position, kind = [PNG_SIGNATURE], len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        end = position + 12 + length
        # One header, in front, as the size was read from there.
        if end > len(data) or (kind == b"IHDR") != (len(kept) == 1):
            return None
        if kind in _PIXELS or kind == b"IEND":
            kept.append(data[position:end])
        position = end
    return b"".join(kept)
