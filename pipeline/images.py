"""Image files as arrays."""

from __future__ import annotations

import cv2
import numpy as np

from pipeline import storage
from pipeline.formats.mask_png import PNG_SIGNATURE, plain_png
from pipeline.limits import check_image
from pipeline.records import InputError


def decode_image(url: str, memory_bytes: int | None = None) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB.

    InputError names a file that is missing, cannot be decoded, or would not fit `memory_bytes`.
    """
    data = storage.read(url)
    if memory_bytes is not None:
        check_image(url, data, memory_bytes)
    if data.startswith(PNG_SIGNATURE):
        data = plain_png(data) or b""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # an empty file
        image = None
    if image is None:
        raise InputError(f"{url}: expected an image that OpenCV can decode")
    return image
