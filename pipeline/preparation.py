"""Cut a patch data set: frames with ground truth in, shards of training patches out.

ground truth (+ predictions) --list--> frames - ledger.done = todo
todo -> decode, match or coarsen, propose, crop, write shards (CPU tasks) -> receipts -> driver -> card
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline import dump, patch_dataset, storage
from pipeline.flow import map_blocks, stopped_by_signals
from pipeline.formats import Reader
from pipeline.ground_truth import TruthRef, image_key, open_ground_truth
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.records import InputError
from pipeline.stages import Receipt
from pipeline.training_patches import MIN_IOU, Cut, Cutter, Item, PrepareConfig, cut_frame, generator, pairs_to_cut


@dataclass(frozen=True)
class Prepared:
    """The outcome of a run."""

    output: str
    frames: int
    done_before: int
    aside: dict[str, str]
    unpaired: str
    """One line on images that have ground truth or predictions only; empty where all have both."""
    card: dict[str, Any]
    wall_s: float

    def __str__(self) -> str:
        counts = self.card["patches"]
        rows = sum(counts.values())
        lines = [
            f"frames       {self.frames} cut now, {self.done_before} before, {len(self.aside)} set aside",
            f"instances    {self.card['instances']}",
            f"patches      {rows} ({', '.join(f'{n} {split}' for split, n in counts.items())}),"
            f" {self.card['bytes'] / 1e3 / max(rows, 1):.2f} MB per 1000",
        ]
        if self.unpaired:
            lines.append(f"unpaired     {self.unpaired}")
        lines += [f"set aside    {key}: {error}" for key, error in list(self.aside.items())[:5]]
        if len(self.aside) > 5:
            lines.append(f"set aside    ... {len(self.aside) - 5} more, all in {self.output}/_ledger/quarantine.csv")
        return "\n".join([*lines, f"output       {self.output}  ({self.wall_s:.1f} s)"])


def prepare(config: PrepareConfig, log: Callable[[str], None] = print) -> Prepared:
    """Cut a patch data set; raises InputError where nothing can be done at all.

    Frames with a fault are set aside in `_ledger/quarantine.csv`. The same input and seed give the same rows whatever
    the number of workers; the card `card.json` is written last.
    """
    started = time.monotonic()
    config = _absolute(config)
    storage.check_folder(config.images)
    truth = open_ground_truth(config.ground_truth, config.images)
    listing = truth.list_frames()
    items, reader, unpaired = _items(config, listing.refs)
    cutter = Cutter(config, truth, reader)
    with stopped_by_signals(), Lease(config.output) as lease, closing(Ledger(config.output)) as ledger:
        ledger.open(_fingerprint(config))
        items = items[: config.limit]
        ledger.forget_others({item.truth.key for item in items})
        if config.max_instances is not None:
            items = _draw(items, cutter, config.max_instances)
        size = config.frames_per_block
        # Blocks are made before what is done is left out, so that a repeated block has its old name.
        blocks = [items[i : i + size] for i in range(0, len(items), size)]
        todo = [[item for item in block if item.truth.key not in ledger.parts] for block in blocks]
        left = sum(map(len, todo))
        progress = Progress(total=left, done_before=len(items) - left, log=log, verb="cut")
        if left:
            work = partial(_cut_block, cutter=cutter)
            for receipts in map_blocks([block for block in todo if block], work, local=config.local):
                lease.check()
                ledger.record(receipts)
                progress.update(receipts)
        ledger.flush()
        shards = _sweep(config.output, set(ledger.parts.values()))
        card = _card(config, listing.categories, shards)
        storage.put(storage.join(config.output, patch_dataset.CARD), json.dumps(card, indent=1).encode())
        aside, frames = dict(ledger.aside), progress.frames
        return Prepared(config.output, frames, len(items) - left, aside, unpaired, card, time.monotonic() - started)


def _items(config: PrepareConfig, refs: Sequence[TruthRef]) -> tuple[list[Item], Reader | None, str]:
    """The frames to cut, the reader of their predictions, and a line on images that lack one of the two."""
    pasted = [_pasted(config, ref, refs) for ref in refs]
    if config.predictions is None:
        return [Item(ref, None, donors) for ref, donors in zip(refs, pasted)], None, ""
    form = dump.input_format(config.predictions, config.format)
    image_list = config.image_list
    if form == "coco" and image_list is None and config.image_pattern is None and config.ground_truth.endswith(".json"):
        image_list = config.ground_truth
    reader = dump.reader(config.predictions, config.images, form, image_list, config.image_pattern)
    predicted = {image_key(ref.file_name or ref.frame_id): ref for ref in reader.list_frames()}
    items = [Item(ref, predicted.pop(ref.key), donors) for ref, donors in zip(refs, pasted) if ref.key in predicted]
    if not items:
        raise InputError(f"{config.predictions}: no image in common with {config.ground_truth}")
    missing = len(refs) - len(items)
    unpaired = f"{missing} images without predictions, {len(predicted)} without ground truth"
    return items, reader, unpaired if missing or predicted else ""


def _pasted(config: PrepareConfig, ref: TruthRef, refs: Sequence[TruthRef]) -> tuple[TruthRef | None, ...]:
    rng = generator(config.seed, ref.key, "donors")
    return tuple(
        refs[rng.integers(len(refs))] if rng.random() < config.composite else None for _ in range(config.visits)
    )


def _draw(items: list[Item], cutter: Cutter, count: int) -> list[Item]:
    """Choose `count` of the objects that could be cut: those that a hash of the seed and their names puts first."""
    size = 4 * cutter.config.frames_per_block
    blocks = [items[i : i + size] for i in range(0, len(items), size)]
    ranked = []
    for found in map_blocks(blocks, partial(_names, cutter=cutter), local=cutter.config.local):
        for key, names in found:
            for name in names:
                ranked.append((generator(cutter.config.seed, key, name, "draw").random(), key, name))
    chosen = defaultdict(set)
    for _, key, name in sorted(ranked)[:count]:
        chosen[key].add(name)
    return [replace(item, chosen=frozenset(chosen[item.truth.key])) for item in items]


def _names(items: Sequence[Item], cutter: Cutter) -> list[tuple[str, list[str]]]:
    found = []
    for item in items:
        try:
            frame = cutter.truth.read(item.truth)
            pairs = pairs_to_cut(item, cutter, frame.instances, frame.width, frame.height)
            found.append((item.truth.key, [name for name, _, _ in pairs]))
        except InputError:  # cutting will meet it again, and set the frame aside
            found.append((item.truth.key, []))
    return found


def _cut_block(items: Sequence[Item], cutter: Cutter) -> list[Receipt]:
    """Cut some frames and write their patches, in shards that the frames' names give their own."""
    rows: dict[str, list[Cut]] = {split: [] for split in patch_dataset.SPLITS}
    receipts, good = [], []
    name = patch_dataset.shard_name([item.truth.key for item in items])
    for item in items:
        started, cut, error = time.perf_counter(), Cut(), ""
        try:
            cut = cut_frame(item, cutter)
        except InputError as problem:
            error = str(problem)
        except Exception as problem:  # one frame must never stop the others
            error = f"{item.truth.file_name}: {type(problem).__name__}: {' '.join(str(problem).split())}"
        if not error and cut.keys:
            good.append(item)
            rows[cut.keys[0]["split"]].append(cut)
        receipts.append(
            Receipt(
                frame_id=item.truth.key,
                error=error,
                part="" if error or not cut.keys else name,
                instances=len(cut.instances),
                refined=0,
                patches=len(cut.keys),
                seconds={"extract": time.perf_counter() - started},
                refined_at=0.0,
            )
        )
    tables = {
        split: patch_dataset.pack(
            np.concatenate([patches for cut in cuts for patches in cut.patches]),
            [key for cut in cuts for key in cut.keys],
        )
        for split, cuts in rows.items()
        if cuts
    }
    patch_dataset.write_shards(cutter.config.output, tables, name)
    return receipts


