"""What torchvision's Mask R-CNN returns, one image a file: `torch.save(output, f"{name}.pt")`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.conversion import tensors
from pipeline.conversion.entries import Entry, of_mask
from pipeline.conversion.image_list import ImageList, one_each, stem
from pipeline.records import InputError, cut_to_box

SHAPES = "expected labels (N), scores (N) and masks (N, 1, H, W) or (N, H, W), as Mask R-CNN of torchvision returns"


def entries(url: str, listed: ImageList, threshold: float) -> Iterator[tuple[str, Entry]]:
    """The instances of a folder of files, or of one; an image goes by its file's name, labels are passed on.

    A pixel is the object's where its probability is above `threshold`; masks that are bool or whole numbers have it
    where they are not 0.
    """
    paths = storage.find(url, tensors.ENDINGS) if storage.is_dir(url) else None
    if paths == []:
        raise InputError(f"{url}: expected .pt files of torch.save, one for each image")
    for name, file in [(stem(url), url)] if paths is None else one_each(url, paths):
        image_id = listed.image_id(file, name)
        labels, scores, masks = _arrays(file, tensors.load(file))
        height, width = masks.shape[1:]
        for number, mask in enumerate(masks):
            found, origin = cut_to_box(mask > threshold if mask.dtype.kind == "f" else mask != 0)
            entry = {"image_id": image_id, "category_id": int(labels[number]), "score": float(scores[number])}
            yield f"{file}: instance {number}", entry | of_mask(found, origin, width, height)


def _arrays(file: str, output: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    try:
        # A model that was called outside of torch.no_grad() gives tensors that want a gradient.
        labels, scores, masks = (output[name].detach().numpy() for name in ("labels", "scores", "masks"))
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError):
        raise InputError(f"{file}: {SHAPES}") from None
    if masks.ndim == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if masks.ndim != 3 or labels.shape != masks.shape[:1] or scores.shape != masks.shape[:1]:
        raise InputError(f"{file}: {SHAPES}")
    if labels.dtype.kind not in "iu" or scores.dtype.kind not in "iuf":
        raise InputError(f"{file}: expected whole numbers as labels, found {labels.dtype}, and numbers as scores")
    return labels, scores, masks
