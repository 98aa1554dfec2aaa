"""The training loop: patches in, a trained network out. Knows neither files nor Ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from model.cpu import computes_in_bf16
from model.gpu import has_bf16
from model.hrnet import CONFIGS, RefinementNetwork
from model.preprocess import network_input

MIN_RATE = 1e-4
POLY_POWER = 0.9
"""Where the reference's learning rate ends, and the shape of its way there."""

BACKGROUND_BATCHES = 20
"""So many batches without a single foreground pixel are no accident."""

RECIPES: dict[str, dict[str, float]] = {
    "reference": {
        "steps": 160_000,
        "learning_rate": 0.01,
        "weight_decay": 5e-4,
        "momentum": 0.9,
        "warmup_steps": 0,
        "clip_norm": 0.0,
        "ema_decay": 0.0,
    },
    "adamw": {
        "steps": 3000,
        "learning_rate": 2e-3,
        "weight_decay": 0.02,
        "momentum": 0.9,
        "warmup_steps": 100,
        "clip_norm": 2.0,
        "ema_decay": 0.995,
    },
}
"""What the settings of a recipe are where the configuration leaves them open."""


class FitError(RuntimeError):
    """Training cannot start or go on; the message names the step or the setting, and why."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How to train. A setting that is left open (None) is the recipe's own."""

    network: str = "hrnet18s_128"
    """Which network: hrnet18s_128 or hrnet48_256."""
    patch_px: int = 64
    """Side of the patches at inference; smaller ones in training are shown at the same magnification."""
    recipe: Literal["reference", "adamw"] = "reference"
    """`reference`: as published, for 4 processes with 8 patches each; `adamw`: short, for machines without a GPU."""
    steps: int | None = None
    """Batches to train on (per process); the schedule is stretched to them. Reference 160000, adamw 3000."""
    learning_rate: float | None = None
    """Peak learning rate. Reference 0.01, adamw 0.002."""
    weight_decay: float | None = None
    """Reference 0.0005 on everything, adamw 0.02 on convolution weights only."""
    momentum: float | None = None
    """Of SGD; the first of AdamW's two betas. 0.9 in both recipes."""
    warmup_steps: int | None = None
    """Steps of linear warm-up. Reference none, adamw 100."""
    clip_norm: float | None = None
    """Gradients are scaled down to this L2 norm; 0 leaves them alone. Reference 0, adamw 2."""
    ema_decay: float | None = None
    """Decay per step of the weight average that is exported; 0 exports the last weights. Reference 0, adamw 0.995."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the network's arithmetic, not of weights and updates; `auto` is bf16 where GPU or CPU computes in it."""
    sync_batch_norm: bool = True
    """Batch statistics over all processes, where several train on GPUs."""
    seed: int = 0
    """Of everything random: the initial weights here, the batches where they are made."""

    def resolved(self) -> FitConfig:
        """The same with nothing left open. Raises FitError for a setting that has no meaning."""
        for name, known in {"network": CONFIGS, "recipe": RECIPES, "precision": ("auto", "fp32", "bf16")}.items():
            if getattr(self, name) not in known:
                raise FitError(f"{name}: '{getattr(self, name)}' is none of {', '.join(known)}")
        full = replace(self, **{k: v for k, v in RECIPES[self.recipe].items() if getattr(self, k) is None})
        for name, least in {"patch_px": 1, **dict.fromkeys(RECIPES[self.recipe], 0), "steps": 1, "seed": 0}.items():
            if not least <= getattr(full, name) < math.inf:
                raise FitError(f"{name}: expected a number from {least}, got {getattr(full, name)}")
        for name in ("momentum", "ema_decay"):
            if not getattr(full, name) < 1:
                raise FitError(f"{name}: expected a number below 1, got {getattr(full, name)}")
        return full


@dataclass(frozen=True)
class Moment:
    """Training after one step, as handed to `report`; valid until `report` returns."""

    step: int
    """From 1."""
    loss: float
    """Of this step, the mean over all processes."""
    rate: float
    """The learning rate used."""
    grad_norm: float
    """L2 norm of the gradient, before clipping."""
    network: RefinementNetwork
    """What would be exported now, in eval mode. It lives on: copy it to keep or to fold it."""
    state: Callable[[], dict[str, Any]]
    """`state()` is everything needed to go on exactly: tensors on the CPU and plain values, copied.

    `torch.save` writes it, `torch.load(..., weights_only=True)` reads it back."""


