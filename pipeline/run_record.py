"""What is kept of every run beside its output: `_ledger/runs/<time of its start>-<run id>.json`."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.run_log import one_line

PACKAGES = ("bpr-ray", "ray", "torch", "openvino", "numpy", "opencv-python-headless", "pyarrow")


@contextmanager
def recorded(ledger: Ledger, facts: Mapping[str, Any], progress: Progress, place: Mapping[str, Any]) -> Iterator[None]:
    """Keep the record of a run from its start to its end, whatever ends it.

    `facts` are known at the start: `run_id`, `started` (Unix time), counts of the dump's frames, the settings. `place`
    is where it ran, as far as the flow has told it by the end. `outcome` is `running` until it is `finished`,
    `interrupted` or, for the `reason` given, `failed`; a run that was killed seems to be running for ever.
    """
    start = datetime.fromtimestamp(facts["started"], UTC)
    name = f"runs/{start:%Y%m%dT%H%M%S.%f}-{facts['run_id']}.json"
    known = {**facts, "versions": _versions()}
    ledger.note(name, {**known, "outcome": "running"})
    outcome, reason = "finished", ""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        outcome = "interrupted"
        raise
    except BaseException as error:
        outcome, reason = "failed", one_line(error)
        raise
    finally:
        end = {"outcome": outcome, "reason": reason, "ended": time.time(), **_results(progress), "place": dict(place)}
        # Where the store is what failed, its own error is the one to be told.
        with suppress(*() if outcome == "finished" else (Exception,)):
            ledger.note(name, {**known, **end})


def _results(progress: Progress) -> dict[str, Any]:
    """What a run has made of its frames, and what that took, summed over all workers."""
    counts, places = progress.counts, progress.counts["batch_places"]
    return {
        "frames_refined": progress.frames,
        "frames_set_aside": progress.quarantined,
        "instances": progress.instances,
        "instances_refined": progress.refined,
        "reasons": dict(progress.reasons),
        "patches": progress.patches,
        "patches_per_s": progress.patches_per_s,
        "seconds": dict(progress.seconds),
        "bytes_read": counts["bytes_read"],
        "bytes_written": counts["bytes_written"],
        "batch_fill": progress.patches / places if places else None,
        "arithmetic": sorted(progress.arithmetic),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
