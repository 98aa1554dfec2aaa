"""The training of one process: data in, checkpoints, log and weights out. Knows torch.distributed, but no Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch

from model import checkpoint
from model.augment import Augmentation
from model.bundled import missing, resolve
from model.fit import FitConfig, Moment, arithmetic, fit
from model.hrnet import CONFIGS, RefinementNetwork
from pipeline import storage
from pipeline.bounds import check_bounds
from pipeline.config import MAX_BATCH
from pipeline.lease import Lease
from pipeline.outputs import check_kept
from pipeline.patch_dataset import PatchBatches, PatchDataset
from pipeline.records import InputError
from pipeline.training_data import Validation, gathered, load_batches, place, validation_set
from pipeline.training_folder import TrainingFolder

PLACEMENT = ("output", "workers", "gpus_per_worker", "loader_workers", "checkpoint_every", "restart")
"""Settings that may differ when a run goes on: where and how it runs, not what it learns."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train the refiner on patch data sets, in this process or on a Ray cluster.

    The same command on the same output goes on after the last checkpoint. Settings may also come from a YAML file,
    named first: `jobs/train.py recipe.yaml --workers 4`.
    """

    data: tuple[str, ...]
    """Patch data sets, as `jobs/prepare.py` writes them; any fsspec URLs."""
    output: str
    """The folder for checkpoints, log and weights; any fsspec URL, on several machines one that all of them reach."""
    val_data: tuple[str, ...] = ()
    """Other data sets to validate on: their val split, or all where they have none. Default the val split of data."""
    batch_size: int = 8
    """Patches per step and process."""
    side_px: int | None = None
    """Side of the training patches; the middle of larger ones is taken. Default fit.patch_px; fewer are cheaper."""
    epochs: float | None = None
    """Passes over the data, in place of fit.steps; the schedule is stretched to them."""
    start: str | None = None
    """Weights to start from: a bundled name, our .safetensors, or the reference's .pth."""
    backbone: str | None = None
    """An ImageNet-pretrained HRNet backbone to start from, in place of start."""
    workers: str = "0"
    """0: this process, without Ray; 4: so many processes on Ray; 2:8: as many as the cluster has room for, within."""
    gpus_per_worker: int = 1
    """GPUs for each process on Ray, where the cluster has GPUs; 0 trains on CPUs."""
    loader_workers: int | None = None
    """Processes that prepare the batches of each training process; default 4 with a GPU, else none."""
    val_every: int = 1000
    """Steps between validations; the last step is always validated."""
    val_patches: int = 2048
    """Patches of a validation, spread evenly over the split and kept in memory; always the same ones."""
    checkpoint_every: int = 500
    """Steps between checkpoints; each validation makes one too."""
    patience: int = 0
    """Stop after so many validations without improvement; 0 never stops early."""
    metric: Literal["mIoU", "mAcc", "aAcc", "boundary_f1", "boundary_f3"] = "boundary_f1"
    """The score of the refined validation patches by which the best weights are chosen."""
    restart: bool = False
    """Forget what the output holds of an earlier run, and start anew."""
    fit: FitConfig = field(default_factory=FitConfig)
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("data is empty: expected at least one patch data set")
        for name, least in (
            ("batch_size", 1),
            ("val_every", 1),
            ("val_patches", 1),
            ("checkpoint_every", 1),
            ("patience", 0),
            ("gpus_per_worker", 0),
            ("side_px", 8),
            ("loader_workers", 0),
        ):
            check_bounds(self, name, least)
        if self.batch_size > MAX_BATCH:
            raise InputError(f"batch_size is {self.batch_size}: expected at most {MAX_BATCH}")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise InputError(f"epochs is {self.epochs}: expected a number above 0")
        if self.epochs is not None and self.fit.steps is not None:
            raise InputError("epochs and fit.steps are both given: expected one of them")
        if self.start and self.backbone:
            raise InputError("start and backbone are both given: expected one of them")
        _ = self.workers_range

    @property
    def workers_range(self) -> tuple[int, int]:
        """The least and the most processes on Ray; (0, 0) for this process alone. InputError for another form."""
        least, _, most = self.workers.partition(":")
        if not least.isdigit() or (":" in self.workers and not (most.isdigit() and 1 <= int(least) <= int(most))):
            raise InputError(f"workers is {self.workers}: expected a number such as 4, or a range such as 2:8")
        return int(least), int(most or least)


class Say(Protocol):
    def __call__(self, line: str, passing: bool = False) -> None:
        """Show a line; a passing one is overtaken by the next."""


class Interrupted(Exception):  # noqa: N818  (no error: training was asked to leave, and has saved)
    """Training left early because it was told to; the message says after which step."""