def fit(
    config: FitConfig,
    batches: Callable[[int], Iterable[np.ndarray | Tensor]],
    report: Callable[[Moment], bool | None],
    *,
    start: RefinementNetwork | None = None,
    state: dict[str, Any] | None = None,
) -> RefinementNetwork:
    """Train a network and return what `config` exports: its weight average or its last weights, in eval mode.

    `batches(first_step)` yields the batches of steps first_step, first_step + 1, ..., counted from 0, each
    (N, P, P, 5) uint8: RGB, coarse mask 0/1, target mask 0/1; P may differ between batches. `report` is called after
    each step; returning True ends training early. The loss is the reference's: softmax cross-entropy of the logits,
    resized to the network's input resolution.

    Training starts from scratch, from the weights of `start` (left as they are), or goes on from `state`, which then
    comes first: on a CPU, in one process with as many threads, bit for bit as if it had never stopped.

    Where `torch.distributed` is initialised with several processes, each calls `fit` with its own batches; gradients
    are averaged, and all processes report the same losses and hold the same weights. All must stop at the same step.
    Batch statistics are taken over all processes on GPUs (`config.sync_batch_norm`); otherwise each process normalises
    with its own batch (`nn.SyncBatchNorm` does not run on CPUs) and the running statistics are averaged. The device is
    torch's current GPU, or the CPU where there is none.

    Raises FitError for settings without meaning, a `start` of another network, a `state` of another configuration, a
    batch of another form, batches without any foreground or that end early, and a loss that is not finite.
    """
    trainer = _Trainer(config.resolved(), start, state)
    config, iterator = trainer.config, iter(batches(trainer.step))
    foreground, first = False, trainer.step
    while trainer.step < config.steps:
        batch = next(iterator, None)
        if batch is None:
            raise FitError(f"the batches ended after {trainer.step} of {config.steps} steps")
        patches = _checked(batch, trainer.step + 1)
        foreground = foreground or bool(patches[..., 4].any())
        if not foreground and trainer.step + 1 - first >= min(BACKGROUND_BATCHES, config.steps - first):
            raise FitError(f"no target has foreground (steps {first + 1} to {trainer.step + 1})")
        loss, rate, grad_norm = trainer.train_on(patches)
        if report(Moment(trainer.step, loss, rate, grad_norm, trainer.exported, trainer.state)):
            break
    return trainer.exported


