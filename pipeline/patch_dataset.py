"""Patch data sets: Parquet shards of training patches with their targets, written once and read in any order."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.augment import Augmentation, augment
from pipeline import storage
from pipeline.config import MAX_PATCH_PX
from pipeline.images import decoded
from pipeline.records import InputError

SPLITS = ("train", "val")
SHARD_ROWS = 4096
"""Most patches of one shard: some 30 MB."""

WINDOW_ROWS = 8192
"""Patches that are held, as PNGs, and mixed while training: some 70 MB."""

CARD = "card.json"

_SHARD = re.compile(rf"({'|'.join(SPLITS)})/(?P<name>[0-9a-f]{{16}})-\d{{3,}}\.parquet")

_PIXELS, _DIGEST = ("image", "coarse", "target"), b"content_sha256"
"""What is learned from, and what a shard's footer calls the digest of it."""

PATCH_SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("coarse", pa.binary()),
        ("target", pa.binary()),
        ("side", pa.int32()),
        ("frame_id", pa.string()),
        ("instance_id", pa.string()),
        ("category_id", pa.int64()),
        ("box", pa.list_(pa.int32())),
        ("iou", pa.float32()),
        ("origin", pa.string()),
        ("visit", pa.int32()),
        ("split", pa.string()),
    ]
)
"""A row is one patch of `side` pixels squared, padding included: `image` a PNG, `coarse` and `target` bits by row
(`numpy.packbits`). `box` is [x1, y1, x2, y2] in the frame, without the padding; `iou` is that of the whole coarse mask
with its target; `origin` tells where the coarse mask is from (`prediction`, or a kind of `model/coarsen.py`); `visit`
counts the variants of one frame that were cut."""


