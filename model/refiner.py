"""The refiner: uint8 patches in, foreground probabilities out; and whole images for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from model import checkpoint
from model.backend import Backend, Precision, UnsupportedError, resolve_backend
from model.cpu import BatchPool, TorchNetwork, computes_in_bf16
from model.gpu import DeviceQueue, has_bf16, suited_half
from model.hrnet import RefinementNetwork, fold, pad_channels
from model.parts import Parts

if TYPE_CHECKING:
    from pipeline.guard import GuardConfig

CPU_BATCH = {"openvino": 4, "torch": 16}
"""Patches of a batch on a CPU in fp32, twice as many in 16 bits: the smallest that come near the full rate."""

GPU_BATCH_PIXELS = 1024 * 128 * 128
"""The same on a GPU, in pixels of the network's input: 1024 patches of 128 x 128 px."""


def suited_precision(network: RefinementNetwork, device: torch.device, backend: str) -> Literal["fp32", "bf16", "fp16"]:
    """What `auto` is for a folded network in fp32 on a device, run by a backend (see `Refiner`)."""
    if device.type == "cuda":
        half = suited_half(network)
        return half if half == "fp16" or has_bf16(device) else "fp32"
    if device.type != "cpu" or not computes_in_bf16():
        return "fp32"
    if backend == "openvino":
        from model.openvino_backend import can_calculate_in

        return "bf16" if can_calculate_in("bf16") else "fp32"
    return "bf16"


class Refiner:
    """A network ready for inference on one device.

    Its results do not depend on which patches share a batch: every batch has the same shape, the last one being filled
    up with empty patches. On a CPU every batch runs on one thread, so they do not depend on the number of threads.
    """

    def __init__(
        self,
        network: RefinementNetwork,
        device: str | torch.device | None = None,
        precision: Precision = "auto",
        batch_size: int | None = None,
        flip: bool = False,
        backend: Backend = "auto",
        threads: int | None = None,
    ) -> None:
        """`device` defaults to the GPU where there is one.

        `auto` precision is fp16 on a CUDA device (bf16, or fp32 where it has no bf16, for weights whose numbers would
        come near its range), bf16 on a CPU that computes in it, else fp32. `batch_size` is in patches; the default
        suits the device. With `flip`, answers to each patch and its mirror image are averaged, at twice the cost.
        `backend` is the library that runs the network; `auto` is OpenVINO on a CPU where it is installed, Triton beside
        torch on a CUDA device where it can run, else torch. In fp32 they differ by less than 1e-4 in probability.
        `threads` are those of a CPU, torch's number by default. The network is folded in place. Raises UnsupportedError
        for a backend or precision that is not at hand.
        """
        if precision not in get_args(Precision):
            raise UnsupportedError(f"precision is {precision!r}: expected one of {', '.join(get_args(Precision))}")
        if batch_size is not None and batch_size < 1:
            raise UnsupportedError(f"batch_size is {batch_size}: expected at least 1")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_cpu = self.device.type == "cpu"
        self.backend = resolve_backend(backend, self.device.type)
        self.config = network.config
        self.flip = flip
        self.network = fold(network).to(self.device, memory_format=torch.channels_last)
        self.precision = suited_precision(self.network, self.device, self.backend) if precision == "auto" else precision
        if self.precision == "bf16" and self.device.type == "cuda" and not has_bf16(self.device):
            raise UnsupportedError("precision is 'bf16', in which this GPU cannot calculate: expected fp16 or fp32")
        self.batch_size = batch_size or self._suited_batch()
        threads = threads or torch.get_num_threads()
        if self.backend == "openvino":
            from model.openvino_backend import OpenVinoNetwork

            openvino = OpenVinoNetwork(self.network, self.precision, self.batch_size, threads)
            self._inference: BatchPool | DeviceQueue = BatchPool(openvino, threads)
            return
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        if not on_cpu and dtype != torch.float32:
            pad_channels(self.network)
        self.network.to(self.device, dtype, memory_format=torch.channels_last)
        if on_cpu:
            self._inference = BatchPool(TorchNetwork(self.network, self.batch_size), threads)
        elif self.backend == "triton":
            from model.fused import FusedNetwork

            with torch.cuda.device(self.device):
                self._inference = DeviceQueue(self.network, self.batch_size, FusedNetwork(self.network))
        else:
            self._inference = DeviceQueue(self.network, self.batch_size)

    def _suited_batch(self) -> int:
        if self.device.type != "cpu":
            return max(1, GPU_BATCH_PIXELS // self.config.input_px**2)
        return CPU_BATCH[self.backend] * (1 if self.precision == "fp32" else 2)

    @property
    def arithmetic(self) -> str:
        """What the last bits of probabilities depend on: device type, backend, precision; as in `cpu openvino fp32`."""
        return f"{self.device.type} {self.backend} {self.precision}"

    @property
    def places(self) -> int:
        """Patches that the batches begun so far had room for."""
        return self._inference.batches * self.batch_size

    @classmethod
    def from_checkpoint(
        cls,
        path_or_name: str = "hrnet18s_128",
        device: str | torch.device | None = None,
        precision: Precision = "auto",
        batch_size: int | None = None,
        flip: bool = False,
        backend: Backend = "auto",
        threads: int | None = None,
    ) -> Refiner:
        """From the reference's `.pth`, our `.safetensors`, or the name of bundled weights; see `checkpoint.load`."""
        return cls(checkpoint.load(path_or_name), device, precision, batch_size, flip, backend, threads)

    def probabilities(self, *patches: np.ndarray) -> np.ndarray:
        """Foreground probabilities (N, P, P) uint16, 65535 = 1, of patches (n, P, P, 4) uint8: RGB, coarse mask 0/1.

        Several arrays are taken one after the other, N patches in all.
        """
        return next(self.each([patches]))

    def each(self, blocks: Iterable[Sequence[np.ndarray]]) -> Iterator[np.ndarray]:
        """As `probabilities`, of one block of arrays after the other.

        A GPU fills its batches across blocks and goes on to the next while the last is copied, so that a block's
        probabilities may come after the next block has been asked for.
        """
        if not self.flip:
            yield from self._inference.each(Parts(*block) for block in blocks)
            return
        both = (Parts(*block, *(part[:, :, ::-1] for part in block)) for block in blocks)
        for found in self._inference.each(both):
            plain, mirrored = np.split(found, 2)
            yield ((plain.astype(np.uint32) + mirrored[:, :, ::-1] + 1) >> 1).astype(np.uint16)

    def refine(
        self, image: np.ndarray, masks: np.ndarray, nms_threshold: float = 0.25, guard: GuardConfig | None = None
    ) -> np.ndarray:
        """Refine the masks of one image.

        `image` is (H, W, 3) uint8 RGB, `masks` (N, H, W) or (H, W) bool or integer, any non-zero value being the
        object. Returns an array of the masks' shape and dtype, 0 or 1. Masks that `guard` (default `GuardConfig()` of
        pipeline/guard.py) passes over or rejects come back as they were. Raises ValueError where shapes or types do not
        fit.
        """
        # The one look back from model/ to pipeline/: everything else here works on patches alone.
        from pipeline.stages import refine_image

        return refine_image(self, image, masks, nms_threshold, guard)
