"""Compiles the kernels of a network for a kind of GPU, of which none has to be there; prints how many they are.

`python -m tests.compiled 90 float16 hrnet18s_128`, in a process of its own: Triton's interpreter, by which other tests
run the kernels, takes what its compiler refuses.
"""

import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget

from model import kernels
from model.fused import FusedNetwork
from model.hrnet import CONFIGS, RefinementNetwork, fold, pad_channels


def main(capability: str, dtype: str, name: str) -> None:
    compiled = set()
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", int(capability), 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
        )
    )
    for kernel in (kernels._input_kernel, kernels._fuse_kernel, kernels._head_kernel):

        def compile_only(*operands, warmup, run=kernel.run, **options):
            made = run(*operands, warmup=True, **options)
            compiled.add(made.asm["cubin"])

        kernel.run = compile_only
    torch.cudnn_convolution_relu = F.conv2d
    torch.cudnn_convolution_add_relu = lambda x, weight, plus, alpha, *others: F.conv2d(x, weight, *others)
    network = fold(RefinementNetwork(CONFIGS[name]))
    if dtype != "float32":
        pad_channels(network)
    network.to(getattr(torch, dtype), memory_format=torch.channels_last)
    with torch.inference_mode():
        FusedNetwork(network)(torch.zeros(1, 64, 64, 4, dtype=torch.uint8))
    print(len(compiled))


if __name__ == "__main__":
    main(*sys.argv[1:])
