"""Refine five photographs and show them before and after: `python jobs/demo.py`, no data or flags needed."""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import dataclass

import tyro

from jobs import ended
from pipeline import demo_dump
from pipeline.config import RefineConfig
from pipeline.report import write_picture, write_report
from pipeline.run import run

TITLE = "Boundary patch refinement: before and after"


@dataclass(frozen=True)
class DemoConfig:
    """Refine five photographs and write a page that shows them before and after."""

    output: str = "demo"
    """Folder for the photographs, the coarse and the refined masks, and report.html."""
    checkpoint: str = RefineConfig.checkpoint
    """Bundled weights by name, our .safetensors, or the reference's .pth."""
    local: bool = False
    """Run in this one process, without Ray."""
    picture: str | None = None
    """Also write the largest changes in the first three photographs as one PNG, as in the README."""


def main() -> int:
    """Exit status: 0 when all five were refined, else 1; 130 after Ctrl-C."""
    return ended(_demo)


def _demo() -> int:
    config = tyro.cli(DemoConfig)
    root = config.output.rstrip("/")
    demo_dump.write_dump(root)
    summary = run(
        RefineConfig(
            predictions=f"{root}/{demo_dump.COARSE}",
            images=f"{root}/{demo_dump.IMAGES}",
            output=f"{root}/{demo_dump.REFINED}",
            checkpoint=config.checkpoint,
            local=config.local,
        )
    )
    print(summary)
    if not summary.frames:
        return 1
    facts = demo_dump.facts(summary, os.path.basename(config.checkpoint))
    write_report(f"{root}/report.html", demo_dump.report_frames(root), TITLE, facts)
    if config.picture:
        write_picture(config.picture, itertools.islice(demo_dump.report_frames(root), 3))
    print(f"report       {root}/report.html")
    return 1 if summary.quarantined else 0


if __name__ == "__main__":
    sys.exit(main())
