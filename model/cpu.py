"""Inference on a CPU: as many threads as there are cores, each of which runs whole batches alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from model.heap import keep_freed_memory
from model.hrnet import RefinementNetwork, output_resize
from model.parts import Parts
from model.preprocess import network_input

LAYER_BYTES = 1 << 30
"""Free memory that is kept from one layer of the network to the next."""


class BatchNetwork(Protocol):
    """A network that takes batches of `batch_size` patches, from several threads at once."""

    batch_size: int

    def prepare(self, patch_px: int) -> None:
        """What must be done once before patches of a side."""

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Probabilities (N, P, P) uint16 of one full batch (N, P, P, 4) uint8."""


def computes_in_bf16() -> bool:
    """Whether this CPU has instructions for bf16 (AVX512-BF16, AMX).

    One without can run it all the same, slower than fp32, so the libraries' "supported" does not tell. False also where
    torch is too old to know.
    """
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def fixed_point(logits: torch.Tensor, resize: torch.Tensor) -> torch.Tensor:
    """Logits (N, 1, S/4, S/4) of a folded network to probabilities (N, P, P) int32, 65535 = 1.

    `resize` is the `output_resize` of the patches.
    """
    return torch.sigmoid(resize @ logits.float() @ resize.T)[:, 0].mul_(65535).round_().to(torch.int32)


class TorchNetwork:
    """A folded network run by torch on the CPU, each batch on the calling thread's number of threads."""

    def __init__(self, network: RefinementNetwork, batch_size: int) -> None:
        keep_freed_memory(LAYER_BYTES, one_arena=True)
        self.network, self.batch_size = network, batch_size
        self.resizes: dict[int, torch.Tensor] = {}

    def prepare(self, patch_px: int) -> None:
        if patch_px not in self.resizes:
            self.resizes[patch_px] = output_resize(self.network.config.input_px, patch_px)

    @torch.inference_mode()
    def __call__(self, patches: np.ndarray) -> np.ndarray:
        x = network_input(torch.from_numpy(patches), self.network.config.input_px)
        logits = self.network(x.to(self.network.backbone.conv1.weight.dtype))
        return fixed_point(logits, self.resizes[patches.shape[1]]).numpy().astype(np.uint16)


def _alone() -> None:
    """Let torch use no other thread for what this one does."""
    # Until a thread has asked, torch gives it the number that was set last anywhere, and only when it first works.
    torch.get_num_threads()
    torch.set_num_threads(1)


class BatchPool:
    """Deals patches out to threads in batches of one shape, the last one being filled up with empty patches.

    Threads that share a batch wait for each other after every layer; when something else needs a core for a moment,
    all of them stand still.
    """

    def __init__(self, network: BatchNetwork, threads: int) -> None:
        self.network, self.process = network, os.getpid()
        before = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(threads, initializer=_alone)
        self.batches = 0
        """That it has dealt out so far."""
        # The setting sticks to the threads that made it; for everybody else it is put back.
        for started in [self.pool.submit(time.sleep, 0.01) for _ in range(threads)]:
            started.result()
        torch.set_num_threads(before)

    def each(self, blocks: Iterable[Parts]) -> Iterator[np.ndarray]:
        """Of each block of patches the foreground probabilities (N, P, P) uint16, 65535 = 1."""
        return map(self._probabilities, blocks)

    def _probabilities(self, patches: Parts) -> np.ndarray:
        if os.getpid() != self.process:  # its threads have stayed there: it would wait for them for ever
            raise RuntimeError("this network was loaded before a fork: load it in each process, started by 'spawn'")
        side, size = patches.side, self.network.batch_size
        out = np.empty((len(patches), side, side), np.uint16)
        self.network.prepare(side)

        def one_batch(start: int) -> None:
            batch = np.empty((size, side, side, 4), np.uint8)
            count = patches.copy(start, batch)
            batch[count:] = 0
            out[start : start + count] = self.network(batch)[:count]

        starts = range(0, len(patches), size)
        self.batches += len(starts)
        for _ in self.pool.map(one_batch, starts):
            pass
        return out
