"""A model's masks, as arrays in this process, written as a Parquet dump that `refine` reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.formats import parts
from pipeline.formats.parquet import FRAMES_PER_GROUP
from pipeline.records import FRAME_SCHEMA, Frame, InputError, Instance, cut_to_box


def frame_of_masks(
    file_name: str,
    masks: np.ndarray,
    category_ids: Sequence[int] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    frame_id: str = "",
) -> Frame:
    """One image's instances, from masks (N, H, W) over the whole image, any non-zero value being the object.

    `file_name` is the image's path below the folder that `refine` will be given; it is the frame's id too unless one is
    given. InputError names the image where the lengths differ, or masks are neither bool nor whole numbers.
    """
    masks = np.asarray(masks)
    if masks.size and masks.dtype.kind not in "biu":
        raise InputError(f"{file_name}: expected masks of bool or whole numbers, found {masks.dtype}; give masks > 0.5")
    if masks.ndim != 3 or not len(masks) == len(category_ids) == len(scores):
        found = f"masks {masks.shape}, {len(category_ids)} categories, {len(scores)} scores"
        raise InputError(f"{file_name}: expected masks (N, H, W), N categories and N scores, found {found}")
    instances = []
    for number, (mask, category_id, score) in enumerate(zip(masks, category_ids, scores)):
        held, origin = cut_to_box(mask)
        instances.append(Instance(str(number), int(category_id), float(score), held, origin))
    height, width = masks.shape[1:]
    return Frame(frame_id or file_name, file_name, width, height, instances)


def write_frames(url: str, frames: Iterable[Frame]) -> int:
    """Write one Parquet file under FRAME_SCHEMA, frame by frame; returns how many there were.

    The file appears under its name once all are written; some FRAMES_PER_GROUP frames are in memory at a time, as run
    lengths.
    """
    rows = (parts.row(frame) for frame in frames)
    count = 0
    with storage.open_write(url) as file, pq.ParquetWriter(file, FRAME_SCHEMA, compression="zstd") as writer:
        while group := list(islice(rows, FRAMES_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, FRAME_SCHEMA))
            count += len(group)
    return count
