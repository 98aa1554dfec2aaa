"""What a frame costs on this machine, beside the least it could cost: a made dump, floors, and the flow itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from model import Refiner
from model.coarsen import mask_head
from model.refiner import Precision, network_input
from pipeline.formats.cityscapes import CityscapesReader, CityscapesWriter
from pipeline.guard import GuardConfig
from pipeline.stages import Cutting, assemble, commit, extract

WIDTH, HEIGHT = 2048, 1024
INSTANCES = 20
DISTINCT = 8
"""Frames drawn; a larger dump repeats them under other names."""

NMS_THRESHOLD = 0.25
"""Gives about the 140 patches a frame that the reference reports for Cityscapes at this threshold."""


def make_dump(root: Path, frames: int, seed: int = 0) -> None:
    """A Cityscapes-like dump in `images/` and `coarse/`: noise like photographs, objects of 20 to 600 px."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "coarse").mkdir(exist_ok=True)
    for i in range(min(frames, DISTINCT)):
        image = _encoded(_photograph(rng))
        masks = [_encoded(_object(rng) * 255) for _ in range(INSTANCES)]
        for number in range(i, frames, DISTINCT):
            stem = f"made_{number:06d}_leftImg8bit"
            (root / "images" / f"{stem}.png").write_bytes(image)
            lines = []
            for k, mask in enumerate(masks):
                (root / "coarse" / f"{stem}_{k}.png").write_bytes(mask)
                lines.append(f"{stem}_{k}.png {24 + k % 10} {0.99 - 0.01 * k}\n")
            (root / "coarse" / f"{stem}_pred.txt").write_text("".join(lines))


def _encoded(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def _photograph(rng: np.random.Generator) -> np.ndarray:
    """Noise with the falling spectrum of photographs, so that PNG decoding costs what it costs on them."""
    image = np.full((HEIGHT, WIDTH, 3), 110, np.float32)
    for octave in range(9):
        side = 2 ** (10 - octave)
        noise = rng.standard_normal((max(1, HEIGHT // side), max(1, WIDTH // side), 3)).astype(np.float32)
        image += cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) * 30 * 0.75**octave
    return image.clip(0, 255).astype(np.uint8)


def _object(rng: np.random.Generator) -> np.ndarray:
    """One smooth object (HEIGHT, WIDTH) uint8 0/1 as a 28x28 mask head would see it."""
    extent = float(np.clip(rng.lognormal(np.log(90), 0.8), 20, 600))
    centre = rng.uniform((0, 200), (WIDTH, HEIGHT - 200))
    angle = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    waves = sum(rng.uniform(0, 0.25 / k) * np.sin(k * angle + rng.uniform(0, 7)) for k in (2, 3, 5))
    radius = extent / 2 * (1 + waves)
    points = np.stack([np.cos(angle) * radius * rng.uniform(0.5, 1), np.sin(angle) * radius], axis=1) + centre
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.fillPoly(mask, [np.rint(points).astype(np.int32)], 1)
    return mask_head(mask, rng)


@dataclass(frozen=True)
class Handling:
    """CPU milliseconds per frame outside the network, on one thread, and the floor beside it."""

    patches: float
    decode_floor: float
    encode_floor: float
    extract: float
    assemble: float
    commit: float

    @property
    def ratio(self) -> float:
        """Everything the pipeline does, over just decoding its inputs and encoding its outputs with OpenCV."""
        return (self.extract + self.assemble + self.commit) / (self.decode_floor + self.encode_floor)


def measure_handling(root: Path, frames: int) -> Handling:
    """Time the stages around the network, frame by frame, with stand-in probabilities, against the OpenCV floor."""
    reader = CityscapesReader(str(root / "coarse"), str(root / "images"))
    writer = CityscapesWriter(str(root / "handled"))
    cutting, guard = Cutting(NMS_THRESHOLD), GuardConfig()
    cv2.setNumThreads(1)
    rows, patches = [], 0
    for ref in reader.list_frames()[:frames]:
        inputs = [root / "images" / ref.file_name, *sorted((root / "coarse").glob(f"{Path(ref.file_name).stem}_*.png"))]
        decode, decoded = _cpu_ms(
            lambda inputs=inputs: [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in inputs]
        )
        encode, _ = _cpu_ms(lambda decoded=decoded: [cv2.imencode(".png", mask) for mask in decoded[1:]])
        extracting, (work, crops) = _cpu_ms(lambda ref=ref: extract(ref, reader, str(root / "images"), cutting, guard))
        assert not work.error, work.error
        # The coarse mask moved by a pixel as its probability: guard and encoding see masks of a realistic shape.
        probabilities = np.roll(crops[..., 3], 1, axis=2).astype(np.uint16) * np.uint16(65535)
        assembling, _ = _cpu_ms(lambda work=work, p=probabilities: assemble(work, p, guard))
        committing, _ = _cpu_ms(lambda work=work: commit([work], writer))
        rows.append((decode, encode, extracting, assembling, committing))
        patches += len(crops)
    return Handling(patches / len(rows), *np.median(rows, axis=0).tolist())


def _cpu_ms(function: Callable):
    started = time.process_time()
    result = function()
    return (time.process_time() - started) * 1e3, result


def bare_rates(checkpoint: str, precision: Precision, seconds: float = 4.0) -> dict[str, float]:
    """Patches/s of the folded network alone, on prepared input, with all cores, by the way they share the work.

    `1` is the reference's way, one patch at a time with all threads, `16` a batch with all threads; `NxT` are batches
    of N on T threads, each alone.
    """
    refiner = Refiner.from_checkpoint(checkpoint, precision=precision)
    threads = torch.get_num_threads() if refiner.device.type == "cpu" else 1

    def loop(batch: int) -> int:
        patches = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (batch, 64, 64, 4), dtype=np.uint8))
        x = network_input(patches.to(refiner.device), refiner.config.input_px).to(refiner.dtype)
        with torch.inference_mode():
            refiner.network(x)
            started, done = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                # Reading one number back waits for an accelerator to finish.
                refiner.network(x)[0, 0, 0, 0].item()
                done += batch
        return done

    rates = {str(batch): loop(batch) / seconds for batch in (1, 16)}
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for batch in (8, 16, 32) if threads > 1 else (8, 32, 128, 256):
            rates[f"{batch}x{threads}"] = sum(pool.map(loop, [batch] * threads)) / seconds
    torch.set_num_threads(threads)
    return rates


def run_job(root: Path, output: str, arguments: list[str]) -> tuple[str, float]:
    """Run the refine job on the dump in a process of its own: what it printed, and its processes' peak memory in MB."""
    command = [
        sys.executable,
        "-m",
        "jobs.refine",
        "--predictions",
        str(root / "coarse"),
        "--images",
        str(root / "images"),
    ]
    command += ["--output", str(root / output), "--nms-threshold", str(NMS_THRESHOLD), *arguments]
    peak = 0.0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as job:
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.5):
                peak = max(peak, _memory_mb(job.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        text, errors = job.communicate()
        done.set()
        watcher.join()
    if job.returncode:
        raise RuntimeError(f"the job ended with {job.returncode}: {errors[-2000:]}")
    return text, peak


def _memory_mb(pid: int) -> float:
    """Proportional memory of a process and all its descendants; Linux only, 0 elsewhere."""
    if not os.path.isdir("/proc"):
        return 0.0
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    total, queue = 0, [pid]
    while queue:
        current = queue.pop()
        queue += children.get(current, [])
        try:
            rollup = Path(f"/proc/{current}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total / 1024
