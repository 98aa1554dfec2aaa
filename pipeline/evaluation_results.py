"""The numbers of an evaluation: one table for people, the same as json for programs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation import COARSE, REFINED, SHIFT_EDGES, Outcome, oracle_name
from pipeline.formats.cityscapes import CITYSCAPES_CLASSES
from pipeline.metrics.average_precision import AveragePrecision, average_precision
from pipeline.metrics.boundary import WORSE_BY
from pipeline.metrics.cityscapes_ap import EVALUATED, CityscapesAP, cityscapes_ap
from pipeline.metrics.oracle import DISTANCES_PX
from pipeline.records import heading, printable

Numbers = dict[str, float]
"""Measure -> value; NaN where there is nothing to measure."""


SHARES = ("changed instances", "changed pixels")
"""What of the changes (`ClassChanges.numbers`) is a share, which people are shown in percent."""

CHANGES_UNITS = (
    "Changed pixels as a share of the coarse masks'; contours in pixels per instance; gradients of the image along them"
    " in grey levels per pixel."
)

NO_VERDICTS = (
    "refined: the dump carries no status, reason or confidence, so that no instance can be told as rejected or least"
    " certain; a Cityscapes folder never does, COCO and Parquet output of refine does"
)


UNCOUNTED = {"coco": "COCO counts 100 of a class", "lvis": "LVIS counts 300"}
"""What is beyond the best of a frame, unless told otherwise."""


@dataclass(frozen=True)
class Results:
    """Everything that an evaluation says, in numbers."""

    kind: str | None
    """Of the ground truth: coco, lvis, cityscapes, or None without any."""
    frames: int
    overall: dict[str, Numbers]
    """By dump: coarse, refined, and the oracle's."""
    per_class: dict[str, dict[str, Numbers]]
    """By class name and dump."""
    changes: dict[str, Numbers]
    """By class name, `all` last; empty for a single dump."""
    shifts: list[int]
    """Instances by the change of their IoU (SHIFT_EDGES); empty without two dumps and a ground truth."""
    notes: list[str]
    """What a reader must know to trust the numbers: images missing, set aside, categories unknown."""
    aside: dict[str, str]
    wall_s: float

    @property
    def worse(self) -> float:
        """Share of the instances whose IoU fell."""
        return self.shifts_share(below=True)

    @property
    def better(self) -> float:
        """Share of the instances whose IoU rose."""
        return self.shifts_share(below=False)

    def shifts_share(self, below: bool) -> float:
        """Share of the instances below, or above, the bin around no change."""
        middle = next(i for i, edge in enumerate(SHIFT_EDGES) if edge > 0) - 1
        part = self.shifts[:middle] if below else self.shifts[middle + 1 :]
        return sum(part) / sum(self.shifts) if sum(self.shifts) else math.nan

    def as_json(self) -> dict[str, Any]:
        """Plain values, None for NaN."""
        return _plain(
            {
                "ground_truth": self.kind,
                "frames": self.frames,
                "overall": self.overall,
                "per_class": self.per_class,
                "changes": self.changes,
                "iou_change": {"edges": list(SHIFT_EDGES), "instances": self.shifts} if self.shifts else None,
                "worse": self.worse if self.shifts else None,
                "better": self.better if self.shifts else None,
                "notes": self.notes,
                "set_aside": self.aside,
                "wall_s": self.wall_s,
            }
        )


def results(outcome: Outcome) -> Results:
    """Put what was found into numbers."""
    tally, listing = outcome.tally, outcome.listing
    names = _distinct_names(outcome.names)
    overall: dict[str, Numbers] = {}
    per_class: dict[str, dict[str, Numbers]] = {}
    notes = [f"{name}: {line}" for name, line in outcome.unpaired.items()]
    bounds = [oracle_name(distance) for distance in DISTANCES_PX]
    for name in (*outcome.dumps, *bounds):
        if ("AP", name) not in tally.records:
            continue
        unknown = _fill(outcome, name, overall.setdefault(name, {}), per_class, names)
        if unknown and name in outcome.dumps:
            notes.append(f"{name}: {unknown} predictions of categories that the ground truth lacks were left out")
    if outcome.kind in ("coco", "lvis"):
        notes += [
            f"{name}: {tally.uncounted[name]} predictions count neither as right nor as wrong, being beyond the best of"
            f" their frame; where frames hold more objects, raise --max-detections ({UNCOUNTED[outcome.kind]})"
            for name in outcome.dumps
            if tally.uncounted[name]
        ]
    changed = {}
    if ("changes", REFINED) in tally.records:
        record = tally.records["changes", REFINED]
        changed = {names.get(c, str(c)): one.numbers() for c, one in record.categories.items()}
        changed["all"] = record.total().numbers()
    if tally.compared and not tally.judged:
        notes.append(NO_VERDICTS)
    if tally.aside:
        notes.append(f"{len(tally.aside)} images could not be measured and count in no number")
    compared = len(outcome.dumps) == 2 and listing is not None
    return Results(
        outcome.kind,
        tally.frames,
        overall,
        per_class,
        changed,
        tally.shifts.tolist() if compared else [],
        notes,
        dict(sorted(tally.aside.items())),
        outcome.wall_s,
    )