def pack(patches: np.ndarray, keys: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Patches (N, S, S, 5) uint8, with the other columns of each, as rows of PATCH_SCHEMA."""
    columns: dict[str, list[Any]] = {name: [key.get(name) for key in keys] for name in PATCH_SCHEMA.names}
    columns["image"] = [_png(patch[..., :3]) for patch in patches]
    for name, channel in (("coarse", 3), ("target", 4)):
        columns[name] = [np.packbits(patch[..., channel]).tobytes() for patch in patches]
    columns["side"] = [patches.shape[1]] * len(patches)
    return pa.table(columns, PATCH_SCHEMA)


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 4])[1].tobytes()


def unpack(table: pa.Table) -> np.ndarray:
    """The patches (N, S, S, 5) uint8 of some rows of one side: RGB, coarse 0/1, target 0/1.

    Of the rows only the images are not known to be right (see `_rows`): InputError names the patch.
    """
    side = table["side"][0].as_py()
    out = np.empty((len(table), side, side, 5), np.uint8)
    columns = (table[name].to_pylist() for name in _READ[:-1])
    for patch, image, coarse, target, frame_id, instance_id in zip(out, *columns):
        pixels = decoded(image, cv2.IMREAD_COLOR_RGB)
        if pixels is None or pixels.shape[:2] != (side, side):
            name = f"{instance_id} in {frame_id}"
            raise InputError(f"patch of {name}: expected a PNG of {side} x {side} pixels; cut the data set again")
        patch[..., :3] = pixels
        for channel, bits in ((3, coarse), (4, target)):
            patch[..., channel] = np.unpackbits(np.frombuffer(bits, np.uint8), count=side * side).reshape(side, side)
    return out


def write_shards(output: str, tables: Mapping[str, pa.Table], name: str) -> None:
    """Write the rows of each split, at most SHARD_ROWS to a shard, under a name."""
    for split, table in tables.items():
        for number, start in enumerate(range(0, len(table), SHARD_ROWS)):
            rows, buffer = table.slice(start, SHARD_ROWS), pa.BufferOutputStream()
            content = hashlib.sha256(b"".join(value for name in _PIXELS for value in rows[name].to_pylist()))
            rows = rows.replace_schema_metadata({_DIGEST: content.hexdigest()})
            # PNGs and packed bits do not get smaller.
            pq.write_table(rows, buffer, compression="none", row_group_size=512)
            storage.put(storage.join(output, f"{split}/{name}-{number:03d}.parquet"), buffer.getvalue().to_pybytes())


def shard_name(frame_ids: Sequence[str]) -> str:
    """Where the patches of these frames go: the same frames always to the same shards."""
    return hashlib.sha256("\n".join(frame_ids).encode()).hexdigest()[:16]


def name_in(path: str) -> str | None:
    """The name under which `write_shards` wrote a file, by its path below the output; None for files of others."""
    found = _SHARD.fullmatch(path)
    return found["name"] if found else None


@dataclass(frozen=True)
class Shard:
    """One file of a data set."""

    url: str
    rows: int
    digest: str
    """Of its images and masks, as its footer has it."""


class PatchDataset:
    """One split of one or more patch data sets, opened for training.

    `urls` are folders that `jobs/prepare.py` has written. Raises InputError for a folder without shards, a shard of
    another schema, patches of different sides, and where no patch is found.
    """

    def __init__(self, urls: Sequence[str], split: str) -> None:
        self.urls, self.split = list(urls), split
        self.shards: list[Shard] = []
        sides = {}
        for url in self.urls:
            for path in storage.find(url, (".parquet",)):
                if path.split("/")[0] not in SPLITS:
                    raise InputError(f"{url}/{path}: expected shards below train/ and val/, as jobs/prepare.py writes")
                if path.startswith(f"{split}/"):
                    shard_url = storage.join(url, path)
                    shard, side = _inspect(shard_url)
                    self.shards.append(shard)
                    sides[side] = shard_url
        self.rows = sum(shard.rows for shard in self.shards)
        if not self.rows:
            raise InputError(f"{', '.join(self.urls)}: no {split} patch; expected shards that jobs/prepare.py wrote")
        if len(sides) > 1:
            found = ", ".join(f"{side} px in {url}" for side, url in sides.items())
            raise InputError(f"patches of different sides: {found}; expected one side in all data sets")
        self.side_px = next(iter(sides))

    @cached_property
    def cards(self) -> list[dict[str, Any]]:
        """What each data set says of itself; empty where it has no card (its preparation was not finished)."""
        found = []
        for url in self.urls:
            path = f"{url.rstrip('/')}/{CARD}"
            found.append(json.loads(storage.read(path)) if storage.exists(path) else {})
        return found

    @property
    def fingerprint(self) -> str:
        """Differs where patches were cut again: 16 digits of the names and contents of all shards."""
        shards = "\n".join(f"{shard.url} {shard.rows} {shard.digest}" for shard in self.shards)
        return hashlib.sha256(shards.encode()).hexdigest()[:16]

    def iterate(self, batch_size: int, rank: int = 0, world: int = 1, limit: int | None = None) -> Iterator[np.ndarray]:
        """This process's share of the patches, in order, as (n, S, S, 5) uint8, n up to `batch_size`.

        With `limit`, only so many patches of all (over all processes), evenly spread.
        """
        rows = np.unique(np.linspace(0, self.rows - 1, min(limit or self.rows, self.rows)).round().astype(np.int64))
        rows = rows[rank::world]
        for start in range(0, len(rows), batch_size):
            yield self.take(rows[start : start + batch_size])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The patches (n, S, S, 5) uint8 with these numbers (n,), counted over all shards."""
        ends = np.cumsum([shard.rows for shard in self.shards])
        owners = np.searchsorted(ends, rows, side="right")
        out = np.empty((len(rows), self.side_px, self.side_px, 5), np.uint8)
        for owner in np.unique(owners).tolist():
            shard = self.shards[owner]
            out[owners == owner] = unpack(_rows(shard.url).take(rows[owners == owner] - (ends[owner] - shard.rows)))
        return out


def _inspect(url: str) -> tuple[Shard, int]:
    """A shard and the side of its patches, from its footer and first row group.

    InputError names a shard of another schema, or of another side than patches can have.
    """
    try:
        with storage.open_read(url) as stream, pq.ParquetFile(stream) as file:
            if file.schema_arrow != PATCH_SCHEMA:
                raise InputError(f"{url}: expected the columns {', '.join(PATCH_SCHEMA.names)} of a patch data set")
            sides = file.read_row_group(0, columns=["side"], use_threads=False)["side"].unique().to_pylist()
            digest = (file.schema_arrow.metadata or {}).get(_DIGEST, b"").decode()
            rows = file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url}: not a Parquet file ({' '.join(str(error).split())})") from None
    if len(sides) != 1 or not 0 < (sides[0] or 0) <= MAX_PATCH_PX:
        raise InputError(f"{url}: patches of sides {sides}, expected one side from 1 to {MAX_PATCH_PX}")
    return Shard(url, rows, digest), sides[0]


