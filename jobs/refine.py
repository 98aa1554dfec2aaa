"""Refine a dump of coarse instance masks: `python jobs/refine.py --predictions P --images I --output O`."""

from __future__ import annotations

import sys
from functools import partial

from model.bundled import CheckpointError
from pipeline.config import RefineConfig, parse
from pipeline.records import InputError
from pipeline.redaction import redacted
from pipeline.run import run


def main() -> int:
    """Exit status: 0 when frames were refined or all was done; 1 when nothing could be, or on any fault if strict.

    130 after Ctrl-C.
    """
    as_text = True
    try:
        config = parse(RefineConfig, sys.argv[1:])
        as_text = config.log_format == "text"
        summary = run(config, partial(print, flush=True))
    except (InputError, CheckpointError, OSError) as error:
        if as_text:
            print(redacted(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if as_text:
            print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if as_text:
        print(summary)
    nothing_done = summary.frames + summary.done_before == 0
    return 1 if nothing_done or (config.strict and summary.quarantined) else 0


if __name__ == "__main__":
    sys.exit(main())
