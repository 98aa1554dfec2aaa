"""Open a refined Parquet dump in three libraries: `python examples/open_refined_parquet.py refined`.

pandas, DuckDB and Hugging Face datasets; each function stands alone, to be copied into a notebook.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def mask_of(instance: dict[str, Any]) -> np.ndarray:
    """The mask (height, width) bool over the whole frame, of one instance as each of the libraries gives it."""
    return coco_mask.decode({"size": list(instance["size"]), "counts": instance["counts"]}).astype(bool)


def with_pandas(folder: str) -> dict[str, int]:
    """How many instances left with each status."""
    import pandas

    frames = pandas.concat(pandas.read_parquet(path) for path in sorted(Path(folder).glob("part-*.parquet")))
    # One row an instance, with the frame's columns beside its own.
    rows = frames.explode("instances").dropna(subset=["instances"]).reset_index(drop=True)
    instances = rows.drop(columns="instances").join(pandas.json_normalize(rows["instances"].tolist()))
    return {str(status): int(count) for status, count in instances["status"].value_counts().items()}


def with_duckdb(folder: str) -> dict[str, int]:
    """The same by SQL; DuckDB reads only the columns asked for."""
    import duckdb

    query = """
        SELECT instance.status, count(*)
        FROM (SELECT unnest(instances) AS instance FROM read_parquet(?))
        GROUP BY ALL
    """
    return dict(duckdb.execute(query, [f"{folder}/part-*.parquet"]).fetchall())


def with_datasets(folder: str) -> dict[str, int]:
    """The same with `datasets`, whose rows are dicts as in the schema."""
    import datasets

    dump = datasets.Dataset.from_parquet([str(path) for path in sorted(Path(folder).glob("part-*.parquet"))])
    counts: dict[str, int] = {}
    for frame in dump:
        for instance in frame["instances"]:
            counts[instance["status"]] = counts.get(instance["status"], 0) + 1
    return counts


def largest_mask(folder: str) -> tuple[str, np.ndarray]:
    """The file name and mask of the instance with the most pixels."""
    import duckdb

    query = """
        SELECT file_name, instance
        FROM (SELECT file_name, unnest(instances) AS instance FROM read_parquet(?))
        ORDER BY instance.area DESC LIMIT 1
    """
    file_name, instance = duckdb.execute(query, [f"{folder}/part-*.parquet"]).fetchone()
    return file_name, mask_of(instance)


def main(folder: str) -> None:
    for open_with in (with_pandas, with_duckdb, with_datasets):
        try:
            print(f"{open_with.__name__:<14} {open_with(folder)}")
        except ImportError as error:
            print(f"{open_with.__name__:<14} not installed: {error.name}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/open_refined_parquet.py FOLDER")
    main(sys.argv[1])
