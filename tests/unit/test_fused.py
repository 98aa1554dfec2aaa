"""The way through the network on a GPU; where there is none, Triton's interpreter runs its kernels on the CPU."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.backend import UnsupportedError
from model.gpu import DeviceQueue
from model.hrnet import NetworkConfig, RefinementNetwork, fold, pad_channels
from model.parts import Parts
from model.preprocess import MEAN_RGB, STD_RGB, network_input, resize_fixed_point
from tests.conftest import random_patches, seeded_network

pytest.importorskip("triton", reason="Triton is not installed")

from model import kernels
from model.fused import FusedNetwork

WIDTHS = (18, 36, 72, 144)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _cudnn_or_what_it_does(monkeypatch):
    if DEVICE == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return

    def conv_relu(x, weight, bias, stride, padding, dilation, groups):
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def conv_add_relu(x, weight, plus, alpha, bias, stride, padding, dilation, groups):
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * plus)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)


def folded(padded: bool = False) -> RefinementNetwork:
    """A small one: every kind of layer, but few pixels for the interpreter."""
    network = fold(
        seeded_network(NetworkConfig("small", 64, 2, ((1, 1, (18, 36)), (1, 1, (18, 36, 72)), (1, 1, WIDTHS))))
    )
    if padded:
        pad_channels(network)
    return network.to(DEVICE, memory_format=torch.channels_last)


def patches_on_device(count: int, side: int = 64) -> torch.Tensor:
    return torch.from_numpy(random_patches(count, side)).to(DEVICE)


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padded", [False, True])
@torch.inference_mode()
def test_the_fused_network_is_the_same_function(padded):
    network, patches = folded(padded), patches_on_device(2, 32)
    expected = network(network_input(patches, 64))
    found = FusedNetwork(network)(patches)
    assert expected.std() > 0.1
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("patch_px", "side"), [(64, 128), (50, 128), (80, 64)])
def test_its_input_is_opencvs_bit_for_bit(patch_px, side):
    patches = patches_on_device(2, patch_px)
    found = kernels.network_input(patches, side, torch.float32)
    assert torch.allclose(found[:, :4], network_input(patches, side), atol=1e-6)
    unscaled = kernels.network_input(patches, side, torch.float32)[:, :3].permute(0, 2, 3, 1).cpu()
    levels = unscaled * torch.tensor(STD_RGB) + torch.tensor(MEAN_RGB)
    assert torch.equal(levels.round().to(torch.uint8), resize_fixed_point(patches[..., :3], side).cpu())
    assert not found[:, 4:].any()


@pytest.mark.parametrize("ratios", [(2, 4, 8), (1, 2, 4), (1, 1, 2), (1, 1, 1), (2,), (1,)])
def test_branches_of_any_size_are_summed(ratios):
    side, channels = 16, 18
    base, bias = channels_last(2, channels, side, side), torch.randn(channels, device=DEVICE)
    terms = [channels_last(2, channels, side // ratio, side // ratio) for ratio in ratios]
    grown = [F.interpolate(term, size=(side, side), mode="bilinear", align_corners=False) for term in terms]
    expected = F.relu(base + sum(grown) + bias[:, None, None])
    assert torch.allclose(kernels.fuse(base, terms, bias), expected, atol=1e-5)
    weight, offset = torch.randn(channels, device=DEVICE), torch.randn(1, device=DEVICE)
    logit = (expected * weight[:, None, None]).sum(1, keepdim=True) + offset
    assert torch.allclose(kernels.head(base, terms, bias, weight, offset), logit, atol=1e-4)


def test_a_batch_that_cudnn_cannot_count_is_named():
    with pytest.raises(UnsupportedError, match="batch_size is 8192: expected at most 8191 of this network on a GPU"):
        FusedNetwork(fold(seeded_network()))(torch.empty((8192, 64, 64, 4), dtype=torch.uint8, device="meta"))


def test_it_takes_the_place_of_layers_in_a_queue():
    network, patches = folded(), random_patches(3, 32)
    (layered,) = DeviceQueue(network, batch_size=2).each([Parts(patches)])
    (found,) = DeviceQueue(network, 2, FusedNetwork(network)).each([Parts(patches[:1], patches[1:])])
    assert np.abs(found.astype(np.int32) - layered).max() < 1e-4 * 65535


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize(
    ("capability", "dtype", "name"),
    [("75", "float16", "hrnet18s_128"), ("80", "float32", "hrnet18s_128"), ("90", "bfloat16", "hrnet48_256")],
)
def test_the_compiler_takes_the_kernels_for_gpus_that_are_not_here(tmp_path, capability, dtype, name):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "tests.compiled", capability, dtype, name],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Each is compiled when the network is first called.
    assert int(done.stdout) <= 12
