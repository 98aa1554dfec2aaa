"""How fast the network runs on this machine, way by way, and what each way changes in the masks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from model import checkpoint
from model.backend import Precision, UnsupportedError, resolve_backend
from model.preprocess import network_input
from model.refiner import Refiner

REFERENCE = "reference"
GPU_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
BASE = "torch fp32"
"""The way whose masks the others are compared with."""


@dataclass(frozen=True)
class Rate:
    """One way to run the network, measured."""

    name: str
    """`reference`, or backend and precision."""
    patches_per_s: float
    """Median over the repetitions, with all threads."""
    patches_per_core_s: float
    """Patches per second of CPU time, which says more where something else uses the machine too."""
    ratio: float
    """patches_per_s over that of torch in fp32, median of the repetitions' ratios."""
    flipped: float | None
    """Share of the pixels that fall on the other side of one half than in torch fp32; None where not compared."""
    largest: float | None
    """The largest difference of a probability from torch fp32."""


def rates(
    path_or_name: str,
    patches: np.ndarray,
    *,
    threads: int | None = None,
    repetitions: int = 5,
    seconds: float = 1.0,
    checked: int = 256,
) -> list[Rate]:
    """Measure every way there is here on patches (N, P, P, 4) uint8, from crops to probabilities, GPUs included.

    The ways take turns, so that noise and a drifting clock hit all alike: `repetitions` turns of about `seconds` each.
    Masks are compared on the first `checked` patches; that means something only for photographs and trained weights.
    """
    threads = threads or torch.get_num_threads()
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {REFERENCE: _reference(path_or_name, threads, "cpu")}
    least = {REFERENCE: 4}
    for backend in ("torch", "openvino") if resolve_backend("auto") == "openvino" else ("torch",):
        for precision in ("fp32", "bf16"):
            try:
                refiner = Refiner.from_checkpoint(
                    path_or_name, device="cpu", precision=precision, backend=backend, threads=threads
                )
            except UnsupportedError:  # this CPU cannot calculate so
                continue
            ways[f"{backend} {precision}"] = refiner.probabilities
            least[f"{backend} {precision}"] = refiner.batch_size * threads
    if torch.cuda.is_available():
        ways[f"gpu {REFERENCE}"], least[f"gpu {REFERENCE}"] = _reference(path_or_name, threads, "cuda"), 4
        for backend, precision in product(dict.fromkeys(("torch", resolve_backend("auto", "cuda"))), GPU_PRECISIONS):
            try:
                refiner = Refiner.from_checkpoint(path_or_name, device="cuda", precision=precision, backend=backend)
            except UnsupportedError:  # nor this GPU
                continue
            name = f"gpu {backend} {precision}"
            ways[name], least[name] = refiner.probabilities, 4 * refiner.batch_size
    counts = {}
    for name, way in [*ways.items()]:
        try:
            counts[name] = _count(way, patches, least[name], seconds)
        except UnsupportedError:  # a GPU whose memory the other ways take
            del ways[name]
    walls: dict[str, list[float]] = {name: [] for name in ways}
    cpus: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            part = _taken(patches, counts[name])
            wall, cpu = time.perf_counter(), time.process_time()
            way(part)
            walls[name].append(counts[name] / (time.perf_counter() - wall))
            cpus[name].append(counts[name] / (time.process_time() - cpu))

    expected = ways[BASE](patches[:checked])
    rows = []
    for name, way in ways.items():
        flipped = largest = None
        if name != BASE:
            found = way(patches[:checked])
            flipped = float(np.mean((found > 32767) != (expected > 32767)))
            largest = float(np.abs(found.astype(np.int32) - expected).max() / 65535)
        ratio = float(np.median(np.divide(walls[name], walls[BASE])))
        rows.append(Rate(name, float(np.median(walls[name])), float(np.median(cpus[name])), ratio, flipped, largest))
    return rows


def rate(refiner: Refiner, patches: np.ndarray, seconds: float) -> float:
    """Patches per second of a refiner alone, from crops (N, P, P, 4) uint8 to probabilities, as a job would run it."""
    count = _count(refiner.probabilities, patches, 2 * refiner.batch_size * torch.get_num_threads(), seconds)
    part = _taken(patches, count)
    started = time.perf_counter()
    refiner.probabilities(part)
    return count / (time.perf_counter() - started)


def table(rows: Sequence[Rate]) -> str:
    """The rates as lines of text, in the order given."""
    lines = [f"{'':<22}{'patches/s':>10}{'per core s':>12}{'ratio':>8}{'flipped px':>12}{'largest':>10}"]
    for row in rows:
        compared = "" if row.flipped is None else f"{row.flipped:12.1e}{row.largest:10.1e}"
        lines.append(f"{row.name:<22}{row.patches_per_s:10.1f}{row.patches_per_core_s:12.1f}{row.ratio:8.2f}{compared}")
    return "\n".join(lines)


def _reference(path_or_name: str, threads: int, device: str) -> Callable[[np.ndarray], np.ndarray]:
    """One patch at a time through the network as it was trained, with all threads, as the reference does."""
    network = checkpoint.load(path_or_name).to(device)
    side = network.config.input_px

    @torch.inference_mode()
    def run(patches: np.ndarray) -> np.ndarray:
        out = np.empty(patches.shape[:3], np.uint16)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for probability, patch in zip(out, patches):
                logits = network(network_input(torch.from_numpy(patch)[None].to(device), side).contiguous())
                for size in (side, patches.shape[1]):
                    logits = F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)
                probability[:] = logits.softmax(1)[0, 1].mul_(65535).round_().cpu().numpy()
        finally:
            torch.set_num_threads(before)
        return out

    return run


def _count(way: Callable[[np.ndarray], np.ndarray], patches: np.ndarray, least: int, seconds: float) -> int:
    """How many times `least` patches `way` does in about `seconds`; this warms it up."""
    way(_taken(patches, least))
    started = time.perf_counter()
    way(_taken(patches, least))
    return least * max(1, round(seconds / (time.perf_counter() - started)))


def _taken(patches: np.ndarray, count: int) -> np.ndarray:
    return patches[np.arange(count) % len(patches)]
