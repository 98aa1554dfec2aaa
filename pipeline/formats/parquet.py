"""Dumps in Parquet: one row per frame with the masks of all its instances, as FRAME_SCHEMA has them."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, takewhile
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kind

from pipeline import rle, storage
from pipeline.confine import inside, writable
from pipeline.formats import parts as part_files
from pipeline.identity import digest, identified
from pipeline.records import FRAME_SCHEMA, Frame, FrameRef, InputError, Instance

FRAMES_PER_FILE = 2048
FRAMES_PER_GROUP = 128
"""A worker reads a whole row group for any frame of it, so that these are small."""

LARGEST_GROUP = 2 << 30
"""Bytes of a row group, unpacked."""


def _is_text(found: pa.DataType) -> bool:
    if kind.is_dictionary(found):
        found = found.value_type
    return kind.is_string(found) or kind.is_large_string(found) or kind.is_string_view(found)


def _is_list(found: pa.DataType) -> bool:
    return kind.is_list(found) or kind.is_large_list(found) or kind.is_fixed_size_list(found)


def _is_number(found: pa.DataType) -> bool:
    return kind.is_floating(found) or kind.is_integer(found)


def _is_whole_numbers(found: pa.DataType) -> bool:
    return _is_list(found) and kind.is_integer(found.value_type)


def _is_structs(found: pa.DataType) -> bool:
    return _is_list(found) and kind.is_struct(found.value_type)


_Checks = Mapping[str, tuple[Callable[[pa.DataType], bool], str]]
_COLUMNS: _Checks = {
    "frame_id": (_is_text, "text"),
    "file_name": (_is_text, "text"),
    "height": (kind.is_integer, "whole numbers"),
    "width": (kind.is_integer, "whole numbers"),
    "instances": (_is_structs, "lists of structs"),
}
_NEEDED: _Checks = {
    "instance_id": (_is_text, "text"),
    "category_id": (kind.is_integer, "whole numbers"),
    "size": (_is_whole_numbers, "lists of whole numbers"),
    "counts": (_is_text, "text"),
}
_OPTIONAL: _Checks = {
    "score": (_is_number, "numbers"),
    "status": (_is_text, "text"),
    "reason": (_is_text, "text"),
    "changed_pixels": (kind.is_integer, "whole numbers"),
    "confidence": (_is_number, "numbers"),
}


@dataclass(frozen=True)
class ParquetReader:
    """Reads `predictions`, a Parquet file or a folder of them, with images below the folder `images` by `file_name`.

    Of an instance, `score`, `status`, `reason`, `changed_pixels` and `confidence` may be missing; `bbox`, `area` and
    columns that FRAME_SCHEMA does not have are not looked at. In a folder, names that begin with _ or . are passed over
    with all below them.
    """

    predictions: str
    images: str

    def list_frames(self, known: Mapping[str, str] | None = None) -> list[FrameRef]:
        """One reference per row, by file and row; only ids and file names are read.

        A frame's identity covers the values that are read of its row, and its image. Only row groups with a row that is
        not known, at this place in a file of this version, are read for that.
        InputError names the file, and the column that is missing or of another type.
        """
        # A file of the same name may have been written anew since this process read from it.
        _row_group.cache_clear()
        refs, predictions = [], []
        for url in self._files():
            version = storage.versions_of(url, [""])[0]
            with _open(url) as file:
                _check(url, file.schema_arrow)
                for group in range(file.num_row_groups):
                    names = _read_group(url, file, group, ["frame_id", "file_name"])
                    pairs = zip(names["frame_id"].to_pylist(), names["file_name"].to_pylist())
                    first = len(refs)
                    for row, (frame_id, file_name) in enumerate(pairs):
                        if not frame_id:
                            raise InputError(f"{url}: row group {group}, row {row}: expected a frame_id")
                        error = ""
                        if not file_name:
                            error = f"{url}: frame {frame_id}: expected a file_name"
                        elif not storage.stays_below(file_name):
                            expected = f"expected a path that stays below {self.images}"
                            error = f"{url}: frame {frame_id}: file_name {file_name!r}, {expected}"
                        refs.append(FrameRef(frame_id, file_name or "", (url, group, row, version), error=error))
                    if known is not None:
                        predictions += _contents(file, refs[first:], version, known)
        times = Counter(ref.frame_id for ref in refs)
        refs = [replace(ref, error=_repeated(ref)) if times[ref.frame_id] > 1 else ref for ref in refs]
        return refs if known is None else identified(refs, self.images, predictions)

    def identity(self, ref: FrameRef, instances: Sequence[Instance]) -> str:
        return ref.identity

    def _files(self) -> Sequence[str]:
        if not storage.is_dir(self.predictions):
            return [self.predictions]
        found = storage.find(self.predictions, (".parquet",))
        names = [path for path in found if not any(part[0] in "_." for part in path.split("/"))]
        if not names:
            raise InputError(f"{self.predictions}: expected .parquet files in or below this folder")
        return [inside(self.predictions, name) for name in names]

    def read(self, ref: FrameRef, width: int, height: int) -> Iterator[Instance]:
        """The instances of one row, in order. InputError names the file, the frame and the instance."""
        url, group, row, version = ref.source
        place = f"{url}: frame {ref.frame_id}"
        table = _row_group(url, group, version)
        if row >= table.num_rows or table["frame_id"][row].as_py() != ref.frame_id:
            raise InputError(f"{place}: expected the row that was listed here; the file has changed")
        size = table["height"][row].as_py(), table["width"][row].as_py()
        if size != (height, width):
            raise InputError(f"{place}: height and width {size}, expected {height, width} as the image")
        number = 0
        try:
            for fields in _instances(table["instances"], row):
                yield _instance(fields, width, height)
                number += 1
        except InputError as error:
            raise InputError(f"{place}: instance {number}: {error}") from None


@dataclass(frozen=True)
class ParquetWriter:
    """Writes `part-00000.parquet` and so on below the folder `output`, under FRAME_SCHEMA."""

    output: str
    result: ClassVar[str] = "part-00000.parquet"

    def withdraw(self, gone: Sequence[FrameRef], listed: Sequence[FrameRef]) -> None:
        """Nothing: frames that no part holds are not in the next files."""

    def commit(self, frames: Sequence[Frame]) -> str:
        return part_files.commit(self.output, frames)

    def finish(self, refs: Sequence[FrameRef], parts: Mapping[str, str]) -> list[str]:
        """The frames in the order of `refs`, FRAMES_PER_FILE to a file; files of a longer dump are removed."""
        waiting: list[pa.Table] = []
        written: list[str] = []
        for place, table in part_files.Parts(self.output, parts).in_order(refs):
            waiting.append(_numbered(table.select(FRAME_SCHEMA.names), refs[place].positions))
            if len(waiting) == FRAMES_PER_FILE:
                written.append(self._write(len(written), waiting))
                waiting = []
        if waiting or not written:
            written.append(self._write(len(written), waiting))
        found = {*storage.names(self.output, (".parquet",))}
        # Those of a longer dump follow without a gap, and the last goes first, so that a kill leaves none.
        longer = list(takewhile(found.__contains__, map(_file_name, count(len(written)))))
        for path in reversed(longer):
            storage.remove(storage.join(self.output, path))
        return written

    def _write(self, number: int, rows: Sequence[pa.Table]) -> str:
        name = _file_name(number)
        # One chunk, so that the bytes do not depend on how the frames lay in parts.
        table = pa.concat_tables([FRAME_SCHEMA.empty_table(), *rows]).combine_chunks()
        with storage.open_write(writable(self.output, name)) as file:
            pq.write_table(table, file, row_group_size=FRAMES_PER_GROUP, compression="zstd")
        return name


def _file_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _numbered(row: pa.Table, positions: Sequence[int]) -> pa.Table:
    """A frame of a dump with one order over all frames, its instances named by their places as they are now."""
    instances = row["instances"].to_pylist()[0] if positions else []
    for instance, position in zip(instances, positions):
        instance["instance_id"] = str(position)
    return (
        row.set_column(4, FRAME_SCHEMA.field(4), pa.array([instances], FRAME_SCHEMA.field(4).type))
        if instances
        else row
    )


@contextmanager
def _open(url: str) -> Iterator[pq.ParquetFile]:
    """A file to read with `use_threads=False`: Arrow's threads may hold Python's bytes until it exits, and abort it."""
    with storage.open_read(url) as source:
        try:
            metadata = pq.ParquetFile(source).metadata
            yield pq.ParquetFile(source, metadata=metadata, read_dictionary=_texts(metadata.schema))
        except InputError:
            raise
        # ValueError: text that is no UTF-8, and what Arrow says of a damaged schema.
        except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{url}: expected a Parquet file that can be read: {reason}") from None


def _texts(schema: pq.ParquetSchema) -> list[str]:
    """The columns of text that are read."""
    found = []
    for number in range(len(schema)):
        column = schema.column(number)
        path = column.path.split(".")
        checks = _COLUMNS if len(path) == 1 else {**_NEEDED, **_OPTIONAL} if path[0] == "instances" else {}
        if column.physical_type == "BYTE_ARRAY" and path[-1] in checks and checks[path[-1]][0] is _is_text:
            found.append(column.path)
    return found


def _read_group(url: str, file: pq.ParquetFile, group: int, columns: Sequence[str]) -> pa.Table:
    """Columns of a row group. A text that all its rows have is in memory once, as it is in the file."""
    # What else the metadata says of a column is not asked for: pyarrow ends the process where it is damaged.
    size = file.metadata.row_group(group).total_byte_size
    if size > LARGEST_GROUP:
        raise InputError(
            f"{url}: row group {group} takes {size} bytes, expected at most {LARGEST_GROUP};"
            f" write it with a row_group_size of some {FRAMES_PER_GROUP} frames"
        )
    try:
        return file.read_row_group(group, columns=list(columns), use_threads=False)
    except (OSError, pa.ArrowNotImplementedError) as error:
        if "DictAccumulator" not in str(error):
            raise
    # Arrow makes no dictionary of text in some encodings.
    with storage.open_read(url) as source:
        return pq.ParquetFile(source).read_row_group(group, columns=list(columns), use_threads=False)


@lru_cache(maxsize=2)
def _row_group(url: str, group: int, version: str) -> pa.Table:
    """A row group as it was in a version of the file: a process may outlive the file that it has read."""
    with _open(url) as file:
        if group >= file.num_row_groups:
            raise InputError(f"{url}: expected row group {group} that was listed here; the file has changed")
        return _read_group(url, file, group, list(_COLUMNS))


def _contents(file: pq.ParquetFile, refs: Sequence[FrameRef], version: str, known: Mapping[str, str]) -> list[str]:
    """`<digest of the values>@<place>` for the rows of one row group, taken from `known` where all have their place."""
    places = [digest(version, *map(str, ref.source[:3])) for ref in refs]
    if version:
        before = [known.get(ref.frame_id, "").partition(".")[2] for ref in refs]
        if all(content.partition("@")[2] == place for content, place in zip(before, places)):
            return before
    url, group, *_ = refs[0].source
    table = _read_group(url, file, group, ["height", "width", "instances"])
    columns = [*_NEEDED, *_OPTIONAL]
    found = []
    for number, place in enumerate(places):
        made = hashlib.blake2b(digest_size=8)
        made.update(json.dumps([table["height"][number].as_py(), table["width"][number].as_py()]).encode())
        for fields in _instances(table["instances"], number):
            made.update(json.dumps(fields and [fields.get(name) for name in columns]).encode())
        found.append(f"{made.hexdigest()}@{place}")
    return found


def _instances(column: pa.ChunkedArray, row: int) -> Iterator[dict[str, Any] | None]:
    """The fields that are read of each instance of a row, one after the other; None for one that is null.

    InputError where they are no values that Python has.
    """
    values = column[row].values
    if values is None:
        return
    names = [name for name in (*_NEEDED, *_OPTIONAL) if values.type.get_field_index(name) >= 0]
    fields = {name: values.field(name) for name in names}
    for number in range(len(values)):
        if not values[number].is_valid:
            yield None
            continue
        try:
            yield {name: field[number].as_py() for name, field in fields.items()}
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise InputError(f"expected text in UTF-8 and finite numbers ({error!s:.100})") from None


def _repeated(ref: FrameRef) -> str:
    return f"{ref.source[0]}: expected every frame_id once, {ref.frame_id} occurs more often"


def _check(url: str, schema: pa.Schema) -> None:
    def check(fields: pa.Schema | pa.StructType, checks: _Checks, prefix: str, needed: bool) -> None:
        for name, (fits, expected) in checks.items():
            index = fields.get_field_index(name)
            if index < 0 and needed:
                raise InputError(f"{url}: column {prefix}{name} is missing, expected {expected}")
            if index >= 0 and not fits(fields.field(index).type):
                raise InputError(f"{url}: column {prefix}{name} has {fields.field(index).type}, expected {expected}")

    check(schema, _COLUMNS, "", True)
    instance = schema.field("instances").type.value_type
    check(instance, _NEEDED, "instances.", True)
    check(instance, _OPTIONAL, "instances.", False)


def _instance(fields: dict[str, Any] | None, width: int, height: int) -> Instance:
    if not fields or any(fields[name] is None for name in _NEEDED):
        raise InputError(f"expected values in {', '.join(_NEEDED)}, found {fields!r:.60}")
    score = fields.get("score")
    if score is not None and not math.isfinite(score):
        raise InputError(f"expected a finite number as score, found {score}")
    for name in ("category_id", "changed_pixels"):
        if not abs(fields.get(name) or 0) < 1 << 63:
            raise InputError(f"expected a {name} of 64 bits with a sign, found {fields[name]}")
    mask, origin = rle.decode(fields["counts"], fields["size"], width, height)
    given = {name: fields[name] for name in _OPTIONAL if fields.get(name) is not None}
    score = float(given.pop("score", 1.0))
    return Instance(fields["instance_id"], fields["category_id"], score, mask, origin, **given)
