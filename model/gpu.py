"""Inference on an accelerator: crops travel as uint8, everything else happens on the device, copies beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from model.backend import UnsupportedError
from model.cpu import fixed_point
from model.hrnet import RefinementNetwork, output_resize
from model.parts import Parts
from model.preprocess import network_input

FP16_ROOM = 64
"""fp16 is taken where it has room for numbers so many times as large as the network's on the hardest patches."""

BATCHES_UNDER_WAY = 2
"""One that is computed, and one that is copied meanwhile; a third is being filled."""

Logits = Callable[[Tensor], Tensor]
"""Patches (N, P, P, 4) uint8 to the logits (N, 1, S/4, S/4) of a folded network."""


def has_bf16(device: torch.device) -> bool:
    """Whether a CUDA device calculates in bf16, as from compute capability 8.0; torch's own answer counts emulation."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


class LayerByLayer:
    """A folded network as torch runs it, one operation after the other; for any device and precision."""

    def __init__(self, network: RefinementNetwork) -> None:
        self.network = network

    def __call__(self, patches: Tensor) -> Tensor:
        x = network_input(patches, self.network.config.input_px)
        return self.network(x.to(self.network.backbone.conv1.weight.dtype))


@torch.inference_mode()
def suited_half(network: RefinementNetwork) -> Literal["fp16", "bf16"]:
    """The 16-bit precision for a folded network in fp32: fp16, which flips a fifth of the pixels that bf16 flips.

    What overflows in fp16 is lost without a trace, so bf16 where the network comes near its range on patches of noise
    and without any contrast.
    """
    weight, side = network.backbone.conv1.weight, network.config.input_px // 2
    patches = torch.randint(0, 256, (8, side, side, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    patches[2:4, ..., :3], patches[4:6, ..., :3] = 0, 255
    patches[..., 3] &= 1
    patches[1::2, ..., 3] = 1
    largest = [0.0]

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        largest.append(float(output.abs().max()))

    hooks = [layer.register_forward_hook(note) for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    LayerByLayer(network)(patches.to(weight.device))
    for hook in hooks:
        hook.remove()
    return "fp16" if max(largest) * FP16_ROOM < torch.finfo(torch.float16).max else "bf16"


def probabilities_on_device(logits_of: Logits, patches: Tensor, resize: Tensor) -> Tensor:
    """Patches (N, P, P, 4) uint8 to probabilities (N, P, P), 65535 = 1, on their device.

    They are int16 with the bits of uint16, with which torch calculates little.
    """
    return (fixed_point(logits_of(patches), resize) - 0x8000).to(torch.int16) ^ -0x8000


class _Slot:
    """Memory of one batch under way: pinned on the host where there is a GPU, and its copies on the device."""

    def __init__(self, batch_size: int, patch_px: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        shape = (batch_size, patch_px, patch_px)
        self.host_patches = torch.zeros((*shape, 4), dtype=torch.uint8, pin_memory=pinned)
        self.host_result = torch.zeros(shape, dtype=torch.int16, pin_memory=pinned)
        # Not zeroed: a kernel on this thread's stream could do that after the upload on another.
        self.patches, self.result = (
            torch.empty_like(host, device=device) for host in (self.host_patches, self.host_result)
        )
        # Who waits for a blocking event leaves the core to others.
        self.loaded, self.computed, self.done = (torch.cuda.Event(blocking=True) if pinned else None for _ in range(3))
        self.targets: list[tuple[_Block, int]] = []
        """The blocks its patches are of, and how many of each, in their order."""

    @property
    def count(self) -> int:
        return sum(count for _, count in self.targets)

    def fill(self, patches: Parts, start: int, block: _Block) -> int:
        """Take in as many patches from number `start` on as there is room for; returns their number."""
        count = patches.copy(start, self.host_patches.numpy()[self.count :])
        self.targets.append((block, count))
        return count

    def read(self) -> None:
        """Give the probabilities to the blocks, once they are there."""
        self.wait()
        result, start = self.host_result.numpy().view(np.uint16), 0
        for block, count in self.targets:
            block.take(result[start : start + count])
            start += count
        self.targets = []

    def wait(self) -> None:
        """Until the device has done with its memory."""
        if self.done is not None:
            self.done.synchronize()


class _Block:
    """The probabilities of a block of patches, as far as they are known."""

    def __init__(self, patches: Parts) -> None:
        self.probabilities = np.empty((len(patches), patches.side, patches.side), np.uint16)
        self.known = 0

    def take(self, more: np.ndarray) -> None:
        self.probabilities[self.known : self.known + len(more)] = more
        self.known += len(more)

    @property
    def complete(self) -> bool:
        return self.known == len(self.probabilities)


class _Cuda:
    """Runs slots on a GPU: one CUDA graph of the whole computation, and a stream each for either way of copying."""

    @torch.inference_mode()
    def __init__(self, logits_of: Logits, slot: _Slot, resize: Tensor) -> None:
        device = slot.patches.device
        self.compute, self.upload, self.download = (torch.cuda.Stream(device) for _ in range(3))
        self.patches, self.result = torch.zeros_like(slot.patches), torch.zeros_like(slot.result)
        # The graph goes on using what it was captured with.
        self.graph, self.held = torch.cuda.CUDAGraph(), (logits_of, resize)
        self.compute.wait_stream(torch.cuda.current_stream(device))
        with _exact(), torch.cuda.device(device):
            with torch.cuda.stream(self.compute):
                # What libraries do when first called must not be part of a graph.
                for _ in range(3):
                    probabilities_on_device(logits_of, self.patches, resize)
            self.compute.synchronize()
            with torch.cuda.graph(self.graph, stream=self.compute, capture_error_mode="thread_local"):
                self.result.copy_(probabilities_on_device(logits_of, self.patches, resize))

    @torch.inference_mode()
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


@contextmanager
def _exact() -> Iterator[None]:
    """Algorithms that are chosen without trying, so the same in every process, and fp32 that means fp32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    settings: list[tuple[Any, str, Any]] = [(cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    if hasattr(cudnn, "conv"):  # torch 2.9: `allow_tf32` raises where the process has used these
        settings += [(cudnn.conv, "fp32_precision", "ieee"), (matmul, "fp32_precision", "ieee")]
    else:
        settings += [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before):
            setattr(owner, name, value)


class _Eager:
    """Runs slots on any device of torch, one after the other."""

    def __init__(self, logits_of: Logits, slot: _Slot, resize: Tensor) -> None:
        self.logits_of, self.resize = logits_of, resize

    @torch.inference_mode()
    def start(self, slot: _Slot) -> None:
        slot.patches.copy_(slot.host_patches)
        slot.host_result.copy_(probabilities_on_device(self.logits_of, slot.patches, self.resize))


class DeviceQueue:
    """Batches of one shape through a folded network on a device; while it computes one, others are copied.

    Two batches are under way at a time. They are filled across blocks of patches, and the very last one up with empty
    patches. For one thread at a time.
    """

    def __init__(self, network: RefinementNetwork, batch_size: int, logits_of: Logits | None = None) -> None:
        """`logits_of` is the way to run the network, layer by layer unless given."""
        self.network, self.batch_size = network, batch_size
        self.logits_of = logits_of or LayerByLayer(network)
        self.device = network.backbone.conv1.weight.device
        self.ready: dict[int, tuple[_Cuda | _Eager, list[_Slot]]] = {}
        self.batches = 0
        """That it has begun so far."""

    def each(self, blocks: Iterable[Parts]) -> Iterator[np.ndarray]:
        """Of each block of patches the foreground probabilities (N, P, P) uint16, 65535 = 1; one P for all."""
        begun: deque[_Block] = deque()
        under_way: deque[_Slot] = deque()
        filling: _Slot | None = None
        idle: list[_Slot] = []
        try:
            for patches in blocks:
                block, taken = _Block(patches), 0
                begun.append(block)
                runner, idle = self._prepared(patches.side)
                while taken < len(patches):
                    filling = filling or self._slot(idle, patches.side)
                    taken += filling.fill(patches, taken, block)
                    if filling.count == self.batch_size:
                        if len(under_way) == BATCHES_UNDER_WAY:
                            idle.append(_finished(under_way))
                        self._start(runner, filling, under_way)
                        filling = None
                        yield from _known(begun)
                yield from _known(begun)
            if filling is not None:
                # By numpy: torch refuses where the memory was made in the caller's inference mode, and that has ended.
                filling.host_patches.numpy()[filling.count :] = 0
                self._start(runner, filling, under_way)
                filling = None
            while under_way:
                idle.append(_finished(under_way))
            yield from _known(begun)
        finally:
            # Left early: what the device still writes to must not be given to anybody else.
            for slot in (*under_way, *([filling] if filling is not None else ())):
                slot.wait()
                slot.targets = []
                idle.append(slot)

    def _start(self, runner: _Cuda | _Eager, slot: _Slot, under_way: deque[_Slot]) -> None:
        runner.start(slot)
        under_way.append(slot)
        self.batches += 1

    def _slot(self, idle: list[_Slot], patch_px: int) -> _Slot:
        if idle:
            return idle.pop()
        with self._memory():
            return _Slot(self.batch_size, patch_px, self.device)

    def _prepared(self, patch_px: int) -> tuple[_Cuda | _Eager, list[_Slot]]:
        """What runs batches of such patches, and slots that nobody uses."""
        if patch_px not in self.ready:
            with self._memory():
                slot = _Slot(self.batch_size, patch_px, self.device)
                resize = output_resize(self.network.config.input_px, patch_px).to(self.device)
                runner = (_Cuda if self.device.type == "cuda" else _Eager)(self.logits_of, slot, resize)
            self.ready[patch_px] = runner, [slot]
        return self.ready[patch_px]

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Say in one line that the device has no memory left; a lower batch would give other bytes without a word."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise UnsupportedError(
                f"batch_size is {self.batch_size}, for which {self.device} has no memory left: expected a lower one,"
                " or less beside it on the device"
            ) from None


def _known(begun: deque[_Block]) -> Iterator[np.ndarray]:
    """Take blocks off the front, as long as they are complete, and yield their probabilities."""
    while begun and begun[0].complete:
        yield begun.popleft().probabilities


def _finished(under_way: deque[_Slot]) -> _Slot:
    slot = under_way.popleft()
    slot.read()
    return slot
