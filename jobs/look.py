"""Look at a patch data set as a contact sheet of random patches: `python jobs/look.py --data patches`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from pipeline.config import parse
from pipeline.contact_sheet import contact_sheet
from pipeline.records import InputError
from pipeline.redaction import redacted


@dataclass(frozen=True, kw_only=True)
class LookConfig:
    """Draw random patches of a data set: the image, the coarse contour (red), the target's contour (green)."""

    data: str
    """The folder that jobs/prepare.py has written; any fsspec URL."""
    output: str = "patches.png"
    """The picture to write."""
    split: Literal["train", "val"] = "train"
    count: int = 40
    """How many patches."""
    seed: int = 0


def main() -> int:
    try:
        config = parse(LookConfig, sys.argv[1:])
        contact_sheet(config.data, config.output, config.split, config.count, config.seed)
    except (InputError, OSError) as error:
        print(redacted(f"error: {error}"), file=sys.stderr)
        return 1
    print(f"wrote {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