def _distinct_names(categories: Mapping[int, str]) -> dict[int, str]:
    """The categories' names by id, those that several have with the id."""
    uses = Counter(categories.values())
    return {one: f"{name} ({one})" if uses[name] > 1 else name for one, name in categories.items()}


def _fill(
    outcome: Outcome, name: str, overall: Numbers, per_class: dict[str, dict[str, Numbers]], names: dict[int, str]
) -> int:
    """Add the numbers of one dump; returns its predictions of unknown categories."""
    records, unknown = outcome.tally.records, 0
    for measure in ("AP", "boundary AP"):
        prefix = "boundary " if measure == "boundary AP" else ""
        if outcome.kind == "cityscapes":
            table: CityscapesAP | AveragePrecision = cityscapes_ap(records[measure, name])
            unknown = table.unknown
            classes = {CITYSCAPES_CLASSES[label]: table.numbers(label) for label in EVALUATED}
        else:
            table = average_precision(records[measure, name], names)
            unknown = sum(table.unknown.values())
            classes = {names[one]: table.numbers((one,)) for one in table.categories}
            if outcome.kind == "lvis" and outcome.listing is not None:
                overall |= _prefixed(prefix, table.frequency_numbers(outcome.listing.frequencies))
        overall |= _prefixed(prefix, table.numbers())
        for label, numbers in classes.items():
            per_class.setdefault(label, {}).setdefault(name, {}).update(_prefixed(prefix, numbers))
    if ("AF", name) in records:
        scores = records["AF", name]
        overall["AF"] = scores.mean()
        for category, score in scores.per_category().items():
            if category in names:
                per_class.setdefault(names[category], {}).setdefault(name, {})["AF"] = score
    return unknown


def _prefixed(prefix: str, numbers: Numbers) -> Numbers:
    return {f"{prefix}{name}": value for name, value in numbers.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text(found: Results) -> str:
    """The table that a person reads."""
    lines = [f"frames       {found.frames}"]
    width = 2 + max(20, *(len(heading(label)) for label in [*found.per_class, *found.changes, ""]))
    dumps = [name for name in (COARSE, REFINED) if name in found.overall]
    if dumps:
        lines += ["", *_block("", dumps, {"": found.overall}, width)]
        for measure in ("AP", "boundary AP", "AF"):
            rows = {
                label: {name: {measure: numbers.get(measure, math.nan)} for name, numbers in by_dump.items()}
                for label, by_dump in found.per_class.items()
            }
            known = {k: v for k, v in rows.items() if any(not math.isnan(one[measure]) for one in v.values())}
            lines += ["", *_block(f"{measure} per class", dumps, known, width)]
    bounds = {name: numbers for name, numbers in found.overall.items() if name not in dumps}
    if bounds:
        lines += ["", f"{'if pixels near the boundary were right':<38}{'AP':>8}{'bnd AP':>8}"]
        for name, numbers in {COARSE: found.overall[COARSE], **bounds}.items():
            lines.append(f"{name:<38}{_cell(numbers['AP'])}{_cell(numbers['boundary AP'])}")
    if found.changes:
        lines += ["", f"{'what changed':<{width}}" + "".join(f"{name:>19}" for name in found.changes["all"])]
        for label, numbers in found.changes.items():
            cells = "".join(_change(name, value) for name, value in numbers.items())
            lines.append(f"{heading(label):<{width}}{cells}")
        lines.append(CHANGES_UNITS)
    if sum(found.shifts):
        shares = f"{found.better:.1%} better, {found.worse:.1%} worse"
        lines += ["", f"IoU of instances    {shares} (by more than {WORSE_BY})"]
    lines += [f"note         {note}" for note in found.notes]
    lines += [f"set aside    {printable(key)}: {error}" for key, error in list(found.aside.items())[:5]]
    if len(found.aside) > 5:
        lines.append(f"set aside    ... {len(found.aside) - 5} more")
    return "\n".join(lines)


def _block(title: str, dumps: list[str], rows: dict[str, dict[str, Numbers]], width: int) -> list[str]:
    """Lines of `measure coarse refined delta`, or `class coarse refined delta` where each row has one measure."""
    columns = [*dumps, "delta"] if len(dumps) > 1 else dumps
    lines = [f"{title:<{width}}" + "".join(f"{name:>10}" for name in columns)]
    for label, by_dump in rows.items():
        for measure in by_dump[dumps[0]] if dumps[0] in by_dump else next(iter(by_dump.values())):
            values = [by_dump.get(name, {}).get(measure, math.nan) for name in dumps]
            cells = "".join(_cell(value, 10) for value in values)
            delta = f"{values[1] - values[0]:>+10.4f}" if len(values) > 1 and not math.isnan(sum(values)) else ""
            lines.append(f"{heading(label) or measure:<{width}}{cells}{delta}")
    return lines


def _change(name: str, value: float) -> str:
    if math.isnan(value):
        return f"{'-':>19}"
    return f"{value:>19.1%}" if name in SHARES else f"{value:>19.0f}" if "gradient" not in name else f"{value:>19.2f}"


def _cell(value: float, width: int = 8) -> str:
    return f"{'-':>{width}}" if math.isnan(value) else f"{value:>{width}.4f}"
