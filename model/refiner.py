"""The refiner: uint8 patches in, foreground probabilities out; and whole images for a notebook."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from model import checkpoint
from model.hrnet import RefinementNetwork, fold, output_resize

if TYPE_CHECKING:
    from pipeline.stages import GuardConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]

CPU_BATCH = 16
GPU_BATCH = 256
"""Patches per batch: the smallest that reach the full rate of a CPU and fill a large GPU."""

PROBABILITY_ONE = np.iinfo(np.uint16).max
"""Probabilities leave as uint16 fixed point: half the bytes of float32, and sums over patches are exact integers."""

MEAN_RGB = (123.675, 116.28, 103.53)
STD_RGB = (58.395, 57.12, 57.375)
"""ImageNet statistics on the 0..255 scale, with which the published checkpoints were trained."""


@lru_cache(maxsize=1)
def _keep_freed_memory() -> None:
    """Let this process keep the memory of one layer's output for the next.

    By default glibc returns large blocks to the system at once, and every layer faults its pages in anew: a fifth of
    the time on a CPU. 32 MiB is the largest threshold that glibc accepts. Elsewhere this does nothing.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
        libc.mallopt(m_mmap_threshold, 32 << 20)
        libc.mallopt(m_trim_threshold, 1 << 30)
        # The arenas of threads are given back whatever the threshold; one serves them all.
        libc.mallopt(m_arena_max, 1)


def _one_thread_per_batch() -> ThreadPoolExecutor:
    """As many threads as torch uses here, each of which runs whole batches alone.

    Threads that share a batch wait for each other after every layer; when something else needs a core for a moment,
    all of them stand still.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    # The setting sticks to the threads that made it; for everybody else it is put back.
    for started in [pool.submit(time.sleep, 0.01) for _ in range(threads)]:
        started.result()
    torch.set_num_threads(threads)
    return pool


@lru_cache(maxsize=16)
def _taps(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each of `target` samples: the two source indices and their 11-bit fixed-point weights, as OpenCV has them."""
    position = (np.arange(target, dtype=np.float32) + 0.5) * np.float32(source / target) - 0.5
    low = np.floor(position).astype(np.int64)
    weight = np.rint((position - low) * 2048).astype(np.int32)
    parts = low.clip(0, source - 1), (low + 1).clip(0, source - 1), 2048 - weight, weight
    i0, i1, w0, w1 = (torch.from_numpy(part).to(device) for part in parts)
    return i0, i1, w0, w1


def resize_uint8(x: Tensor, side: int) -> Tensor:
    """Bilinear resize to (side, side) with the fixed-point arithmetic of OpenCV's INTER_LINEAR on uint8.

    `x` is (N, H, W, C) uint8; the result (N, side, side, C) uint8 equals `cv2.resize` bit for bit, on any device:
    11-bit weights, rows first, four bits dropped between the passes. OpenCV itself does it where the data is on the
    CPU.
    """
    if x.device.type == "cpu":
        return torch.from_numpy(np.stack([cv2.resize(patch, (side, side)) for patch in x.numpy()]))
    return resize_fixed_point(x, side)


def resize_fixed_point(x: Tensor, side: int) -> Tensor:
    """`resize_uint8` in torch operations alone, for accelerators."""
    i0, i1, w0, w1 = _taps(x.shape[2], side, x.device)
    x = x.to(torch.int32)
    rows = (x[:, :, i0] * w0[:, None] + x[:, :, i1] * w1[:, None]) >> 4
    i0, i1, w0, w1 = _taps(x.shape[1], side, x.device)
    low = (rows[:, i0] * w0[:, None, None]) >> 16
    high = (rows[:, i1] * w1[:, None, None]) >> 16
    return ((low + high + 2) >> 2).to(torch.uint8)


def network_input(patches: Tensor, side: int) -> Tensor:
    """Patches (N, P, P, 4) uint8, RGB and coarse mask 0/1, to the normalised network input (N, 4, side, side) float32.

    The image is resized on uint8 as OpenCV does it, the mask by nearest neighbour; memory is laid out channels last.
    """
    out = torch.empty((len(patches), side, side, 4), dtype=torch.float32, device=patches.device)
    mean, std = (torch.tensor(values, device=patches.device) for values in (MEAN_RGB, STD_RGB))
    torch.sub(resize_uint8(patches[..., :3], side), mean, out=out[..., :3])
    out[..., :3].div_(std)
    nearest = torch.arange(side, device=patches.device) * patches.shape[1] // side
    out[..., 3] = patches[:, nearest][:, :, nearest, 3].mul(2.0).sub_(1.0)
    return out.permute(0, 3, 1, 2)


