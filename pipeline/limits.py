"""What one frame may cost before it is set aside: time, and memory."""

from __future__ import annotations

import io
from dataclasses import dataclass

import imagesize

from pipeline.records import InputError

LEAST_MEMORY_GB = 0.1
"""A process that reads and writes frames needs about that much for itself."""

MOST_MEMORY_GB = 1e6
"""No machine has more."""

MOST_SECONDS = 3600.0
"""A block of many frames may take as many times longer, and operating systems do not wait for ever."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Limits for each frame by itself; one that goes over them is set aside, and the others go on."""

    seconds: float = 300.0
    """Longest that reading and cutting, or pasting and writing, one frame may take."""
    memory_gb: float = 4.0
    """Most memory that the image and masks of one frame may need, a mask being held over its bounding box only."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= MOST_SECONDS:
            raise InputError(f"limits.seconds is {self.seconds}: expected a number above 0, at most {MOST_SECONDS:g}")
        if not LEAST_MEMORY_GB <= self.memory_gb <= MOST_MEMORY_GB:
            expected = f"at least {LEAST_MEMORY_GB}, at most {MOST_MEMORY_GB:g}"
            raise InputError(f"limits.memory_gb is {self.memory_gb}: expected {expected}")

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * (1 << 30))


def check_image(url: str, data: bytes, memory_bytes: int) -> None:
    """Raise InputError, before anything is decoded, where an image file promises more pixels than fit the memory."""
    try:
        width, height = imagesize.get(io.BytesIO(data))
    except Exception:  # it stumbles over broken files in many ways; OpenCV will say that they are
        return
    # Kinds it does not know have -1 x -1 pixels; OpenCV has a limit of its own for these.
    if width > 0 and 3 * width * height > memory_bytes:
        raise InputError(
            f"{url}: image of {width} x {height} pixels, expected one that fits limits.memory_gb ="
            f" {memory_bytes / (1 << 30):g}"
        )
