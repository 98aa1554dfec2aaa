"""Look at a patch data set as a contact sheet of random patches: `python jobs/look.py --data patches`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from jobs import ended
from pipeline.bounds import check_bounds
from pipeline.config import parse
from pipeline.contact_sheet import contact_sheet


@dataclass(frozen=True, kw_only=True)
class LookConfig:
    """Draw random patches of a data set: the image, the coarse contour (yellow), the target's contour (pink)."""

    data: str
    """The folder that jobs/prepare.py has written; any fsspec URL."""
    output: str = "patches.png"
    """The picture to write."""
    split: Literal["train", "val"] = "train"
    """Whether patches for training are drawn, or those for validation."""
    count: int = 40
    """How many patches."""
    seed: int = 0
    """Which patches are drawn: the same seed draws the same ones."""

    def __post_init__(self) -> None:
        check_bounds(self, "count", 1)
        check_bounds(self, "seed", 0)


def main() -> int:
    """Exit status: 0 when the picture has been written, 1 otherwise; 130 after Ctrl-C."""
    return ended(_look)


def _look() -> int:
    config = parse(LookConfig, sys.argv[1:])
    contact_sheet(config.data, config.output, config.split, config.count, config.seed)
    print(f"wrote {config.output}; each patch: image, coarse contour (yellow), target's contour (pink)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
