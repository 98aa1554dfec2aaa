"""What MMDetection 3 writes: `<prefix>.segm.json` of CocoMetric, and `preds/*.json` of DetInferencer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pipeline import storage
from pipeline.conversion.entries import Entry, results
from pipeline.conversion.image_list import ImageList, one_each
from pipeline.records import InputError


def entries(url: str, listed: ImageList) -> Iterator[tuple[str, Entry]]:
    """The instances of a `.segm.json`, which is passed on, or of a folder with a json for each image.

    In the folder images go by the names of their files, and categories by labels from 0. A pickle of tools/test.py is
    refused: reading one can run any code.
    """
    if url.endswith((".pkl", ".pickle")):
        raise InputError(
            f"{url}: a pickle can run code when it is read; expected json: tools/analysis_tools/eval_metric.py CONFIG"
            " PKL --cfg-options val_evaluator.outfile_prefix=PREFIX makes PREFIX.segm.json of it"
        )
    if not storage.is_dir(url):
        yield from results(url)
        return
    files = storage.find(url, (".json",))
    if not files:
        raise InputError(f"{url}: expected .json files, as DetInferencer writes below preds/")
    for name, file in one_each(url, files):
        yield from _of_image(file, listed.image_id(file, name), listed)


def _of_image(file: str, image_id: int | str, listed: ImageList) -> Iterator[tuple[str, Entry]]:
    try:
        content = json.loads(storage.read(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: expected json: {error}") from None
    names = ("labels", "scores", "masks")
    columns: list[Any] = [content.get(name) if isinstance(content, dict) else None for name in names]
    if columns[0] == [] and columns[2] is None:
        return
    if not all(isinstance(column, list) for column in columns) or len({len(column) for column in columns}) != 1:
        raise InputError(f"{file}: expected lists of one length as {', '.join(names)} of a model with masks")
    for number, (label, score, mask) in enumerate(zip(*columns)):
        place = f"{file}: instance {number}"
        category = listed.category(place, label)
        yield place, {"image_id": image_id, "category_id": category, "segmentation": mask, "score": score}
