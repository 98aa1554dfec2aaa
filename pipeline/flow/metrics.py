"""The counts of a run as metrics of Ray, which every node serves to Prometheus."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.redaction import redacted
from pipeline.work import Receipt

COUNTERS = {
    "bpr_frames": "Frames refined.",
    "bpr_quarantined": "Frames set aside.",
    "bpr_instances": "Instances of refined frames.",
    "bpr_instances_refined": "Instances with a refined mask.",
    "bpr_patches": "Patches of refined frames.",
    "bpr_batch_places": "Patches that the batches of the network had room for.",
    "bpr_stage_seconds": "Seconds of workers, by stage.",
    "bpr_network_wait_seconds": "Seconds that the processes of the network waited for patches.",
    "bpr_bytes": "Bytes read from and written to storage, by direction.",
}
"""Served as `ray_<name>_total`. Each has the labels `run_id` and `output`."""

FRAMES_LEFT = "bpr_frames_left"
"""Frames that the run has yet to do; a gauge, served as `ray_<name>`."""

_LABELS = {"bpr_stage_seconds": "stage", "bpr_bytes": "direction"}


class Metrics:
    """Counts receipts in the driver, where each frame comes once: work that Ray repeats is not counted twice."""

    def __init__(self, run_id: str, output: str, frames: int) -> None:
        """`frames` are those that the run has to do."""
        self._labels = {"run_id": run_id, "output": redacted(output)}
        self._left = frames
        self._waiting: Counter[tuple[str, str]] = Counter()
        self._metrics: dict[str, Any] = {}

    def update(self, receipts: Sequence[Receipt]) -> None:
        """Count them now, or once this process has joined a cluster; a run that never does has no metrics."""
        for receipt in receipts:
            self._left -= 1
            for name, label, value in _counted(receipt):
                self._waiting[name, label] += value
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        if not self._metrics:
            self._metrics = self._made()
        for (name, label), value in self._waiting.items():
            labels = {_LABELS[name]: label} if label else {}
            self._metrics[name].inc(value, {**self._labels, **labels})
        self._metrics[FRAMES_LEFT].set(self._left, self._labels)
        self._waiting.clear()

    def _made(self) -> dict[str, Any]:
        from ray.util.metrics import Counter, Gauge

        keys = tuple(self._labels)
        made: dict[str, Any] = {
            name: Counter(name, what, (*keys, *([_LABELS[name]] if name in _LABELS else [])))
            for name, what in COUNTERS.items()
        }
        return {**made, FRAMES_LEFT: Gauge(FRAMES_LEFT, "Frames that the run has yet to do.", keys)}


def _counted(receipt: Receipt) -> Iterator[tuple[str, str, float]]:
    """(metric, label, value above 0) of everything that a receipt tells."""
    found = [
        ("bpr_frames", "", not receipt.error),
        ("bpr_quarantined", "", bool(receipt.error)),
        ("bpr_instances", "", receipt.instances),
        ("bpr_instances_refined", "", receipt.refined),
        ("bpr_patches", "", receipt.patches),
        ("bpr_batch_places", "", receipt.counts.get("batch_places", 0)),
        ("bpr_bytes", "read", receipt.counts.get("bytes_read", 0)),
        ("bpr_bytes", "written", receipt.counts.get("bytes_written", 0)),
    ]
    for stage, seconds in receipt.seconds.items():
        waited = stage == "wait"
        found.append(("bpr_network_wait_seconds" if waited else "bpr_stage_seconds", "" if waited else stage, seconds))
    return ((name, label, float(value)) for name, label, value in found if value > 0)
