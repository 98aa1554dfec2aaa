"""Refine a dump of coarse instance masks: `python jobs/refine.py --predictions P --images I --output O`."""

from __future__ import annotations

import signal
import sys
from functools import partial

from jobs import UNREAD, unread
from model.bundled import CheckpointError
from pipeline.config import RefineConfig, parse
from pipeline.records import InputError
from pipeline.redaction import redacted
from pipeline.run import run

INTERRUPTED = "interrupted; the same command goes on from here"


def main() -> int:
    """Exit status: 0 when frames were refined or all was done; 1 when nothing could be, or on any fault if strict.

    130 after Ctrl-C, 143 after SIGTERM, 141 where nobody reads its output any more; 2 where a flag is wrong.
    """
    as_text = True
    try:
        config = parse(RefineConfig, sys.argv[1:])
        as_text = config.log_format == "text"
        summary = run(config, partial(print, flush=True))
        if as_text:
            print(summary, flush=True)
    except (InputError, CheckpointError, OSError) as error:
        if unread(error):
            return UNREAD
        if as_text:
            print(redacted(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if as_text:
            print(INTERRUPTED, file=sys.stderr)
        return 130
    except SystemExit as end:  # of SIGTERM; wrong flags and --help end so, too
        if as_text and end.code == 128 + signal.SIGTERM:
            print(INTERRUPTED, file=sys.stderr)
        raise
    nothing_done = summary.frames + summary.done_before == 0
    return 1 if nothing_done or (config.strict and summary.quarantined) else 0


if __name__ == "__main__":
    sys.exit(main())
