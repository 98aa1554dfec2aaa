"""The training loop: patches in, a trained network out. Knows neither files nor Ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from model.hrnet import CONFIGS, RefinementNetwork
from model.refiner import network_input


class FitError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


@dataclass(frozen=True)
class FitConfig:
    """A short schedule for a machine without a GPU: AdamW, warm-up, cosine decay, averaged weights."""

    network: str = "hrnet18s_128"
    patch_px: int = 64
    """Side of the patches at inference; smaller ones in training are shown at the same magnification."""
    steps: int = 3000
    """Batches to train on."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup_steps: int = 100
    clip_norm: float = 2.0
    """Gradients are scaled down to this L2 norm."""
    ema_decay: float = 0.995
    """Decay per step of the weight average that is returned."""
    seed: int = 0


def fit(
    config: FitConfig,
    batches: Iterable[np.ndarray],
    report: Callable[[int, float, RefinementNetwork], None],
    start: RefinementNetwork | None = None,
) -> RefinementNetwork:
    """Train a network, from scratch or from `start`, and return its weight average, in eval mode.

    Each batch is (N, P, P, 5) uint8: RGB, coarse mask 0/1, target mask 0/1; P may differ between batches. `report` is
    called after each step with the step's number from 1, its loss, and the averaged network so far. The loss is the
    reference's: softmax cross-entropy at the network's input resolution. Raises FitError for a loss that is not
    finite, or when the batches end early.
    """
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = start or RefinementNetwork(CONFIGS[config.network])
    network = network.to(device, memory_format=torch.channels_last).train()
    average = deepcopy(network).eval().requires_grad_(False)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
    )

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / config.warmup_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    iterator = iter(batches)
    for step in range(1, config.steps + 1):
        batch = next(iterator, None)
        if batch is None:
            raise FitError(f"the batches ended after {step - 1} of {config.steps} steps")
        patches = torch.from_numpy(batch).to(device)
        x = network_input(patches[..., :4], network.config.input_px * patches.shape[1] // config.patch_px)
        target = patches[..., 4].long().repeat_interleave(x.shape[2] // patches.shape[1], 1)
        target = target.repeat_interleave(x.shape[3] // patches.shape[2], 2)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(x)
        loss = F.cross_entropy(F.interpolate(logits.float(), size=x.shape[2:], mode="bilinear"), target)
        if not torch.isfinite(loss):
            raise FitError(f"step {step}: the loss is {loss.item()}; lower the learning rate ({config.learning_rate})")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimizer.step()
        schedule.step()
        _average_into(average, network, min(config.ema_decay, step / (step + 10)))
        report(step, loss.item(), average)
    return average


@torch.no_grad()
def _average_into(average: RefinementNetwork, network: RefinementNetwork, decay: float) -> None:
    for kept, new in zip(average.state_dict().values(), network.state_dict().values()):
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)