def _sweep(output: str, names: set[str]) -> list[str]:
    """Delete the shards that no finished frame speaks of, which a killed run left; returns the others."""
    kept = []
    for path in storage.find(output, (".parquet",)):
        if path.split("/")[-1].rsplit("-", 1)[0] in names:
            kept.append(path)
        else:
            storage.remove(storage.join(output, path))
    return kept


def _card(config: PrepareConfig, categories: dict[int, str], shards: Sequence[str]) -> dict[str, Any]:
    """Counts and histograms of what lies in the shards, with the settings that made them."""
    patches: Counter[str] = Counter()
    by_class: Counter[str] = Counter()
    origins: Counter[str] = Counter()
    instances: set[tuple[str, str]] = set()
    ious, total = np.zeros(10, np.int64), 0
    for path in shards:
        url = storage.join(config.output, path)
        with storage.open_read(url) as stream, pq.ParquetFile(stream) as file:
            table = file.read(columns=["category_id", "iou", "origin", "frame_id", "instance_id"], use_threads=False)
        patches[path.split("/")[0]] += len(table)
        by_class.update(categories.get(c, str(c)) for c in table["category_id"].to_pylist())
        origins.update(table["origin"].to_pylist())
        instances.update(zip(table["frame_id"].to_pylist(), table["instance_id"].to_pylist()))
        ious += np.histogram(table["iou"].to_numpy(), np.linspace(MIN_IOU, 1, 11))[0]
        total += storage.size(url)
    return {
        "patches": {split: patches[split] for split in patch_dataset.SPLITS},
        "side_px": config.patch_size + 2 * config.padding,
        "instances": len(instances),
        "patches_by_class": dict(sorted(by_class.items())),
        "patches_by_origin": dict(sorted(origins.items())),
        "patches_by_iou": {f"{0.5 + 0.05 * i:.2f}-{0.55 + 0.05 * i:.2f}": int(n) for i, n in enumerate(ious)},
        "shards": len(shards),
        "bytes": total,
        "settings": _fingerprint(config),
    }


def _fingerprint(config: PrepareConfig) -> dict[str, Any]:
    """The settings that decide which rows are cut."""
    how = ("output", "local", "strict", "limit", "frames_per_block")
    # By way of json, in which it is compared with what an earlier run wrote.
    return json.loads(json.dumps({name: value for name, value in asdict(config).items() if name not in how}))


def _absolute(config: PrepareConfig) -> PrepareConfig:
    names = ("ground_truth", "images", "output", "predictions", "image_list")
    return replace(config, **{name: storage.absolute(url) for name in names if (url := getattr(config, name))})
