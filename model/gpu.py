"""Inference on an accelerator: crops travel as uint8, everything else happens on the device, copies beside it."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from model.cpu import fixed_point
from model.hrnet import RefinementNetwork, output_resize
from model.preprocess import network_input

SIGN = 0x8000
"""Added to uint16 to make it int16, the wider of the two in torch's support."""


def on_device(network: RefinementNetwork, patches: Tensor, resize: Tensor) -> Tensor:
    """Patches (N, P, P, 4) uint8 to probabilities (N, P, P) int16, -32768 = 0 and 32767 = 1, on their device."""
    x = network_input(patches, network.config.input_px)
    return (fixed_point(network, x, resize) - SIGN).to(torch.int16)


class _Slot:
    """Memory of one batch under way: pinned on the host where there is a GPU, and its copies on the device."""

    def __init__(self, batch_size: int, patch_px: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        shape = (batch_size, patch_px, patch_px)
        self.host_patches = torch.zeros((*shape, 4), dtype=torch.uint8, pin_memory=pinned)
        self.host_result = torch.zeros(shape, dtype=torch.int16, pin_memory=pinned)
        self.patches = torch.zeros((*shape, 4), dtype=torch.uint8, device=device)
        self.result = torch.zeros(shape, dtype=torch.int16, device=device)
        self.loaded, self.computed, self.done = (torch.cuda.Event() if pinned else None for _ in range(3))

    def fill(self, part: np.ndarray) -> None:
        host = self.host_patches.numpy()
        host[: len(part)] = part
        host[len(part) :] = 0

    def read(self, out: np.ndarray) -> None:
        if self.done is not None:
            self.done.synchronize()
        out[:] = self.host_result[: len(out)].numpy().view(np.uint16) ^ SIGN


class _Cuda:
    """Runs slots on a GPU: one CUDA graph of the whole computation, and a stream each for either way of copying."""

    def __init__(self, network: RefinementNetwork, slot: _Slot, resize: Tensor) -> None:
        device = slot.patches.device
        self.compute, self.upload, self.download = (torch.cuda.Stream(device) for _ in range(3))
        self.patches, self.result = torch.zeros_like(slot.patches), torch.zeros_like(slot.result)
        self.graph, self.resize = torch.cuda.CUDAGraph(), resize
        # The same algorithms in every process, so the same bytes; and fp32 means fp32.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        self.compute.wait_stream(torch.cuda.current_stream(device))
        with exact, torch.cuda.device(device):
            with torch.cuda.stream(self.compute):
                # What libraries do when first called must not be part of a graph.
                for _ in range(3):
                    on_device(network, self.patches, resize)
            self.compute.synchronize()
            with torch.cuda.graph(self.graph, stream=self.compute, capture_error_mode="thread_local"):
                self.result.copy_(on_device(network, self.patches, resize))

    def start(self, slot: _Slot) -> None:
        with torch.cuda.stream(self.upload):
            slot.patches.copy_(slot.host_patches, non_blocking=True)
            slot.loaded.record()
        with torch.cuda.stream(self.compute):
            self.compute.wait_event(slot.loaded)
            self.patches.copy_(slot.patches)
            self.graph.replay()
            slot.result.copy_(self.result)
            slot.computed.record()
        with torch.cuda.stream(self.download):
            self.download.wait_event(slot.computed)
            slot.host_result.copy_(slot.result, non_blocking=True)
            slot.done.record()


class _Eager:
    """Runs slots on any device of torch, one after the other."""

    def __init__(self, network: RefinementNetwork, slot: _Slot, resize: Tensor) -> None:
        self.network, self.resize = network, resize

    def start(self, slot: _Slot) -> None:
        slot.patches.copy_(slot.host_patches)
        slot.host_result.copy_(on_device(self.network, slot.patches, self.resize))


class DeviceQueue:
    """Batches of one shape through a folded network on a device; while it computes one, others are copied.

    Two batches are under way at a time. The last one is filled up with empty patches. For one caller at a time.
    """

    def __init__(self, network: RefinementNetwork, batch_size: int) -> None:
        self.network, self.batch_size = network, batch_size
        self.device = network.backbone.conv1.weight.device
        self.ready: dict[int, tuple[_Cuda | _Eager, list[_Slot]]] = {}

    def probabilities(self, patches: np.ndarray) -> np.ndarray:
        """Foreground probabilities (N, P, P) uint16, 65535 = 1, of patches (N, P, P, 4) uint8."""
        out = np.empty(patches.shape[:3], np.uint16)
        with torch.inference_mode(), torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            runner, slots = self._prepared(patches.shape[1])
            free = deque(slots)
            under_way: deque[tuple[_Slot, np.ndarray]] = deque()

            def finish() -> None:
                slot, part = under_way.popleft()
                slot.read(part)
                free.append(slot)

            for start in range(0, len(patches), self.batch_size):
                if not free:
                    finish()
                slot = free.popleft()
                slot.fill(patches[start : start + self.batch_size])
                runner.start(slot)
                under_way.append((slot, out[start : start + self.batch_size]))
            while under_way:
                finish()
        return out

    def _prepared(self, patch_px: int) -> tuple[_Cuda | _Eager, list[_Slot]]:
        if patch_px not in self.ready:
            slots = [_Slot(self.batch_size, patch_px, self.device) for _ in range(2)]
            resize = output_resize(self.network.config.input_px, patch_px).to(self.device)
            runner = (_Cuda if self.device.type == "cuda" else _Eager)(self.network, slots[0], resize)
            self.ready[patch_px] = runner, slots
        return self.ready[patch_px]
