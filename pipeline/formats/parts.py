"""Parts: what workers leave behind for the formats whose final files hold many frames, COCO and Parquet."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import rle, storage
from pipeline.confine import writable
from pipeline.records import FRAME_SCHEMA, Frame, FrameRef, InputError, Instance

FOLDER = "_ledger/parts"
PART_SCHEMA = FRAME_SCHEMA.append(pa.field("extra", pa.list_(pa.string())))
"""A row is one frame; `extra` has one json object per instance, its other keys."""

KEPT_OPEN = 16
"""Most parts held in memory while frames are read back."""

READ_AHEAD = 16
"""Parts read at once."""

TOGETHER = 2048
"""Frames read back together, so that a part is read once for all of them: after a hundred nights in each of which some
frames changed, neighbours lie in a hundred parts."""


def row(frame: Frame) -> dict[str, Any]:
    """One frame as a row of FRAME_SCHEMA, masks as compressed run lengths over the whole frame."""
    return {
        "frame_id": frame.frame_id,
        "file_name": frame.file_name,
        "height": frame.height,
        "width": frame.width,
        "instances": [_instance(instance, frame.width, frame.height) for instance in frame.instances],
    }


def _instance(instance: Instance, width: int, height: int) -> dict[str, Any]:
    return {
        "instance_id": instance.instance_id,
        "category_id": instance.category_id,
        "score": instance.score,
        "size": [height, width],
        "counts": rle.encode(instance.mask, instance.origin, width, height),
        "bbox": instance.bbox,
        "area": instance.area,
        "status": instance.status,
        "reason": instance.reason,
        "changed_pixels": instance.changed_pixels,
        "confidence": instance.confidence,
    }


def commit(output: str, frames: Sequence[Frame]) -> str:
    """Write frames as one part named after its content; returns its path below `output`."""
    rows = [row(frame) | {"extra": [json.dumps(i.extra) for i in frame.instances]} for frame in frames]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, PART_SCHEMA), buffer, compression="zstd")
    data = buffer.getvalue().to_pybytes()
    # After a frame has changed, the part that an interrupted run spoke of must not be another one's.
    path = f"{FOLDER}/{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    storage.put(writable(output, path), data)
    return path


def sweep(output: str, parts: Container[str]) -> None:
    """Delete the parts that are not among `parts`: left by a killed run, or of frames that were refined anew."""
    folder = storage.join(output, FOLDER)
    there = storage.find(folder, (".parquet",)) if storage.is_dir(folder) else []
    unused = [path for path in (f"{FOLDER}/{name}" for name in there) if path not in parts]
    storage.at_once(lambda path: storage.remove(writable(output, path)), unused)


class PartError(InputError):
    """A part cannot be read."""


def damaged(output: str, parts: Collection[str]) -> set[str]:
    """The parts that are not there, or cannot be read."""

    def fault(path: str) -> str:
        try:
            Parts(output, {}).table(path)
        except PartError:
            return path
        return ""

    with ThreadPoolExecutor(16) as threads:
        return {path for path in threads.map(fault, parts) if path}


class Parts:
    """Reads parts back, holding a bounded number of them at a time."""

    def __init__(self, output: str, parts: Mapping[str, str]) -> None:
        self.output = output
        self.of_frame = parts
        self._open: OrderedDict[str, tuple[pa.Table, dict[str, int]]] = OrderedDict()

    def table(self, path: str) -> tuple[pa.Table, dict[str, int]]:
        """One part under PART_SCHEMA, and the row of each frame id in it."""
        if path not in self._open:
            self._keep(path, self._read(path))
        self._open.move_to_end(path)
        return self._open[path]

    def _keep(self, path: str, part: tuple[pa.Table, dict[str, int]]) -> None:
        self._open[path] = part
        if len(self._open) > KEPT_OPEN:
            self._open.popitem(last=False)

    def _read(self, path: str) -> tuple[pa.Table, dict[str, int]]:
        url = storage.join(self.output, path)
        # A store that fails is another matter: what it does not give now is not lost.
        data = storage.read_if_there(url)
        if data is None:
            raise PartError(f"{url}: no such file, expected a part that the ledger speaks of")
        # Arrow's threads, which `read_table` always uses, may hold Python's bytes until it exits, and abort it.
        try:
            table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False).combine_chunks()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise PartError(f"{url}: expected a part that can be read: {error!s:.200}") from None
        if table.schema != PART_SCHEMA:
            raise PartError(f"{url}: expected a part that this version of the program wrote")
        return table, {frame_id: number for number, frame_id in enumerate(table["frame_id"].to_pylist())}

    def locate(self, frame_id: str) -> tuple[pa.Table, int]:
        """The part that holds a frame, and its row there."""
        path = self.of_frame[frame_id]
        table, rows = self.table(path)
        if frame_id not in rows:
            raise InputError(f"{storage.join(self.output, path)}: expected frame {frame_id} in this part")
        return table, rows[frame_id]

    def instances(self, wanted: Sequence[tuple[str, int]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The instances with these frame ids and numbers in the frame, all of one part, each with its other keys."""
        table, _ = self.locate(wanted[0][0])
        column, extra = table["instances"].chunk(0), table["extra"].chunk(0)
        offsets = column.offsets.to_pylist()
        places = []
        for frame_id, number in wanted:
            frame_row = self.locate(frame_id)[1]
            places.append(offsets[frame_row] + number)
            if places[-1] >= offsets[frame_row + 1]:
                raise InputError(f"{self.output}: expected {number + 1} instances or more in frame {frame_id}")
        found, extras = column.values.take(places).to_pylist(), extra.values.take(places).to_pylist()
        return [(instance, json.loads(keys)) for instance, keys in zip(found, extras)]

    def in_order(self, refs: Sequence[FrameRef]) -> Iterator[tuple[int, pa.Table]]:
        """Of every frame that a part holds, in the order of `refs`: its place there and its row (a table, copied)."""
        held = [(place, ref.frame_id) for place, ref in enumerate(refs) if ref.frame_id in self.of_frame]
        for start in range(0, len(held), TOGETHER):
            window = held[start : start + TOGETHER]
            slots: dict[str, list[int]] = {}
            for slot, (_, frame_id) in enumerate(window):
                slots.setdefault(self.of_frame[frame_id], []).append(slot)
            found: dict[int, pa.Table] = {}
            for path in self.ahead([*slots]):
                table = self.table(path)[0].take([self.locate(window[slot][1])[1] for slot in slots[path]])
                found.update((slot, table.slice(number, 1)) for number, slot in enumerate(slots[path]))
            for slot, (place, _) in enumerate(window):
                yield place, found.pop(slot)

    def ahead(self, paths: Sequence[str]) -> Iterator[str]:
        """The paths of parts, read a few ahead of their turn: a store answers late, but many requests at once."""
        with ThreadPoolExecutor(READ_AHEAD) as threads:
            for start in range(0, len(paths), READ_AHEAD):
                some = paths[start : start + READ_AHEAD]
                unread = [path for path in some if path not in self._open]
                read = dict(zip(unread, threads.map(self._read, unread)))
                for path in some:
                    if path in read:
                        self._keep(path, read.pop(path))
                    yield path
