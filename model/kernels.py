"""What lies between the convolutions on a GPU, each a single pass over memory: input, sums of branches, head.

Written in Triton, which comes with torch for CUDA. Tensors are channels last; sums are taken in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.preprocess import MEAN_RGB, STD_RGB, taps

INPUT_CHANNELS = 8
"""Of the network's input: image and mask are four, and the matrix units take eight at a time."""


OPTIONS = {"enable_fp_fusion": True}
"""A product and a sum are rounded once. Triton's own default changes with its version, and with it the last bits."""


@triton.jit
def _channel(words, shift):
    return (words[:, None] >> shift) & 255


@triton.jit
def _input_kernel(
    patches, lows, highs, low_weights, high_weights, out, total,
    patch_px: tl.constexpr, side: tl.constexpr, channels: tl.constexpr, block: tl.constexpr,
    mean_r: tl.constexpr, mean_g: tl.constexpr, mean_b: tl.constexpr,
    std_r: tl.constexpr, std_g: tl.constexpr, std_b: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = pixel < total
    x, y, patch = pixel % side, pixel // side % side, pixel // (side * side)
    left, right = tl.load(lows + x), tl.load(highs + x)
    upper, lower = tl.load(lows + y), tl.load(highs + y)
    # A patch's pixel is one word of four bytes.
    start = patches + patch * patch_px * patch_px
    upper_left = tl.load(start + upper * patch_px + left, mask=inside, other=0)
    upper_right = tl.load(start + upper * patch_px + right, mask=inside, other=0)
    lower_left = tl.load(start + lower * patch_px + left, mask=inside, other=0)
    lower_right = tl.load(start + lower * patch_px + right, mask=inside, other=0)
    nearest = tl.load(start + (y * patch_px // side) * patch_px + x * patch_px // side, mask=inside, other=0)
    channel = tl.arange(0, channels)[None, :]
    shift = channel % 4 * 8
    # As `resize_fixed_point` does it.
    weight_left, weight_right = tl.load(low_weights + x)[:, None], tl.load(high_weights + x)[:, None]
    weight_upper, weight_lower = tl.load(low_weights + y)[:, None], tl.load(high_weights + y)[:, None]
    upper_row = (_channel(upper_left, shift) * weight_left + _channel(upper_right, shift) * weight_right) >> 4
    lower_row = (_channel(lower_left, shift) * weight_left + _channel(lower_right, shift) * weight_right) >> 4
    image = (((upper_row * weight_upper) >> 16) + ((lower_row * weight_lower) >> 16) + 2) >> 2
    mean = tl.where(channel == 0, mean_r, tl.where(channel == 1, mean_g, mean_b))
    std = tl.where(channel == 0, std_r, tl.where(channel == 1, std_g, std_b))
    value = tl.where(channel < 3, (image.to(tl.float32) - mean) / std, 0.0)
    value = tl.where(channel == 3, _channel(nearest, shift).to(tl.float32) * 2 - 1, value)
    tl.store(out + pixel[:, None] * channels + channel, value.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _resized(term, frame, y, x, channel, inside, side: tl.constexpr, channels: tl.constexpr, ratio: tl.constexpr):
    """Pixels (y, x) of a term, enlarged bilinearly by `ratio` to `side`, in float32 (pixels, channels)."""
    small: tl.constexpr = side // ratio
    start = term + (frame * small * small * channels)[:, None] + channel
    if ratio == 1:
        return tl.load(start + ((y * side + x) * channels)[:, None], mask=inside, other=0).to(tl.float32)
    source_y = tl.maximum((y.to(tl.float32) + 0.5) / ratio - 0.5, 0.0)
    source_x = tl.maximum((x.to(tl.float32) + 0.5) / ratio - 0.5, 0.0)
    upper, left = source_y.to(tl.int32), source_x.to(tl.int32)
    lower, right = tl.minimum(upper + 1, small - 1), tl.minimum(left + 1, small - 1)
    down, across = (source_y - upper)[:, None], (source_x - left)[:, None]
    upper_left = tl.load(start + ((upper * small + left) * channels)[:, None], mask=inside, other=0).to(tl.float32)
    upper_right = tl.load(start + ((upper * small + right) * channels)[:, None], mask=inside, other=0).to(tl.float32)
    lower_left = tl.load(start + ((lower * small + left) * channels)[:, None], mask=inside, other=0).to(tl.float32)
    lower_right = tl.load(start + ((lower * small + right) * channels)[:, None], mask=inside, other=0).to(tl.float32)
    above = upper_left * (1 - across) + upper_right * across
    below = lower_left * (1 - across) + lower_right * across
    return above * (1 - down) + below * down


@triton.jit
def _total(
    base, first, second, third, bias, pixel, total, channel, side: tl.constexpr, channels: tl.constexpr,
    ratio_1: tl.constexpr, ratio_2: tl.constexpr, ratio_3: tl.constexpr,
):  # fmt: skip
    """relu(base + bias + up to three terms), each enlarged by its ratio; a ratio of 0 stands for none."""
    frame, y, x = pixel // (side * side), (pixel // side % side).to(tl.int32), (pixel % side).to(tl.int32)
    inside = (pixel < total)[:, None] & (channel < channels)
    value = tl.load(bias + channel, mask=channel < channels, other=0).to(tl.float32)
    value += _resized(base, frame, y, x, channel, inside, side, channels, 1)
    if ratio_1 > 0:
        value += _resized(first, frame, y, x, channel, inside, side, channels, ratio_1)
    if ratio_2 > 0:
        value += _resized(second, frame, y, x, channel, inside, side, channels, ratio_2)
    if ratio_3 > 0:
        value += _resized(third, frame, y, x, channel, inside, side, channels, ratio_3)
    return tl.maximum(value, 0.0), inside


@triton.jit
def _fuse_kernel(
    base, first, second, third, bias, out, total, side: tl.constexpr, channels: tl.constexpr,
    ratio_1: tl.constexpr, ratio_2: tl.constexpr, ratio_3: tl.constexpr, block: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    channel = tl.arange(0, width)[None, :]
    value, inside = _total(
        base, first, second, third, bias, pixel, total, channel, side, channels, ratio_1, ratio_2, ratio_3
    )
    tl.store(out + pixel[:, None] * channels + channel, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _head_kernel(
    base, first, second, third, bias, weight, offset, out, total, side: tl.constexpr, channels: tl.constexpr,
    ratio_1: tl.constexpr, ratio_2: tl.constexpr, ratio_3: tl.constexpr, block: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    logit = tl.zeros((block,), tl.float32) + tl.load(offset).to(tl.float32)
    for start in range(0, channels, width):
        channel = start + tl.arange(0, width)[None, :]
        value, _ = _total(
            base, first, second, third, bias, pixel, total, channel, side, channels, ratio_1, ratio_2, ratio_3
        )
        logit += tl.sum(value * tl.load(weight + channel, mask=channel < channels, other=0).to(tl.float32), 1)
    tl.store(out + pixel, logit, mask=pixel < total)


def network_input(patches: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Patches (N, P, P, 4) uint8 to the network input (N, INPUT_CHANNELS, side, side), channels last.

    The first four channels are those of `preprocess.network_input`, the others zero.
    """
    count, patch_px = patches.shape[:2]
    out = torch.empty((count, side, side, INPUT_CHANNELS), dtype=dtype, device=patches.device)
    total, block = count * side * side, 256
    _input_kernel[(triton.cdiv(total, block),)](
        patches.view(torch.int32), *taps(patch_px, side, patches.device), out, total,
        patch_px, side, INPUT_CHANNELS, block, *MEAN_RGB, *STD_RGB, **OPTIONS,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def fuse(base: Tensor, terms: Sequence[Tensor], bias: Tensor) -> Tensor:
    """relu(base + terms + bias): `base` (N, C, H, H); up to three terms of its size, or a whole fraction of it."""
    count, channels, side, _ = base.shape
    out, total = torch.empty_like(base), count * side * side
    width = triton.next_power_of_2(channels)
    block = max(8, min(64, 2048 // width))
    _fuse_kernel[(triton.cdiv(total, block),)](
        *_operands(base, terms), bias, out, total, side, channels, *_ratios(base, terms), block, width, **OPTIONS
    )
    return out


def head(base: Tensor, terms: Sequence[Tensor], bias: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """The logit (N, 1, H, H) float32: `weight` (C,) times what `fuse` would give, plus `offset` (1,)."""
    count, channels, side, _ = base.shape
    out, total = torch.empty((count, 1, side, side), device=base.device), count * side * side
    width, block = 32, 64
    _head_kernel[(triton.cdiv(total, block),)](
        *_operands(base, terms), bias, weight, offset, out, total, side, channels, *_ratios(base, terms), block, width,
        **OPTIONS,
    )  # fmt: skip
    return out


def _operands(base: Tensor, terms: Sequence[Tensor]) -> list[Tensor]:
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (base, *terms)), "expected channels last"
    return [base, *terms, *[base] * (3 - len(terms))]


def _ratios(base: Tensor, terms: Sequence[Tensor]) -> list[int]:
    return [*(base.shape[2] // term.shape[2] for term in terms), *[0] * (3 - len(terms))]