class Refiner:
    """A network ready for inference on one device.

    Its results do not depend on which patches share a batch: every batch has the same shape, the last one being filled
    up with empty patches.
    """

    def __init__(
        self,
        network: RefinementNetwork,
        device: str | torch.device | None = None,
        precision: Precision = "auto",
        batch_size: int | None = None,
        flip: bool = False,
    ) -> None:
        """`device` defaults to the GPU where there is one; `auto` precision is fp32 on a CPU and bf16 on a GPU.

        `batch_size` is in patches; the default suits the device. With `flip`, answers to each patch and its mirror
        image are averaged, at twice the cost. The network is folded in place.
        """
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_gpu = self.device.type == "cuda"
        self._map: Callable[..., Iterable[None]] = map
        if not on_gpu:
            _keep_freed_memory()
            self._map = _one_thread_per_batch().map
        self.precision = ("bf16" if on_gpu else "fp32") if precision == "auto" else precision
        self.batch_size = batch_size or (GPU_BATCH if on_gpu else CPU_BATCH)
        self.flip = flip
        self.config = network.config
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        self.network = fold(network).to(self.device, self.dtype, memory_format=torch.channels_last)

    @classmethod
    def from_checkpoint(
        cls,
        path_or_name: str = "hrnet18s_128",
        device: str | torch.device | None = None,
        precision: Precision = "auto",
        batch_size: int | None = None,
        flip: bool = False,
    ) -> Refiner:
        """From the reference's `.pth`, our `.safetensors`, or the name of bundled weights; see `checkpoint.load`."""
        return cls(checkpoint.load(path_or_name), device, precision, batch_size, flip)

    def probabilities(self, patches: np.ndarray) -> np.ndarray:
        """Foreground probabilities (N, P, P) uint16, 65535 = 1, of patches (N, P, P, 4) uint8: RGB, coarse mask 0/1."""
        if not self.flip:
            return self._probabilities(patches)
        mirrored = self._probabilities(np.ascontiguousarray(patches[:, :, ::-1]))[:, :, ::-1]
        return ((self._probabilities(patches).astype(np.uint32) + mirrored + 1) >> 1).astype(np.uint16)

    def _probabilities(self, patches: np.ndarray) -> np.ndarray:
        out = np.empty(patches.shape[:3], np.uint16)
        resize = output_resize(self.config.input_px, patches.shape[1]).to(self.device)

        @torch.inference_mode()
        def one_batch(start: int) -> None:
            part = patches[start : start + self.batch_size]
            missing = self.batch_size - len(part)
            full = np.concatenate([part, np.zeros((missing, *part.shape[1:]), np.uint8)]) if missing else part
            x = network_input(torch.from_numpy(full).to(self.device), self.config.input_px)
            logits = self.network(x.to(self.dtype)).float()
            probability = torch.sigmoid(resize @ logits @ resize.T)[:, 0]
            fixed_point = probability.mul_(PROBABILITY_ONE).round_().to(torch.int32).cpu().numpy()
            out[start : start + len(part)] = fixed_point[: len(part)]

        for _ in self._map(one_batch, range(0, len(patches), self.batch_size)):
            pass
        return out

    def refine(
        self, image: np.ndarray, masks: np.ndarray, nms_threshold: float = 0.25, guard: GuardConfig | None = None
    ) -> np.ndarray:
        """Refine the masks of one image.

        `image` is (H, W, 3) uint8 RGB, `masks` (N, H, W) or (H, W) bool or integer, any non-zero value being the
        object. Returns an array of the masks' shape and dtype, 0 or 1. Masks that `guard` (default `GuardConfig()` of
        pipeline/guard.py) passes over or rejects come back as they were. Raises ValueError where shapes do not fit.
        """
        # The one look back from model/ to pipeline/: everything else here works on patches alone.
        from pipeline.stages import refine_image

        return refine_image(self, image, masks, nms_threshold, guard)
