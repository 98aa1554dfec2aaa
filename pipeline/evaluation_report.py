"""The page of an evaluation: its numbers as charts, and the instances that a person wants to see first."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping

from pipeline import storage
from pipeline.evaluation import COARSE, REFINED, SHIFT_EDGES, EvaluateConfig, Notable, Outcome, read_frames
from pipeline.evaluation_results import CHANGES_UNITS, SHARES, Numbers, Results
from pipeline.ground_truth import TrueFrame, open_ground_truth
from pipeline.guard import REASONS
from pipeline.images import decode_image
from pipeline.ledger import read_receipts
from pipeline.metrics.boundary import WORSE_BY
from pipeline.metrics.overlap import best_truths
from pipeline.records import Instance
from pipeline.report import Bar, BarGroup, Card, Delta, Gallery, Histogram, Report, Table, make_card
from pipeline.report.figures import SCORE_DIGITS

EXPLANATIONS = {
    "largest gains": "Instances whose IoU with the ground truth rose most.",
    "largest losses": "Instances whose IoU with the ground truth fell most.",
    "largest changes": "Instances of which the largest share changed.",
    "least certain": "Refined instances about whose boundary the network was least certain: where to look first.",
    "rejected": "Instances that the guard has left as they were.",
}

HEADLINE = ("AP", "AP50", "boundary AP", "AF")

SIZES = {"AP": "all", "APs": "small", "APm": "medium", "APl": "large"}

QUARANTINE_ROWS = 200


def report(config: EvaluateConfig, outcome: Outcome, found: Results) -> Report:
    """The page's content. Frames of the galleries are read again, here; InputError where one has vanished."""
    before, after = found.overall.get(COARSE, {}), found.overall.get(REFINED, {})
    facts = {"images": f"{found.frames:,}"}
    if found.shifts:
        facts |= {"better": f"{found.better:.1%}", "worse": f"{found.worse:.1%}"}
    if found.changes:
        facts["instances"] = f"{found.changes['all']['instances']:,.0f}"
    headline = []
    for name in (name for name in HEADLINE if name in before or name in after):
        old, new = _percent(before.get(name)), _percent(after.get(name))
        headline.append(Delta(name, old, new) if new is not None else Delta(name, None, old))
    tables, aside = _tables(found), {}
    if config.refined:
        run, aside = _run(config.refined)
        tables = [*run, *tables]
    if aside := {**aside, **found.aside}:
        tables.append(_quarantine(aside))
    return Report(
        title="Boundary patch refinement: evaluation",
        facts=facts,
        lead=_lead(found, before, after),
        headline=headline,
        bars=_bars(found),
        histograms=_histograms(found),
        galleries=_galleries(outcome, config) if len(outcome.dumps) == 2 else (),
        tables=tables,
    )


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _lead(found: Results, before: Numbers, after: Numbers) -> str:
    if before and after:
        gain = 100 * (after["boundary AP"] - before["boundary AP"])
        if math.isnan(gain):
            return ""
        if round(abs(gain), SCORE_DIGITS) == 0:
            return "Refinement left boundary AP as it was."
        return f"Refinement {'raised' if gain > 0 else 'lowered'} boundary AP by {abs(gain):.{SCORE_DIGITS}f} points."
    if found.changes:
        changed = found.changes["all"]
        edges = changed["gradient after"] / changed["gradient before"] if changed["gradient before"] else math.nan
        stronger = f"; image edges along the contours are {edges:.2f} times as strong" if not math.isnan(edges) else ""
        return f"Refinement changed {changed['changed pixels']:.1%} of the masks' pixels{stronger}."
    return ""


def _bars(found: Results) -> list[BarGroup]:
    groups = []
    dumps = found.overall
    if COARSE in dumps or REFINED in dumps:
        before, after = dumps.get(COARSE, {}), dumps.get(REFINED, {})
        for prefix, title in (("", "AP by size"), ("boundary ", "Boundary AP by size")):
            rows = [
                Bar(size, _percent(before.get(f"{prefix}{name}")), _percent(after.get(f"{prefix}{name}")))
                for name, size in SIZES.items()
                if f"{prefix}{name}" in (before or after)
            ]
            if len(rows) > 1:
                groups.append(BarGroup(title, rows))
        for measure in ("AP", "boundary AP", "AF"):
            rows = [
                Bar(label, _value(by_dump, COARSE, measure), _value(by_dump, REFINED, measure))
                for label, by_dump in found.per_class.items()
            ]
            shown = [row for row in rows if not all(v is None or math.isnan(v) for v in (row.before, row.after))]
            groups.append(BarGroup(f"{measure[0].upper()}{measure[1:]} by class", shown))
    bounds = [name for name in dumps if name not in (COARSE, REFINED)]
    if bounds:
        for measure in ("AP", "boundary AP"):
            rows = [Bar(name, _percent(dumps[COARSE][measure]), _percent(dumps[name][measure])) for name in bounds]
            note = "What a perfect refiner of that reach would get on the coarse dump."
            title = f"{measure[0].upper()}{measure[1:]}, upper bound"
            groups.append(BarGroup(title, rows, bound=True, note=note))
    return groups


