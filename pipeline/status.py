"""How far a run is, or how it ended, told from its output's ledger alone."""

from __future__ import annotations

import json
import math
import posixpath
import time
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import tyro

from pipeline import dump, storage
from pipeline.guard import REASONS
from pipeline.ledger import read_receipts
from pipeline.progress import STAGES
from pipeline.records import InputError
from pipeline.redaction import HIDDEN

RECENT_SECONDS = 300.0
"""How far back the recent rate looks."""

PAUSE_SECONDS = 600.0
"""A longer time without a frame lies between two runs, and does not count for the rate."""

BLOCK_SECONDS = 0.1
"""The frames of one block leave the network within less than this."""

ALIVE_SECONDS = 120.0
"""A run whose last sign is older than this has ended, or hangs."""

SHOWN_ERRORS = 5


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Say how far a run is, from its output alone; it may be running, finished or dead, here or elsewhere."""

    output: Annotated[str, tyro.conf.Positional]
    """The output folder of the run; any fsspec URL."""
    left: bool = False
    """List the dump again, as the run did, to tell how many frames are left and for how long."""
    json: bool = False
    """Print json for programs."""


@dataclass(frozen=True)
class Status:
    """What became of a dump's frames so far, over all runs on one output."""

    output: str
    done: int
    set_aside: int
    left: int | None
    """Frames of the dump that are neither; None where it was not listed."""
    instances: int
    patches: int
    refined: int
    """Instances with a refined mask."""
    reasons: dict[str, int]
    """Number of instances that have a reason (`guard.REASONS`), by reason."""
    frames_per_s: float | None
    """While frames were coming, over all runs; None for a single block."""
    recent_frames_per_s: float | None
    """The same over the last RECENT_SECONDS."""
    seconds_per_frame: dict[str, float]
    """Mean seconds of a worker for one frame, by stage."""
    last_errors: list[tuple[str, str]]
    """(frame id, reason) of the frames set aside last, the newest first."""
    last_sign_s: float | None
    """Seconds since the ledger was last written or the lease renewed; None where neither is there."""
    alive: bool
    """Whether that is short enough for a run to be going on."""
    eta_s: float | None
    """Seconds until nothing is left, of a run that is alive."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        left = "" if self.left is None else f", {self.left} left"
        lines = [
            f"state        {self._state()}",
            f"frames       {self.done} done, {self.set_aside} set aside{left}",
            f"instances    {self.instances}, {self._by_status()}",
            f"patches      {self.patches}",
            f"frames/s     {_rate(self.recent_frames_per_s)} in the last {RECENT_SECONDS / 60:.0f} min,"
            f" {_rate(self.frames_per_s)} overall",
        ]
        if self.eta_s is not None:
            lines.append(f"eta          {_duration(self.eta_s)}")
        if self.seconds_per_frame:
            told = "  ".join(f"{stage} {seconds:.3f}" for stage, seconds in self.seconds_per_frame.items())
            lines.append(f"s/frame      {told}")
        lines += [f"set aside    {frame_id}: {error}" for frame_id, error in self.last_errors]
        if self.set_aside > len(self.last_errors):
            lines.append(f"set aside    ... {self.set_aside - len(self.last_errors)} more")
        return "\n".join(lines)

    def _state(self) -> str:
        if self.left == 0:
            return "all frames are done or set aside"
        if self.last_sign_s is None:
            return "no frame has come yet"
        sign = f"last sign {_duration(self.last_sign_s)} ago"
        return f"seems alive, {sign}" if self.alive else f"no run seems to be going on, {sign}"

    def _by_status(self) -> str:
        told = [f"{self.refined} refined"]
        for status in ("kept", "rejected"):
            counts = {reason: self.reasons[reason] for reason in REASONS[status] if self.reasons.get(reason)}
            by_reason = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            told.append(f"{sum(counts.values())} {status}" + (f" ({by_reason})" if by_reason else ""))
        return ", ".join(told)


class _Frame(NamedTuple):
    """What the last receipt of a frame says; small, as there are millions."""

    error: str
    instances: int
    refined: int
    patches: int
    reasons: dict[str, int] | None


def read_status(output: str, list_dump: bool = False, now: float | None = None) -> Status:
    """The state of the runs on an output, at the Unix time `now`.

    With `list_dump` the run's predictions are listed again to know what is left. InputError where there is no ledger,
    or where it is damaged.
    """
    output = storage.absolute(output).rstrip("/")
    now = time.time() if now is None else now
    root = f"{output}/_ledger"
    if not storage.exists(f"{root}/run.json"):
        raise InputError(f"{output}: expected the output of a run, there is no _ledger/run.json")
    sign = _last_sign(root)
    frames: dict[str, _Frame] = {}
    seconds: Counter[str] = Counter()
    times, worked = array("d"), 0
    for receipt in read_receipts(output):
        # Set aside again, a frame belongs behind those that were before.
        frames.pop(receipt["frame_id"], None)
        frames[receipt["frame_id"]] = _Frame(
            receipt["error"],
            receipt["instances"],
            receipt["refined"],
            receipt["patches"],
            receipt.get("reasons") or None,
        )
        seconds.update(receipt["seconds"])
        worked += bool(receipt["seconds"])
        # Frames that the listing rejected never came to the network.
        if receipt["refined_at"]:
            times.append(receipt["refined_at"])
    left = None
    if list_dump:
        listed = _listed(f"{root}/run.json")
        left = len(listed - frames.keys())
        frames = {frame_id: frame for frame_id, frame in frames.items() if frame_id in listed}
    errors = [(frame_id, frame.error) for frame_id, frame in frames.items() if frame.error]
    reasons: Counter[str] = Counter()
    for frame in frames.values():
        reasons.update(frame.reasons or {})
    ordered = sorted(times)
    recent = _frames_per_s([moment for moment in ordered if moment > now - RECENT_SECONDS])
    overall = _frames_per_s(ordered)
    age = None if sign is None else max(0.0, now - sign)
    alive = age is not None and age < ALIVE_SECONDS
    rate = recent or overall
    return Status(
        output=output,
        done=len(frames) - len(errors),
        set_aside=len(errors),
        left=left,
        instances=sum(frame.instances for frame in frames.values()),
        patches=sum(frame.patches for frame in frames.values()),
        refined=sum(frame.refined for frame in frames.values()),
        reasons=dict(reasons.most_common()),
        frames_per_s=overall,
        recent_frames_per_s=recent,
        seconds_per_frame={stage: seconds[stage] / worked for stage in STAGES if seconds[stage]},
        last_errors=errors[: -SHOWN_ERRORS - 1 : -1],
        last_sign_s=age,
        alive=alive,
        eta_s=left / rate if alive and left and rate else None,
    )


def _last_sign(root: str) -> float | None:
    """Unix time of the newest segment, by its name, or of the lease's heartbeat."""
    signs = []
    for name in storage.find(root, (".jsonl",)):
        stem = posixpath.splitext(posixpath.basename(name))[0]
        if stem.isdecimal():
            signs.append(int(stem) / 1e9)
    if storage.exists(f"{root}/lease.json"):
        heartbeat = _object(f"{root}/lease.json").get("heartbeat")
        if isinstance(heartbeat, int | float):
            signs.append(float(heartbeat))
    return max(signs, default=None)


