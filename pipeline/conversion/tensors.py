"""Files of torch.save, read without running any code that they may hold."""

from __future__ import annotations

import io
import warnings
from typing import Any

from pipeline import storage
from pipeline.records import InputError

ENDINGS = (".pt", ".pth")


def load(url: str) -> Any:
    """What a file of torch.save holds: lists, dicts, numbers, text and tensors (on the CPU), and nothing else.

    InputError where it holds other objects, which could run code when they are read, or is no such file.
    """
    # Imported where it is needed: it takes seconds, and json needs none of it.
    import torch

    data = storage.read(url)
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # it stumbles over broken files in many ways
        expected = "expected a file of torch.save with plain lists, dicts and tensors"
        raise InputError(f"{url}: {expected}; other objects could run code when they are read") from None
