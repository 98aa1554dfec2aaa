"""Tries every fault and publishes what became of it: `python -m tests.faults.table [--print]`.

Rewrites the lines between `<!-- faults -->` and `<!-- /faults -->` in README.md; `--print` only prints them.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults import cluster_faults, driver_faults, storage_faults
from tests.faults.bench import REPOSITORY, Bench, bench
from tests.faults.trial import Outcome

BEGIN, END = "<!-- faults -->", "<!-- /faults -->"

FAULTS: list[tuple[Callable[..., Outcome], str]] = [
    (driver_faults.sigkill, "cityscapes"),
    (driver_faults.sigkill, "coco"),
    (driver_faults.sigkill, "parquet"),
    (driver_faults.sigterm, "parquet"),
    (driver_faults.control_c, "cityscapes"),
    (cluster_faults.job_stop, "coco"),
    (cluster_faults.sigkill_of_the_raylet, "parquet"),
    (cluster_faults.sigkill_of_the_actor, "cityscapes"),
    (partial(cluster_faults.sigkill_of_the_actor, placement="fused"), "parquet"),
    (cluster_faults.sigkill_of_tasks, "coco"),
    (partial(cluster_faults.sigkill_of_tasks, placement="fused"), "cityscapes"),
    (cluster_faults.loss_of_a_node, "parquet"),
    (cluster_faults.object_store_full, "cityscapes"),
    (storage_faults.disk_full, "cityscapes"),
    (storage_faults.torn_segment, "coco"),
    (storage_faults.torn_part, "parquet"),
    (storage_faults.torn_frame, "cityscapes"),
    (partial(storage_faults.failing_store, how="500"), "coco"),
    (partial(storage_faults.failing_store, how="503"), "cityscapes"),
    (partial(storage_faults.failing_store, how="time-out"), "parquet"),
    (storage_faults.slow_store, "coco"),
    (driver_faults.two_runs_at_once, "cityscapes"),
    (driver_faults.clock_ahead, "parquet"),
]
"""Every fault with the form of output it is tried on, as in the tests."""


def row(outcome: Outcome) -> str:
    """One line of the table."""
    runs = f", {outcome.runs} runs" if outcome.runs > 1 else ""
    cells = [
        outcome.fault,
        {"cityscapes": "Cityscapes", "coco": "COCO", "parquet": "Parquet"}[outcome.form],
        "yes" if survived(outcome) else "**no**",
        str(outcome.duplicates),
        f"{outcome.recomputed} ({outcome.rewritten})",
        f"{outcome.seconds:.0f} ({outcome.undisturbed_s:.0f}){runs}",
    ]
    return f"| {' | '.join(cells)} |"


def survived(outcome: Outcome) -> bool:
    """Whether nothing is wrong, missing, there twice, or left behind."""
    flaws = (outcome.duplicates, outcome.gaps, outcome.orphans, outcome.finished_again, outcome.leaked)
    return outcome.right and not any(flaws)


def table(on: Bench) -> tuple[str, bool]:
    """The table in Markdown, and whether every fault was survived."""
    lines = [
        f"Each on a dump of {on.frames} small frames, against an undisturbed run. *Outputs right*: the same bytes,"
        " no gap, no file or process left behind. *Recomputed*: images read again (in brackets: frames or blocks"
        " written again); none of them had been in the ledger, but where that itself was damaged.",
        "",
        "| fault | output | outputs right | duplicates | recomputed | seconds (undisturbed) |",
        "|---|---|---|---|---|---|",
    ]
    well = True
    for fault, form in FAULTS:
        try:
            outcome = fault(on, form)
        except pytest.skip.Exception as reason:
            print(f"not tried here: {reason}", file=sys.stderr)
            continue
        except AssertionError:
            traceback.print_exc()
            name = getattr(fault, "func", fault).__name__.replace("_", " ")
            lines.append(f"| {name} | {form} | **no** | | | |")
            well = False
            continue
        well = well and survived(outcome)
        lines.append(row(outcome))
        print(lines[-1] if survived(outcome) else f"{lines[-1]}  {outcome}", file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n", well


def publish(text: str, readme: Path) -> None:
    """Put the table between the markers; SystemExit where they are not in the file."""
    content = readme.read_text()
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"error: {readme}: expected the lines {BEGIN} and {END}, between which the table goes")
    readme.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the table, leave README.md as it is")
    arguments = parser.parse_args()
    readme = REPOSITORY / "README.md"
    if not arguments.print and not (BEGIN in readme.read_text() and END in readme.read_text()):
        # Said before the work, not after.
        publish("", readme)
    with bench() as on:
        text, well = table(on)
    print(text)
    if not arguments.print:
        publish(text, readme)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
