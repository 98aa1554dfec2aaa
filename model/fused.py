"""The folded network on a GPU: convolutions with bias, sum and ReLU in cuDNN, our own kernels between them.

Run layer by layer, HRNet spends more time on biases, ReLUs, sums and resizes than on convolutions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import kernels
from model.backend import UnsupportedError
from model.hrnet import BasicBlock, Bottleneck, FoldedHead, HRModule, RefinementNetwork

_MOST_NUMBERS = 2**31 - 1
"""In a tensor of cuDNN; torch cuts larger ones up, but not those of the calls that add and cut off as well."""


class FusedNetwork:
    """A folded network that lies on a CUDA device, channels last: the same function in fewer passes over memory.

    Sums of branches are rounded once instead of after each term; otherwise the arithmetic is the network's own.
    """

    def __init__(self, network: RefinementNetwork) -> None:
        assert isinstance(network.decode_head, FoldedHead), "expected a folded network"
        self.network, self.side = network, network.config.input_px
        stem = network.backbone.conv1
        self.dtype = stem.weight.dtype
        self.stem = nn.Conv2d(kernels.INPUT_CHANNELS, stem.out_channels, 3, 2, 1)
        more = kernels.INPUT_CHANNELS - stem.in_channels
        self.stem.weight = nn.Parameter(_channels_last(F.pad(stem.weight, (0, 0, 0, 0, 0, more))), requires_grad=False)
        self.stem.bias = stem.bias
        self.biases = {
            paths: torch.stack([_last(path).bias for path in paths if not isinstance(path, nn.Identity)]).sum(0)
            for module in network.modules()
            if isinstance(module, HRModule)
            for paths in module.fuse_layers
        }
        """Of all that meets in a branch, where branches are summed."""

    def __call__(self, patches: Tensor) -> Tensor:
        """Patches (N, P, P, 4) uint8 to the logits (N, 1, S/4, S/4) float32; UnsupportedError where N is too large."""
        backbone = self.network.backbone
        most = _MOST_NUMBERS // (self.stem.out_channels * (self.side // 2) ** 2)
        if len(patches) > most:
            raise UnsupportedError(f"batch_size is {len(patches)}: expected at most {most} of this network on a GPU")
        x = _conv_relu(kernels.network_input(patches, self.side, self.dtype), self.stem)
        x = _conv_relu(x, backbone.conv2)
        for block in backbone.layer1:
            x = _bottleneck(block, x)
        xs = [x]
        for number in (2, 3, 4):
            transition = backbone.get_submodule(f"transition{number - 1}")
            xs = [_chain(layer, xs[min(i, len(xs) - 1)]) for i, layer in enumerate(transition.children())]
            for module in backbone.get_submodule(f"stage{number}"):
                xs = self._module(module, xs)
        return self._head(self.network.decode_head, xs)

    def _module(self, module: HRModule, xs: list[Tensor]) -> list[Tensor]:
        branches = []
        for branch, x in zip(module.branches, xs):
            for block in branch:
                x = _basic_block(block, x)
            branches.append(x)
        return [
            kernels.fuse(
                branches[i],
                [_open_chain(path, x) for j, (path, x) in enumerate(zip(paths, branches)) if j != i],
                self.biases[paths],
            )
            for i, paths in enumerate(module.fuse_layers)
        ]

    def _head(self, head: FoldedHead, xs: list[Tensor]) -> Tensor:
        base, *terms = [F.conv2d(x, conv.weight) for conv, x in zip(head.per_branch, xs)]
        weight = head.difference.weight.flatten()
        return kernels.head(base, terms, head.per_branch[0].bias, weight, head.difference.bias)


def _channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def _conv_relu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, 1)


def _conv_add_relu(x: Tensor, conv: nn.Conv2d, plus: Tensor) -> Tensor:
    return torch.cudnn_convolution_add_relu(
        x, conv.weight, plus, 1.0, conv.bias, conv.stride, conv.padding, conv.dilation, 1
    )


def _basic_block(block: BasicBlock, x: Tensor) -> Tensor:
    return _conv_add_relu(_conv_relu(x, block.conv1), block.conv2, x)


def _bottleneck(block: Bottleneck, x: Tensor) -> Tensor:
    y = _conv_relu(_conv_relu(x, block.conv1), block.conv2)
    if isinstance(block.downsample, nn.Identity):
        return _conv_add_relu(y, block.conv3, x)
    # Both end in a convolution, whose biases come together at the second.
    shortcut = block.downsample[0]
    widened = F.conv2d(x, shortcut.weight)
    return torch.cudnn_convolution_add_relu(
        y, block.conv3.weight, widened, 1.0, block.conv3.bias + shortcut.bias, (1, 1), (0, 0), (1, 1), 1
    )


def _convolutions(path: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in path.modules() if isinstance(layer, nn.Conv2d)]


def _last(path: nn.Module) -> nn.Conv2d:
    return _convolutions(path)[-1]


def _chain(path: nn.Module, x: Tensor) -> Tensor:
    """Convolutions that each end in a ReLU."""
    for conv in _convolutions(path):
        x = _conv_relu(x, conv)
    return x


def _open_chain(path: nn.Module, x: Tensor) -> Tensor:
    """As `_chain`, but the last one without bias and ReLU: a sum follows, which adds both."""
    *first, last = _convolutions(path)
    for conv in first:
        x = _conv_relu(x, conv)
    return F.conv2d(x, last.weight, None, last.stride, last.padding)