@dataclass
class _Course:
    """How far a run has come, beside what `fit` knows; the same in all processes."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    fruitless: int = 0
    """Validations since the best one."""
    stopped: bool = False


@dataclass(frozen=True)
class Prepared:
    """A run that can begin."""

    config: TrainConfig
    """Means the same in every process."""
    settings: dict[str, Any]
    """Everything that decides what is learned, as run.json keeps it."""


def prepare(config: TrainConfig) -> Prepared | None:
    """Check everything that can be checked before training, writing nothing; None where it is finished already.

    Raises InputError, CheckpointError, FitError or OSError.
    """
    fitting = config.fit.resolved()
    check_kept(config.output)
    config = replace(
        config,
        data=tuple(map(storage.absolute, config.data)),
        val_data=tuple(map(storage.absolute, config.val_data)),
        output=storage.absolute(config.output),
        start=config.start and storage.absolute(resolve(config.start)),
        backbone=config.backbone and storage.absolute(config.backbone),
    )
    train_set, val_set = PatchDataset(config.data, "train"), validation_set(config.data, config.val_data)
    if config.patience and val_set is None:
        raise InputError(f"patience is {config.patience}, but {', '.join(config.data)} has no val split to watch")
    PatchBatches(
        train_set, config.batch_size, 0, config.augmentation, _side(config), 0, max(1, config.workers_range[0])
    )
    _start(config)
    settings = asdict(config) | {"fit": asdict(fitting)}
    for name in PLACEMENT:
        del settings[name]
    for group in ("fit", "augmentation"):
        settings |= {f"{group}.{name}": value for name, value in settings.pop(group).items()}
    for name in ("fit.precision", "fit.sync_batch_norm"):
        del settings[name]
    if config.epochs is not None:
        settings["fit.steps"] = None
    settings |= {"data": list(config.data), "val_data": list(config.val_data)}
    settings |= {"data_patches": train_set.rows, "val_data_patches": val_set.rows if val_set else 0}
    settings |= {"data_shards": train_set.fingerprint, "val_data_shards": val_set.fingerprint if val_set else ""}
    folder = TrainingFolder(config.output)
    goes_on = folder.check(settings, config.restart)
    return None if goes_on and folder.finished else Prepared(config, settings)


@contextmanager
def claimed(prepared: Prepared) -> Iterator[Callable[[], None]]:
    """Hold the output, and make it this run's; yields what raises InputError once it is not held any more.

    InputError where another run trains there. One process holds it for all that train: the first of torch.distributed,
    or the one that has Ray start the others, which it outlives, so that those that are started anew go on at once.
    """
    output = prepared.config.output
    with ExitStack() as stack:
        fault, check = "", lambda: None
        if place()[0] == 0:
            try:
                check = stack.enter_context(Lease(output)).check
                TrainingFolder(output).claim(prepared.settings, prepared.config.restart)
            except (InputError, OSError) as error:
                fault = str(error)
        # The others wait for it, and end with it.
        if fault := gathered(fault)[0]:
            raise InputError(fault)
        yield check


def _side(config: TrainConfig) -> int:
    return config.side_px or config.fit.patch_px


def _start(config: TrainConfig) -> RefinementNetwork | None:
    if config.start:
        if not storage.exists(config.start):
            raise InputError(missing(config.start))
        network = checkpoint.load(config.start, storage.read(config.start))
        if network.config.name != config.fit.network:
            raise InputError(
                f"{config.start}: weights of {network.config.name}, but fit.network is {config.fit.network}"
            )
        return network
    if config.backbone:
        torch.manual_seed(config.fit.seed)
        network = RefinementNetwork(CONFIGS[config.fit.network])
        checkpoint.load_backbone(config.backbone, network, storage.read(config.backbone))
        return network
    return None


def train(
    config: TrainConfig,
    say: Say,
    stopping: Callable[[], bool] = lambda: False,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Train as one of the processes of torch.distributed, or alone, while the output is `claimed`.

    Goes on after the last checkpoint. All processes read the output, only the first writes; its `stopping` is asked
    after every step, and then it saves and raises Interrupted. `check` is called before it saves anything, and raises
    InputError where the output is not held any more. Other errors are those of `prepare` and `fit`.
    """
    rank, world = place()
    folder = TrainingFolder(config.output)
    data = PatchDataset(config.data, "train")
    make_batches = partial(
        PatchBatches, data, config.batch_size, config.fit.seed, config.augmentation, _side(config), rank, world
    )
    saved = folder.load()
    course = _Course(**saved["course"]) if saved else _Course()
    if len(set(gathered(course.step))) > 1:
        raise InputError(f"{config.output}: not the same for all processes; expected storage that all of them reach")
    fitting = config.fit.resolved()
    if saved:
        fitting = replace(fitting, steps=saved["fit"]["config"]["steps"])
    elif config.epochs is not None:
        fitting = replace(fitting, steps=math.ceil(config.epochs * make_batches().steps_per_epoch))
    val_set = validation_set(config.data, config.val_data)
    device, precision = arithmetic(fitting)
    run = _Run(
        config=config,
        steps=fitting.steps,
        folder=folder,
        course=course,
        validation=Validation(val_set, config.fit.patch_px, config.val_patches) if val_set else None,
        progress=_Progress(fitting.steps, course.step, world * config.batch_size, say),
        stopping=stopping,
        check=check,
        card={
            "network": fitting.network,
            "recipe": asdict(fitting) | {"precision": precision},
            "data": [url.rstrip("/").split("/")[-1] for url in config.data],
            "patches": data.rows,
            "batch_size": world * config.batch_size,
        },
        writes=rank == 0,
    )
    if run.writes:
        folder.begin(course.step)
        going_on = f"going on after step {course.step}" if course.step else "training"
        say(
            f"{going_on}: {fitting.network}, {fitting.steps} steps of {world} x {config.batch_size} patches,"
            f" {data.rows} patches"
            + (f", {min(val_set.rows, config.val_patches)} to validate on" if val_set else "")
            + f"; on {device.type} in {precision}"
        )
    batches = partial(load_batches, make_batches, fitting.steps, config.loader_workers)
    try:
        network = None
        if not course.stopped:
            network = fit(
                fitting, batches, run.report, start=None if saved else _start(config), state=saved and saved["fit"]
            )
        if run.writes:
            run.export(network)
    finally:
        folder.close()