def _rows(url: str) -> pa.Table:
    """What `unpack` needs of a shard; InputError names a shard with rows that are no patches of its side."""
    try:
        table = pq.ParquetFile(pa.BufferReader(storage.read(url))).read(columns=_READ, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url}: cannot be read ({' '.join(str(error).split())})") from None
    side = table["side"][0].as_py()
    complete = not any(table[name].null_count for name in ("image", "coarse", "target", "side"))
    if not complete or pc.unique(table["side"]).to_pylist() != [side]:
        raise InputError(f"{url}: expected image, coarse, target and one side in all rows; cut the data set again")
    for name in ("coarse", "target"):
        if pc.any(pc.not_equal(pc.binary_length(table[name]), (side * side + 7) // 8)).as_py():
            raise InputError(f"{url}: expected {side} x {side} bits as {name} in all rows; cut the data set again")
    return table.combine_chunks()


_READ = [*_PIXELS, "frame_id", "instance_id", "side"]


class PatchBatches:
    """The training batches of one process: batch of step s is a function of the seed, s, `rank` and `world` alone.

    So that training goes on after an interruption exactly where it was, any step may be asked for. Shards are dealt to
    the processes once; in every epoch each process takes its shards in a new order and mixes the patches of some
    WINDOW_ROWS. Raises InputError where the data cannot feed `world` processes.
    """

    def __init__(
        self,
        dataset: PatchDataset,
        batch_size: int,
        seed: int,
        augmentation: Augmentation,
        side_px: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if side_px > dataset.side_px:
            raise InputError(f"{', '.join(dataset.urls)}: patches of {dataset.side_px} px, expected at least {side_px}")
        self.batch_size, self.seed, self.augmentation, self.side_px = batch_size, seed, augmentation, side_px
        self.rank = rank
        shares = _deal(dataset.shards, world)
        self.steps_per_epoch = min(sum(shard.rows for shard in share) for share in shares) // batch_size
        if not self.steps_per_epoch:
            raise InputError(
                f"{', '.join(dataset.urls)}: {dataset.rows} patches in {len(dataset.shards)} shards cannot feed"
                f" {world} processes with batches of {batch_size}; expected fewer processes, smaller batches, or a data"
                " set cut with fewer --frames-per-block"
            )
        self.shards = shares[rank]
        self._epoch = -1
        self._order: list[list[Shard]] = []
        self._ends: list[int] = []
        self._window = lru_cache(maxsize=2)(self._load)

    def __len__(self) -> int:
        """The batches of one epoch; later steps may be asked for all the same."""
        return self.steps_per_epoch

    def __getitem__(self, step: int) -> np.ndarray:
        """The batch (batch_size, side_px, side_px, 5) uint8 of a step, from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = _windows(self.shards, np.random.default_rng([self.seed, epoch, self.rank]))
            self._ends = np.cumsum([sum(shard.rows for shard in window) for window in self._order]).tolist()
            self._epoch = epoch
        first, pieces = place * self.batch_size, []
        last = first + self.batch_size
        while first < last:
            number = bisect_right(self._ends, first)
            begin = self._ends[number - 1] if number else 0
            stop = min(last, self._ends[number])
            table, order = self._window(epoch, number)
            pieces.append(unpack(table.take(order[first - begin : stop - begin])))
            first = stop
        rng = np.random.default_rng([self.seed, step, self.rank, 1])
        return augment(np.concatenate(pieces), self.side_px, self.augmentation, rng)

    def _load(self, epoch: int, number: int) -> tuple[pa.Table, np.ndarray]:
        table = pa.concat_tables(_rows(shard.url) for shard in self._order[number]).combine_chunks()
        return table, np.random.default_rng([self.seed, epoch, self.rank, number]).permutation(len(table))


def _deal(shards: Sequence[Shard], world: int) -> list[list[Shard]]:
    """Give each process about as many patches, the largest shards first."""
    shares: list[list[Shard]] = [[] for _ in range(world)]
    loads = [0] * world
    for shard in sorted(shards, key=lambda shard: (-shard.rows, shard.url)):
        least = loads.index(min(loads))
        shares[least].append(shard)
        loads[least] += shard.rows
    return shares


def _windows(shards: Sequence[Shard], rng: np.random.Generator) -> list[list[Shard]]:
    """The shards in a random order, in groups whose patches are mixed."""
    windows: list[list[Shard]] = []
    rows = WINDOW_ROWS
    for number in rng.permutation(len(shards)):
        if rows >= WINDOW_ROWS:
            windows.append([])
            rows = 0
        windows[-1].append(shards[number])
        rows += shards[number].rows
    return windows
