"""Cut a patch data set: frames with ground truth in, shards of training patches out.

ground truth (+ predictions) --list--> frames - ledger.done and unchanged = todo
todo -> decode, match or coarsen, propose, crop, write shards (CPU tasks) -> receipts -> driver -> card
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline import dump, patch_dataset, storage
from pipeline.config import with_absolute
from pipeline.flow import map_blocks, stopped_by_signals
from pipeline.formats import Reader
from pipeline.ground_truth import GroundTruth, TruthRef, open_ground_truth, paired
from pipeline.identity import digest, image_versions, unchanged
from pipeline.lease import Lease
from pipeline.ledger import Ledger, check_reached
from pipeline.outputs import check_apart, check_kept
from pipeline.progress import Progress
from pipeline.records import InputError, fault, printable
from pipeline.stores import AwayError
from pipeline.training_patches import (
    MIN_IOU,
    Cut,
    Cutter,
    Item,
    PrepareConfig,
    cut_frame,
    generator,
    matched,
    read_predictions,
)
from pipeline.work import Receipt


@dataclass(frozen=True)
class Prepared:
    """The outcome of a run."""

    output: str
    frames: int
    changed: int
    """Of these, how many were cut before from something else, or shared a shard with one."""
    removed: int
    """Frames whose patches were taken out: they are in the ground truth, or in what was drawn, no more."""
    done_before: int
    aside: dict[str, str]
    unpaired: str
    """One line on images that have ground truth or predictions only; empty where all have both."""
    predictions: int
    """Of the frames cut now, as are those `unmatched`: without an object of their class that they overlap by half."""
    unmatched: int
    card: dict[str, Any]
    wall_s: float

    def __str__(self) -> str:
        counts = self.card["patches"]
        rows = sum(counts.values())
        again = f" ({self.changed} of them again)" if self.changed else ""
        lines = [
            f"frames       {self.frames} cut now{again}, {self.done_before} before, {len(self.aside)} set aside",
            f"instances    {self.card['instances']}",
            f"patches      {rows} ({', '.join(f'{n} {split}' for split, n in counts.items())}),"
            f" {self.card['bytes'] / 1e3 / max(rows, 1):.2f} MB per 1000 patches",
        ]
        if not rows and not self.aside:
            why = "every object is a crowd (iscrowd), or has no prediction of its class that overlaps it by half"
            lines.append(f"nothing cut  {why}")
        if self.removed:
            lines.append(f"removed      {self.removed} frames of an earlier run")
        if self.unpaired:
            lines.append(f"unpaired     {self.unpaired}")
        if self.unmatched:
            why = "overlap no object of their class by half, and were left out"
            lines.append(f"unmatched    {self.unmatched} of {self.predictions} predictions {why}")
        lines += [f"set aside    {printable(key)}: {error}" for key, error in list(self.aside.items())[:5]]
        if len(self.aside) > 5:
            lines.append(f"set aside    ... {len(self.aside) - 5} more, all in {self.output}/_ledger/quarantine.csv")
        return "\n".join([*lines, f"output       {self.output}  ({self.wall_s:.1f} s)"])


def prepare(config: PrepareConfig, log: Callable[[str], None] = print) -> Prepared:
    """Cut a patch data set; raises InputError where nothing can be done at all.

    Frames with a fault are set aside in `_ledger/quarantine.csv`. The same input and seed give the same rows whatever
    the number of workers; the card `card.json` is written last. Frames whose image, annotations or predictions have
    changed since an earlier run on the output are cut again, those that are gone taken out.
    """
    started = time.monotonic()
    check_kept(config.output)
    config = with_absolute(config, "ground_truth", "images", "output", "predictions", "image_list")
    if config.predictions is not None:
        check_apart(config.output, config.predictions)
    storage.check_folder(config.images)
    truth = open_ground_truth(config.ground_truth, config.images)
    listing = truth.list_frames()
    items, reader, unpaired = _items(config, listing.refs)
    cutter = Cutter(config, truth, reader)
    with (
        stopped_by_signals(),
        Lease(config.output) as lease,
        closing(Ledger(config.output, lease.confirm)) as ledger,
    ):
        ledger.open(_fingerprint(config))
        if config.max_instances is not None:
            items = _draw(items[: config.limit], cutter, config.max_instances)
        listed = {item.truth.key for item in items}
        ledger.forget_others(listed)
        # What was cut before is part of the set, also beyond a limit that came later.
        count = len(items) if config.limit is None else config.limit
        items = [*items[:count], *(item for item in items[count:] if item.truth.key in ledger.parts)]
        items = _identified(items, config, truth)
        changed, removed = _stale(items, listed, ledger)
        ledger.withdraw(changed, removed)
        # The same frames get the same shards again, perhaps fewer of them; also those of a run that was killed.
        _sweep(config.output, {*ledger.parts.values()})
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
        lease.confirm()
        shards = _sweep(config.output, {*ledger.parts.values()})
        card = _card(config, listing.categories, shards)
        storage.put(storage.join(config.output, patch_dataset.CARD), json.dumps(card, indent=1).encode())
        return Prepared(
            output=config.output,
            frames=progress.frames,
            changed=len(changed),
            removed=len(removed),
            done_before=len(items) - left,
            aside=dict(ledger.aside),
            unpaired=unpaired,
            predictions=progress.counts["predictions"],
            unmatched=progress.counts["unmatched"],
            card=card,
            wall_s=time.monotonic() - started,
        )


def _items(config: PrepareConfig, refs: Sequence[TruthRef]) -> tuple[list[Item], Reader | None, str]:
    """The frames to cut, the reader of their predictions, and a line on images that lack one of the two."""
    if config.predictions is None:
        return [Item(ref, None, _donors(config, ref, refs)) for ref in refs], None, ""
    form = dump.input_format(config.predictions, config.format)
    image_list = config.image_list
    if form == "coco" and image_list is None and config.image_pattern is None and config.ground_truth.endswith(".json"):
        image_list = config.ground_truth
    # Predictions of a category that the ground truth lacks have no target, and are no reason to leave the others out.
    reader = dump.reader(config.predictions, config.images, form, image_list, config.image_pattern, any_category=True)
    refs, found = paired(refs, {config.predictions: reader.list_frames({})})
    predicted = found[config.predictions]
    items = [Item(ref, predicted.pop(ref.key), _donors(config, ref, refs)) for ref in refs if ref.key in predicted]
    if not items:
        raise InputError(f"{config.predictions}: no image in common with {config.ground_truth}")
    missing = len(refs) - len(items)
    unpaired = f"{missing} images without predictions, {len(predicted)} without ground truth"
    return items, reader, unpaired if missing or predicted else ""


def _donors(config: PrepareConfig, ref: TruthRef, refs: Sequence[TruthRef]) -> tuple[TruthRef | None, ...]:
    rng = generator(config.seed, ref.key, "donors")
    return tuple(
        refs[rng.integers(len(refs))] if rng.random() < config.composite else None for _ in range(config.visits)
    )


def _identified(items: Sequence[Item], config: PrepareConfig, truth: GroundTruth) -> list[Item]:
    """The frames with what each is cut from: annotations and images, also of what is laid over it, and predictions."""
    used = {ref.key: ref for item in items for ref in (item.truth, *item.donors) if ref is not None}
    versions = image_versions(config.images, (ref.file_name for ref in used.values()))
    annotated = truth.identities([*used.values()])
    seen = {key: digest(own, versions.get(ref.file_name, "")) for (key, ref), own in zip(used.items(), annotated)}

    def identity(item: Item) -> str:
        own, plus, others = (item.predicted.identity.partition("@")[0] if item.predicted else "").partition("+")
        # In a json instances are named by their places, and by these names chosen and drawn.
        places = str(item.predicted and item.predicted.positions)
        donors = (seen[ref.key] if ref is not None else "" for ref in item.donors)
        made = digest(seen[item.truth.key], own, places, str(item.chosen and sorted(item.chosen)), *donors)
        return f"{made}{plus}{others}"

    return [replace(item, identity=identity(item)) for item in items]


def _stale(items: Sequence[Item], listed: Container[str], ledger: Ledger) -> tuple[list[str], list[str]]:
    """Finished frames that must be cut again, and those that are gone. Frames share shards, which go as a whole."""
    now = {item.truth.key: item.identity for item in items}

    def differs(key: str) -> bool:
        return key not in listed or not unchanged(ledger.identities[key], now[key])

    parts = {part for key, part in ledger.parts.items() if part and differs(key)}
    stale = [key for key, part in ledger.parts.items() if part in parts or differs(key)]
    return [key for key in stale if key in listed], [key for key in stale if key not in listed]


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
            pairs = matched(read_predictions(item, cutter, frame), frame)
            found.append((item.truth.key, [name for name, _, _ in pairs]))
        except AwayError:
            raise
        except InputError:  # cutting will meet it again, and set the frame aside
            continue
    return found


def _cut_block(items: Sequence[Item], cutter: Cutter) -> list[Receipt]:
    """Cut some frames and write their patches, in shards that the frames' names give their own."""
    check_reached(cutter.config.output)
    rows: dict[str, list[Cut]] = {split: [] for split in patch_dataset.SPLITS}
    receipts, good = [], []
    name = patch_dataset.shard_name([item.truth.key for item in items])
    for item in items:
        started, cut, error = time.perf_counter(), Cut(), ""
        try:
            cut = cut_frame(item, cutter)
        except AwayError:
            raise
        except Exception as problem:  # one frame must never stop the others
            error = fault(item.truth.file_name, problem)
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
                identity="" if error else cut.identity,
                counts={"predictions": cut.predictions, "unmatched": cut.unmatched},
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
    """Delete the shards that no finished frame speaks of, left by a killed run or cut anew; returns the others."""
    shards = {path: name for path in storage.find(output, (".parquet",)) if (name := patch_dataset.name_in(path))}
    unused = [path for path, name in shards.items() if name not in names]
    storage.at_once(lambda path: storage.remove(storage.join(output, path)), unused)
    return [path for path, name in shards.items() if name in names]


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
