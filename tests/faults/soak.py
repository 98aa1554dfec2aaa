"""Hours of bad luck: `python -m tests.faults.soak --minutes 20 --frames 2000 --output soak/`.

A job refines a dump while faults are drawn at random and injected, and is started again until the dump is done; then it
begins with a new output, until the time is over. Every output is compared with an undisturbed run's. Writes `soak.json`
and `soak.png`, the memory of driver and workers over time. Exit status 1 where an output is wrong or something leaked.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults import processes
from tests.faults.bench import Bench, Job, bench
from tests.faults.trial import Trial, undisturbed

STUCK_S = 300.0
"""A job that neither ends nor finishes a frame for so long is stuck."""

SAMPLE_S = 2.0
MB = 1 << 20


class Sampler:
    """Takes the memory of all processes of a bench every SAMPLE_S, in a thread."""

    def __init__(self, on: Bench) -> None:
        self.bench, self.driver = on, 0
        self.samples: list[dict[str, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._began = time.monotonic()
        self._thread.start()

    def stop(self) -> list[dict[str, float]]:
        self._stop.set()
        self._thread.join()
        return self.samples

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            pids = processes.below(self.bench.root)
            workers = [processes.private_bytes(pid) / MB for pid in pids if processes.title(pid).startswith("ray::")]
            shared = os.statvfs("/dev/shm")
            self.samples.append(
                {
                    "seconds": round(time.monotonic() - self._began, 1),
                    "driver_mb": processes.private_bytes(self.driver) / MB,
                    "largest_worker_mb": max(workers, default=0.0),
                    "workers_mb": sum(workers),
                    "processes": len(pids),
                    "shared_memory_mb": (shared.f_blocks - shared.f_bfree) * shared.f_frsize / MB,
                }
            )


class Soak:
    """One soak: draws faults by `seed`, counts them, and keeps what jobs said that ended without being asked to."""

    def __init__(self, on: Bench, seed: int, pause_s: tuple[float, float]) -> None:
        self.bench, self.pause_s = on, pause_s
        self.random = random.Random(seed)
        self.sampler = Sampler(on)
        self.injected: Counter[str] = Counter()
        self.ended_by_themselves: list[str] = []
        self.stuck = 0
        self._images = sorted((on.root / "dump" / "images").iterdir())
        self._spoilt: dict[Path, bytes] = {}
        self._faults = [self.kill, self.terminate, self.interrupt, self.kill_a_worker, self.kill_a_worker]
        self._faults += [self.kill_the_raylet, self.pause, self.spoil, self.spoil, self.repair, self.touch]

    def refine(self, form: str, until: float) -> tuple[Trial, bool]:
        """Refine the dump into a new output, with faults until the time `until` (monotonic); whether it got done."""
        trial = Trial(self.bench, "soak", form)
        while not self.stuck:
            job = trial.start()
            self.sampler.driver = job.process.pid
            self._disturb(job, trial, until)
            status, said = job.process.returncode, job.said()
            whole = not self._spoilt
            self.repair()
            if status == 0 and whole and ", 0 set aside" in said:
                return trial, True
            if status not in (0, 130, 128 + signal.SIGTERM, -signal.SIGKILL):
                self.ended_by_themselves.append(f"{status}: {said[max(0, said.rfind('error: ')) :][:600]}")
        return trial, False

    def _disturb(self, job: Job, trial: Trial, until: float) -> None:
        moved, count, next_fault = time.monotonic(), -1, self._next()
        while job.process.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            if now > next_fault and now < until:
                fault = self.random.choice(self._faults)
                with suppress(ProcessLookupError, IndexError):
                    fault(job)
                    self.injected[fault.__name__] += 1
                next_fault = self._next()
            if now - moved > 5 and (done := len(trial.switches.writes())) != count:
                moved, count = now, done
            if now - moved > STUCK_S:
                self.stuck += 1
                self.ended_by_themselves.append(f"stuck: {job.said()[-600:]}")
                processes.end(processes.below(self.bench.root))
        trial.await_silence()

    def _next(self) -> float:
        return time.monotonic() + self.random.uniform(*self.pause_s)

    def kill(self, job: Job) -> None:
        job.kill(signal.SIGKILL)

    def terminate(self, job: Job) -> None:
        job.kill(signal.SIGTERM)

    def interrupt(self, job: Job) -> None:
        os.killpg(job.process.pid, signal.SIGINT)

    def kill_a_worker(self, job: Job) -> None:
        os.kill(self.random.choice(self._workers()), signal.SIGKILL)

    def kill_the_raylet(self, job: Job) -> None:
        os.kill(self.random.choice([*filter(processes.is_raylet, processes.below(job.root))]), signal.SIGKILL)

    def pause(self, job: Job) -> None:
        """A machine that does not answer for some seconds: driver or worker."""
        pid = self.random.choice([job.process.pid, *self._workers()])
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.random.uniform(1, 5))
        os.kill(pid, signal.SIGCONT)

    def spoil(self, job: Job) -> None:
        """An image that a producer has half replaced."""
        image = self.random.choice([image for image in self._images if image not in self._spoilt])
        self._spoilt[image] = image.read_bytes()
        _put(image, self._spoilt[image][:100])

    def repair(self, job: Job | None = None) -> None:
        """Give all spoilt images their content again."""
        while self._spoilt:
            _put(*self._spoilt.popitem())

    def touch(self, job: Job) -> None:
        """Images written anew with the same content: changed, as far as anybody can know from a listing."""
        for image in self.random.sample(self._images, min(5, len(self._images))):
            image.touch()

    def _workers(self) -> list[int]:
        found = [(pid, processes.title(pid)) for pid in processes.below(self.bench.root)]
        return [pid for pid, title in found if title.startswith("ray::") and title not in processes.SLOW_TO_END]


def _put(image: Path, content: bytes) -> None:
    draft = image.with_name(f".{image.name}")
    draft.write_bytes(content)
    draft.rename(image)


def soak(minutes: float, frames: int, forms: list[str], seed: int, pause_s: tuple[float, float]) -> dict[str, Any]:
    """Run one; returns what goes into `soak.json`."""
    before = {folder: set(os.listdir(folder)) for folder in ("/dev/shm", "/tmp")}
    with bench(frames, without_ray=True) as on:
        for form in forms:
            undisturbed(on, form, local=False)
        run, began = Soak(on, seed, pause_s), time.monotonic()
        outputs: list[dict[str, Any]] = []
        until = began + 60 * minutes
        while time.monotonic() < until or not outputs:
            trial, done = run.refine(forms[len(outputs) % len(forms)], until)
            if not done:
                break
            outcome = trial.finish()
            flaws = {
                "wrong": not outcome.right,
                "duplicates": outcome.duplicates,
                "gaps": outcome.gaps,
                "orphans": outcome.orphans,
                "processes": outcome.leaked,
            }
            outputs.append(
                {"form": outcome.form, "runs": outcome.runs, "recomputed": outcome.recomputed}
                | {"seconds": round(outcome.seconds), "flaws": {name: flaw for name, flaw in flaws.items() if flaw}}
            )
            print(json.dumps(outputs[-1]), file=sys.stderr, flush=True)
        samples = run.sampler.stop()
        name = on.root.name
    # Ray's own dashboard agents are gone by now: `bench` has waited for them.
    left = {folder: sorted({*os.listdir(folder)} - names - {name}) for folder, names in before.items()}
    return {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "frames": frames,
        "seed": seed,
        "injected": dict(run.injected),
        "outputs": outputs,
        "stuck": run.stuck,
        "ended_by_themselves": run.ended_by_themselves,
        "memory": growth(samples),
        "left_in_shared_memory": left["/dev/shm"],
        "left_in_tmp": left["/tmp"],
        "samples": samples,
    }


def growth(samples: list[dict[str, float]]) -> dict[str, float]:
    """Of driver and workers the median memory, MB, in the first and in the last half of the samples that have some."""
    found = {}
    for name in ("driver_mb", "largest_worker_mb", "workers_mb", "processes"):
        values = [sample[name] for sample in samples if sample[name]]
        for half, part in (("first_half", values[: len(values) // 2]), ("last_half", values[len(values) // 2 :])):
            found[f"{name}_{half}"] = round(statistics.median(part), 1) if part else 0.0
        found[f"{name}_peak"] = round(max(values, default=0.0), 1)
    return found


def plot(result: dict[str, Any], path: Path) -> None:
    """Memory over time as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    minutes = [sample["seconds"] / 60 for sample in result["samples"]]
    for name, label in (
        ("driver_mb", "driver"),
        ("largest_worker_mb", "largest worker"),
        ("workers_mb", "all workers"),
    ):
        axes.plot(minutes, [sample[name] for sample in result["samples"]], label=label, linewidth=1)
    axes.set(xlabel="minutes", ylabel="private memory, MB", ylim=(0, None))
    faults, runs = sum(result["injected"].values()), sum(output["runs"] for output in result["outputs"])
    axes.set_title(f"{result['frames']} frames, {len(result['outputs'])} outputs, {runs} runs, {faults} faults")
    axes.legend()
    figure.savefig(path, dpi=110)


def is_well(result: dict[str, Any]) -> bool:
    """Whether all outputs are right and nothing was left behind, except in /tmp, where others write as well."""
    flawless = bool(result["outputs"]) and not any(output["flaws"] for output in result["outputs"])
    return flawless and not result["stuck"] and not result["left_in_shared_memory"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--forms", nargs="+", default=["cityscapes", "coco", "parquet"], help="forms of the outputs")
    parser.add_argument("--pause", nargs=2, type=float, default=(5.0, 40.0), help="seconds between faults, from and to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder for soak.json and soak.png")
    given = parser.parse_args(arguments)
    result = soak(given.minutes, given.frames, given.forms, given.seed, tuple(given.pause))
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "soak.json").write_text(json.dumps(result, indent=1))
    plot(result, given.output / "soak.png")
    print(json.dumps({name: value for name, value in result.items() if name != "samples"}, indent=1))
    return 0 if is_well(result) else 1


if __name__ == "__main__":
    sys.exit(main())