def _value(by_dump: Mapping[str, Numbers], name: str, measure: str) -> float | None:
    return _percent(by_dump.get(name, {}).get(measure))


def _histograms(found: Results) -> list[Histogram]:
    if not sum(found.shifts):
        return []
    note = (
        "Instances whose coarse mask overlaps a truth of its class by at least one half. Bins are drawn equally wide,"
        f" whatever they span. Green: IoU rose; red: it fell; blue: it changed by at most {WORSE_BY}."
    )
    return [Histogram("Change in IoU", SHIFT_EDGES, found.shifts, note=note)]


def _tables(found: Results) -> list[Table]:
    tables = []
    if found.changes:
        names = list(found.changes["all"])
        columns = ["class", *(f"{name}, %" if name in SHARES else name for name in names)]
        rows = [
            [label, *(_percent(numbers[name]) if name in SHARES else numbers[name] for name in names)]
            for label, numbers in found.changes.items()
        ]
        digits = [0, *(1 if name in SHARES else 0 if "contour" in name else 2 for name in names)]
        tables.append(Table("What changed", columns, rows, digits, CHANGES_UNITS))
    if found.notes:
        tables.append(Table("Notes", ["note"], [[note] for note in found.notes]))
    return tables


def _run(refined: str) -> tuple[list[Table], dict[str, str]]:
    """What the ledger beside a refined dump says of the run that made it: its tables, and the frames set aside."""
    output = refined if storage.is_dir(refined) else refined.rsplit("/", 1)[0]
    latest = {receipt["frame_id"]: receipt for receipt in read_receipts(output)}
    if not latest:
        return [], {}
    seconds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for receipt in latest.values():
        seconds.update(receipt["seconds"])
        reasons.update(receipt["reasons"])
    frames, patches = len(latest), sum(receipt["patches"] for receipt in latest.values())
    rows = [
        [stage, spent, 1e3 * spent / frames, 100 * spent / sum(seconds.values())] for stage, spent in seconds.items()
    ]
    note = f"{frames:,} frames, {patches:,} patches; seconds of all workers together."
    if refine := seconds.get("refine"):
        note += f" {patches / refine:,.0f} patches/s per network process."
    tables = [Table("Time by stage", ["stage", "seconds", "ms per frame", "share, %"], rows, [0, 2, 1, 1], note)]
    refined_count = sum(receipt.get("refined", 0) for receipt in latest.values())
    if refined_count or reasons:
        rows = [
            [status, reason, meaning, reasons[reason]]
            for status, meanings in REASONS.items()
            for reason, meaning in meanings.items()
            if reasons[reason]
        ]
        plain = refined_count - sum(reasons[reason] for reason in REASONS["refined"])
        rows = [["refined", "", "the network's mask as it came", plain], *rows] if plain > 0 else rows
        tables.append(Table("What the guard decided", ["status", "reason", "meaning", "instances"], rows))
    return tables, {key: receipt["error"] for key, receipt in latest.items() if receipt["error"]}


def _quarantine(aside: Mapping[str, str]) -> Table:
    rows = [[key, error] for key, error in list(aside.items())[:QUARANTINE_ROWS]]
    left = len(aside) - len(rows)
    return Table("Set aside", ["image", "why"], rows, note=f"and {left} more" if left else "")


def _galleries(outcome: Outcome, config: EvaluateConfig) -> list[Gallery]:
    """All galleries, every frame being read once for all of its cards."""
    truth = open_ground_truth(config.ground_truth, config.images) if config.ground_truth else None
    wanted: dict[str, list[tuple[str, int, Notable]]] = defaultdict(list)
    for name, notables in outcome.tally.notable.items():
        for place, notable in enumerate(notables):
            wanted[notable.item.key].append((name, place, notable))
    cards: dict[tuple[str, int], Card] = {}
    for ones in wanted.values():
        item = ones[0][2].item
        image = decode_image(storage.join(config.images, item.file_name))
        true = truth.read(item.truth) if truth and item.truth else None
        frames = read_frames(item, outcome.readers, true, image)
        for name, place, notable in ones:
            coarse, refined = (frames[dump].instances[notable.index] for dump in (COARSE, REFINED))
            label = f"{_category(outcome, coarse)} in {item.file_name}"
            cards[name, place] = make_card(label, notable.note, image, coarse, refined, _truth_of(coarse, true))
    return [
        Gallery(
            name[0].upper() + name[1:], text, [cards[name, i] for i in range(len(outcome.tally.notable.get(name, ())))]
        )
        for name, text in EXPLANATIONS.items()
        if name in outcome.tally.notable
    ]


def _category(outcome: Outcome, instance: Instance) -> str:
    return outcome.names.get(instance.category_id, f"category {instance.category_id}")


def _truth_of(coarse: Instance, true: TrueFrame | None) -> Instance | None:
    """The truth that the coarse mask has found, if any."""
    ((best, _),) = best_truths([coarse], true.objects if true else ())
    return None if best is None else Instance(best.instance_id, best.category_id, 1.0, best.mask, best.origin)
