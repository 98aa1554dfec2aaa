"""uint8 patches to the network's input: OpenCV's resize, bit for bit on every device, and normalisation."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
import torch
from torch import Tensor

MEAN_RGB = (123.675, 116.28, 103.53)
STD_RGB = (58.395, 57.12, 57.375)
"""ImageNet statistics on the 0..255 scale, with which the published checkpoints were trained."""


# A CUDA graph goes on using what it was captured with: these are never dropped.
@cache
def taps(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    i0, i1, w0, w1 = taps(x.shape[2], side, x.device)
    x = x.to(torch.int32)
    rows = (x[:, :, i0] * w0[:, None] + x[:, :, i1] * w1[:, None]) >> 4
    i0, i1, w0, w1 = taps(x.shape[1], side, x.device)
    low = (rows[:, i0] * w0[:, None, None]) >> 16
    high = (rows[:, i1] * w1[:, None, None]) >> 16
    return ((low + high + 2) >> 2).to(torch.uint8)


def resize_patches(patches: np.ndarray, side: int) -> np.ndarray:
    """Patches (N, P, P, 4) uint8 to (N, side, side, 4) uint8: the image as OpenCV does it, the mask by nearest."""
    out = np.empty((len(patches), side, side, 4), np.uint8)
    nearest = np.arange(side) * patches.shape[1] // side
    for resized, patch in zip(out, patches):
        resized[..., :3] = cv2.resize(patch[..., :3], (side, side))
        resized[..., 3] = patch[..., 3][nearest[:, None], nearest]
    return out


def network_input(patches: Tensor, side: int) -> Tensor:
    """Patches (N, P, P, 4) uint8, RGB and coarse mask 0/1, to the normalised network input (N, 4, side, side) float32.

    The image is resized on uint8 as OpenCV does it, the mask by nearest neighbour; memory is laid out channels last.
    """
    out = torch.empty((len(patches), side, side, 4), dtype=torch.float32, device=patches.device)
    mean, std = _statistics(patches.device)
    torch.sub(resize_uint8(patches[..., :3], side), mean, out=out[..., :3])
    out[..., :3].div_(std)
    nearest = torch.arange(side, device=patches.device) * patches.shape[1] // side
    out[..., 3] = patches[:, nearest][:, :, nearest, 3].mul(2.0).sub_(1.0)
    return out.permute(0, 3, 1, 2)


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(MEAN_RGB, device=device), torch.tensor(STD_RGB, device=device)