@dataclass
class _Run:
    """What happens between two steps."""

    config: TrainConfig
    steps: int
    folder: TrainingFolder
    course: _Course
    validation: Validation | None
    progress: _Progress
    stopping: Callable[[], bool]
    check: Callable[[], None]
    card: dict[str, Any]
    writes: bool

    def report(self, moment: Moment) -> bool:
        course, config = self.course, self.config
        course.step = moment.step
        entry = {"step": moment.step, "loss": moment.loss, "rate": moment.rate, "grad_norm": moment.grad_norm}
        self.progress.step(moment, self.writes)
        last = moment.step == self.steps
        validated = self.validation is not None and (last or moment.step % config.val_every == 0)
        if validated:
            entry["validation"] = self._validate(moment)
        leaving = self.writes and self.stopping()
        if self.writes:
            self.folder.log(entry)
            if validated or last or leaving or moment.step % config.checkpoint_every == 0:
                self.check()
                self.folder.save({"course": asdict(course), "fit": moment.state()})
        if leaving and not last and not course.stopped:
            raise Interrupted(f"stopped after step {moment.step} of {self.steps}; the same command goes on from there")
        return course.stopped

    def _validate(self, moment: Moment) -> dict[str, Any]:
        course, config = self.course, self.config
        scores = self.validation.scores(moment.network)
        score = scores["after"][config.metric]
        if course.best is None or score > course.best:
            course.best, course.best_step, course.fruitless = score, moment.step, 0
            if self.writes:
                self.check()
                self.folder.write_weights("best", moment.network, self._card(moment.step, scores))
        else:
            course.fruitless += 1
        course.stopped = 0 < config.patience <= course.fruitless
        if self.writes:
            before, after = (scores[when][config.metric] for when in ("before", "after"))
            note = "" if course.fruitless == 0 else f" (best {course.best:.4f} at step {course.best_step})"
            self.progress.say(f"step {moment.step}: {config.metric} {before:.4f} -> {after:.4f}{note}")
        return scores

    def _card(self, step: int, scores: dict[str, Any] | None = None) -> dict[str, Any]:
        return {**self.card, "trained_steps": step} | ({"validation": scores} if scores else {})

    def export(self, network: RefinementNetwork | None) -> None:
        self.check()
        if self.course.best is not None:
            card = self.folder.export_best()
        else:
            card = self._card(self.course.step)
            self.folder.write_weights("weights", network, card)
        why = f", stopped early after {self.course.step}" if self.course.stopped else ""
        self.progress.say(f"wrote {self.folder.url('weights.safetensors')}: step {card['trained_steps']}{why}")


class _Progress:
    """Says `train step 152/3000  loss 0.1234  95.1 patches/s  eta 233s` after each step."""

    def __init__(self, steps: int, done: int, patches_per_step: int, say: Say) -> None:
        self.steps, self.done, self.patches_per_step, self.say = steps, done, patches_per_step, say
        self.loss: float | None = None
        self.first: float | None = None

    def step(self, moment: Moment, aloud: bool) -> None:
        self.loss = moment.loss if self.loss is None else 0.95 * self.loss + 0.05 * moment.loss
        if self.first is None:
            # The first step also compiles, loads and fills caches.
            self.first, self.done = time.monotonic(), moment.step
        elif aloud:
            seconds = (time.monotonic() - self.first) / (moment.step - self.done)
            self.say(
                f"train step {moment.step}/{self.steps}  loss {self.loss:.4f}"
                f"  {self.patches_per_step / max(seconds, 1e-6):.1f} patches/s"
                f"  eta {seconds * (self.steps - moment.step):.0f}s",
                passing=True,
            )