def arithmetic(config: FitConfig) -> tuple[torch.device, str]:
    """The device that `fit` trains on in this process, and the precision, `fp32` or `bf16`, of the network there."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        suited = has_bf16(device)
    else:
        device, suited = torch.device("cpu"), computes_in_bf16()
    return device, config.precision if config.precision != "auto" else "bf16" if suited else "fp32"


class _Trainer:
    """The weights, their average and the optimizer between two steps."""

    def __init__(self, config: FitConfig, start: RefinementNetwork | None, state: dict[str, Any] | None) -> None:
        if start is not None and start.config.name != config.network:
            raise FitError(f"network: the weights to start from are of {start.config.name}, not {config.network}")
        if state is not None:
            _check_state(state, config)
        self.config = config
        self.step = 0
        self.processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.device, precision = arithmetic(config)
        self.bf16, on_gpu = precision == "bf16", self.device.type == "cuda"
        torch.manual_seed(config.seed)
        network = deepcopy(start) if start is not None else RefinementNetwork(CONFIGS[config.network])
        network = network.to(self.device, memory_format=torch.channels_last).requires_grad_(True)
        self.exported = deepcopy(network).eval().requires_grad_(False)
        synced = self.processes > 1 and config.sync_batch_norm and on_gpu
        if synced:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.network = network.train()
        self.optimizer = _optimizer(config, self.network)
        if state is not None:
            self._restore(state)
        self.model: nn.Module = self.network
        if self.processes > 1:
            self.model = DistributedDataParallel(self.network, [self.device] if on_gpu else None)
        if state is None:
            self.exported.load_state_dict(self.network.state_dict())
        pair = [list(network.state_dict().values()) for network in (self.exported, self.network)]
        self.statistics = [] if synced else [b for b in self.network.buffers() if b.is_floating_point()]
        self.averaged = [[value for value in values if value.is_floating_point()] for values in pair]
        self.counters = [[value for value in values if not value.is_floating_point()] for values in pair]

    def train_on(self, patches: Tensor) -> tuple[float, float, float]:
        """One update from (N, P, P, 5) uint8 on the CPU; returns loss, learning rate and gradient norm."""
        rate = _rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        patches = patches.to(self.device, non_blocking=True)
        # Small patches are magnified as much as those of full side, not more.
        side = self.network.config.input_px * patches.shape[1] // self.config.patch_px
        x = network_input(patches[..., :4], side)
        nearest = torch.arange(side, device=self.device) * patches.shape[1] // side
        target = patches[:, nearest][:, :, nearest, 4].long()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(x)
        loss = F.cross_entropy(F.interpolate(logits.float(), size=x.shape[2:], mode="bilinear"), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm or math.inf)
        self.optimizer.step()
        loss = loss.detach()
        if self.processes > 1:
            self._average_over_processes([loss, *self.statistics])
        self.step += 1
        values = torch.stack([loss, grad_norm.detach()]).tolist()
        for name, value in zip(("loss", "gradient norm"), values):
            if not math.isfinite(value):
                raise FitError(
                    f"step {self.step}: the {name} is {value} at learning rate {rate:.3g}; "
                    f"lower the learning rate ({self.config.learning_rate})"
                )
        self._export()
        return values[0], rate, values[1]

    def state(self) -> dict[str, Any]:
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "network": self.network.state_dict(),
            "average": self.exported.state_dict() if self.config.ema_decay else {},
            "optimizer": self.optimizer.state_dict(),
        }
        return _on_cpu(state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.exported.load_state_dict(state["average"] or state["network"])
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        self.step = state["step"]

    def _average_over_processes(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.processes
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def _export(self) -> None:
        # The first weights are far off; a full memory of them would outlast a short schedule.
        decay = min(self.config.ema_decay, self.step / (self.step + 10))
        get_ema_multi_avg_fn(decay)(*self.averaged, None)
        for kept, new in zip(*self.counters):
            kept.copy_(new)


def _optimizer(config: FitConfig, network: RefinementNetwork) -> torch.optim.Optimizer:
    if config.recipe == "reference":
        return torch.optim.SGD(
            network.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay
        )
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.momentum, 0.999),
    )


def _rate(config: FitConfig, step: int) -> float:
    """Learning rate of a step counted from 0."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.recipe == "adamw":
        return config.learning_rate * (warm * 0.5 * (1 + math.cos(math.pi * step / config.steps)))
    least = min(MIN_RATE, config.learning_rate)
    return warm * ((config.learning_rate - least) * (1 - step / config.steps) ** POLY_POWER + least)


def _checked(batch: np.ndarray | Tensor, step: int) -> Tensor:
    shape, dtype = tuple(getattr(batch, "shape", ())), str(getattr(batch, "dtype", type(batch).__name__))
    square = len(shape) == 4 and min(shape) > 0 and shape[1] == shape[2] and shape[3] == 5
    if not square or dtype.removeprefix("torch.") != "uint8":
        raise FitError(f"step {step}: the batch is {shape} {dtype}, expected (N, P, P, 5) uint8")
    patches = batch if isinstance(batch, Tensor) else torch.from_numpy(np.ascontiguousarray(batch))
    if (largest := int(patches[..., 3:].max())) > 1:
        raise FitError(f"step {step}: the masks of the batch hold {largest}, expected 0 and 1")
    return patches


def _check_state(state: dict[str, Any], config: FitConfig) -> None:
    missing = {"config", "step", "network", "average", "optimizer"} - set(state)
    if missing:
        raise FitError(f"state: not a training state, '{min(missing)}' is missing")
    # Precision and batch statistics follow the machine, which may be another one now.
    for name in (name for name in asdict(config) if name not in ("precision", "sync_batch_norm")):
        was, now = state["config"].get(name), getattr(config, name)
        if was != now:
            raise FitError(f"state: {name} was {was}, is {now} now; go on with the same settings or start anew")


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, list) else value