def _frames_per_s(times: list[float]) -> float | None:
    """Frames per second, given the sorted Unix times they came at; a run's first block only starts the clock."""
    came, span, first = 0, 0.0, None
    for before, moment in pairwise([-math.inf, *times]):
        if first is None or moment - before > PAUSE_SECONDS:
            first = moment
        elif moment - first > BLOCK_SECONDS:
            came += 1
        if moment > first:
            span += moment - before
    return came / span if came else None


def _listed(run: str) -> set[str]:
    """The ids of all frames of the dump that a run's settings name."""
    settings = _object(run)
    if HIDDEN in f"{settings.get('predictions')}{settings.get('images')}{settings.get('image_list')}":
        raise InputError(f"{run}: the dump cannot be listed, as what gives access to it is not kept here")
    try:
        reader = dump.reader(
            settings["predictions"],
            settings["images"],
            settings["format"],
            settings["image_list"],
            settings["image_pattern"],
        )
    except KeyError as error:
        raise InputError(f"{run}: expected the settings of a refinement, {error} is missing") from None
    return {ref.frame_id for ref in reader.list_frames()}


def _object(url: str) -> dict[str, Any]:
    try:
        content = json.loads(storage.read(url))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{url}: expected json as a run writes it; the file is damaged")
    return content


def _rate(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _duration(seconds: float) -> str:
    """For example `12 s`, `3 min`, `5.2 h` or `2.0 days`."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
