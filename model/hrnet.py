"""HRNetV2 with the twin stem (image and coarse mask) and the FCN head, as boundary patch refinement trains it.

Module names and shapes are those of the published checkpoints, so a state dict loads without renaming.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

BN_EPS = 1e-5


@dataclass(frozen=True)
class NetworkConfig:
    """One published variant of the refinement network.

    `input_px` is the side S that a patch is resized to, `bottlenecks` the number of blocks in stage 1; `stages` holds,
    for stages 2 to 4, the number of modules, of basic blocks in each branch, and the channels of the branches.
    """

    name: str
    input_px: int
    bottlenecks: int
    stages: tuple[tuple[int, int, tuple[int, ...]], ...]


def _config(
    name: str, input_px: int, bottlenecks: int, blocks: int, modules: tuple[int, int, int], width: int
) -> NetworkConfig:
    stages = tuple((n, blocks, tuple(width << b for b in range(branches))) for n, branches in zip(modules, (2, 3, 4)))
    return NetworkConfig(name, input_px, bottlenecks, stages)


CONFIGS = {
    config.name: config
    for config in (
        _config("hrnet18s_128", 128, bottlenecks=2, blocks=2, modules=(1, 3, 2), width=18),
        _config("hrnet48_256", 256, bottlenecks=4, blocks=4, modules=(1, 4, 3), width=48),
    )
}


def _bn(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BN_EPS)


def _conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), _bn(c_out)]


class BasicBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(channels, channels, 3)
        self.conv2, self.bn2 = _conv_bn(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)).add_(x), inplace=True)


class Bottleneck(nn.Module):
    def __init__(self, c_in: int, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(c_in, channels, 1)
        self.conv2, self.bn2 = _conv_bn(channels, channels, 3)
        self.conv3, self.bn3 = _conv_bn(channels, 4 * channels, 1)
        self.downsample = nn.Sequential(*_conv_bn(c_in, 4 * channels, 1)) if c_in != 4 * channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)).add_(self.downsample(x)), inplace=True)


def _fuse_path(widths: tuple[int, ...], source: int, target: int) -> nn.Module:
    """From branch `source` to the resolution and width of branch `target` (upsampling is left to the caller)."""
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(*_conv_bn(widths[source], widths[target], 1))
    steps: list[nn.Module] = []
    for step in range(source, target):
        last = step + 1 == target
        c_out = widths[target] if last else widths[source]
        steps.append(nn.Sequential(*_conv_bn(widths[source], c_out, 3, stride=2), *([] if last else [nn.ReLU(True)])))
    return nn.Sequential(*steps)


class HRModule(nn.Module):
    """Parallel branches of basic blocks, then every branch receives the sum of all, in branch order."""

    def __init__(self, blocks: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(w) for _ in range(blocks))) for w in widths)
        n = range(len(widths))
        self.fuse_layers = nn.ModuleList(nn.ModuleList(_fuse_path(widths, j, i) for j in n) for i in n)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        xs = [branch(x) for branch, x in zip(self.branches, xs)]
        fused = []
        for i, paths in enumerate(self.fuse_layers):
            terms = [path(x) for path, x in zip(paths, xs)]
            terms[i + 1 :] = [_resize(term, xs[i].shape[2:]) for term in terms[i + 1 :]]
            total = terms[0] + terms[1]
            for term in terms[2:]:
                total += term
            fused.append(F.relu(total, inplace=True))
        return fused


def _resize(x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _transition(before: tuple[int, ...], after: tuple[int, ...]) -> nn.ModuleList:
    """Existing branches change width where needed; new ones start from the last branch at half its resolution."""
    layers: list[nn.Module] = []
    for i, width in enumerate(after):
        if i >= len(before):
            layers.append(nn.Sequential(nn.Sequential(*_conv_bn(before[-1], width, 3, stride=2), nn.ReLU(True))))
        elif width != before[i]:
            layers.append(nn.Sequential(*_conv_bn(before[i], width, 3), nn.ReLU(True)))
        else:
            layers.append(nn.Identity())
    return nn.ModuleList(layers)


class Backbone(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(3, 64, 3, stride=2)
        self.conv2, self.bn2 = _conv_bn(64, 64, 3, stride=2)
        self.layer1 = nn.Sequential(*(Bottleneck(64 if i == 0 else 256, 64) for i in range(config.bottlenecks)))
        widths: tuple[int, ...] = (256,)
        for number, (modules, blocks, after) in enumerate(config.stages, start=2):
            self.add_module(f"transition{number - 1}", _transition(widths, after))
            self.add_module(f"stage{number}", nn.Sequential(*(HRModule(blocks, after) for _ in range(modules))))
            widths = after
        self.conv_mask: nn.Conv2d | None = nn.Conv2d(1, 64, 3, 2, 1, bias=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        # Folding merges the twin stem into one four-channel convolution and drops conv_mask.
        stem = self.conv1(x) if self.conv_mask is None else self.conv1(x[:, :3]) + self.conv_mask(x[:, 3:])
        x = F.relu(self.bn1(stem), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        xs = [self.layer1(x)]
        for number in (2, 3, 4):
            transition = self.get_submodule(f"transition{number - 1}")
            xs = [layer(xs[min(i, len(xs) - 1)]) for i, layer in enumerate(transition.children())]
            xs = self.get_submodule(f"stage{number}")(xs)
        return xs


class ConvBNReLU(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = _conv_bn(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Head(nn.Module):
    """All branches at the first one's resolution, one 1x1 convolution, two classes (background, foreground)."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.convs = nn.ModuleList([ConvBNReLU(sum(widths))])
        self.conv_seg = nn.Conv2d(sum(widths), 2, 1)

    def forward(self, xs: list[Tensor]) -> Tensor:
        x = torch.cat([xs[0], *(_resize(x, xs[0].shape[2:]) for x in xs[1:])], dim=1)
        return self.conv_seg(self.convs[0](x))


class FoldedHead(nn.Module):
    """The same function as `Head` with one output channel, the logit difference foreground - background.

    A 1x1 convolution commutes with bilinear resizing, so each branch is convolved at its own resolution and the results
    are resized and summed; the concatenation of all channels at full resolution never exists.
    """

    def __init__(self, head: Head, widths: tuple[int, ...]) -> None:
        super().__init__()
        mixed = fuse_conv_bn_eval(head.convs[0].conv, head.convs[0].bn)
        self.per_branch = nn.ModuleList()
        for i, weight in enumerate(mixed.weight.split(widths, dim=1)):
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=i == 0)
            conv.weight = nn.Parameter(weight.detach().clone())
            if i == 0:
                conv.bias = nn.Parameter(mixed.bias.detach().clone())
            self.per_branch.append(conv)
        self.difference = nn.Conv2d(mixed.weight.shape[0], 1, 1)
        self.difference.weight = nn.Parameter((head.conv_seg.weight[1:] - head.conv_seg.weight[:1]).detach().clone())
        self.difference.bias = nn.Parameter((head.conv_seg.bias[1:] - head.conv_seg.bias[:1]).detach().clone())

    def forward(self, xs: list[Tensor]) -> Tensor:
        total = self.per_branch[0](xs[0])
        for conv, x in zip(self.per_branch[1:], xs[1:]):
            total += _resize(conv(x), xs[0].shape[2:])
        return self.difference(F.relu(total, inplace=True))


class RefinementNetwork(nn.Module):
    """Normalised patches (N, 4, S, S) to logits (N, 2, S/4, S/4), before any output resize."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.widths = config.stages[-1][2]
        self.backbone = Backbone(config)
        self.decode_head: Head | FoldedHead = Head(self.widths)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.decode_head.conv_seg.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode_head(self.backbone(x))


def fold(network: RefinementNetwork) -> RefinementNetwork:
    """Turn a network into its inference form, in place: the same function, fewer operations.

    Batch normalisation goes into the convolutions, the twin stem becomes one convolution, and the head runs per branch
    with a single output channel. Returns the network in eval mode; its output is then (N, 1, S/4, S/4).
    """
    backbone = network.backbone
    assert backbone.conv_mask is not None, "the network is folded already"
    stem = nn.Conv2d(4, 64, 3, 2, 1, bias=False)
    stem.weight = nn.Parameter(torch.cat([backbone.conv1.weight, backbone.conv_mask.weight], dim=1).detach())
    backbone.conv1, backbone.conv_mask = stem, None
    network.eval()
    network.decode_head = FoldedHead(network.decode_head, network.widths)
    for parent in list(backbone.modules()):
        previous: tuple[str, nn.Module] | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and previous is not None:
                setattr(parent, previous[0], fuse_conv_bn_eval(previous[1], child))
                setattr(parent, name, nn.Identity())
            previous = (name, child) if isinstance(child, nn.Conv2d) else None
    return network.requires_grad_(False)


def pad_channels(network: RefinementNetwork) -> RefinementNetwork:
    """Widen a folded network in place by channels that stay zero, to multiples of eight: the same function.

    The matrix units of GPUs take 16-bit channels eight at a time; HRNet-18s has 18, 36 and 270. The four input channels
    and the one logit stay as they are.
    """
    outermost = network.backbone.conv1, network.decode_head.difference
    for conv in network.modules():
        if isinstance(conv, nn.Conv2d):
            more_out = 0 if conv is outermost[1] else -conv.out_channels % 8
            more_in = 0 if conv is outermost[0] else -conv.in_channels % 8
            conv.weight = nn.Parameter(F.pad(conv.weight, (0, 0, 0, 0, 0, more_in, 0, more_out)), requires_grad=False)
            if conv.bias is not None:
                conv.bias = nn.Parameter(F.pad(conv.bias, (0, more_out)), requires_grad=False)
            conv.out_channels += more_out
            conv.in_channels += more_in
    return network


def multiply_adds(network: RefinementNetwork) -> int:
    """Multiplications with a weight that one patch takes, before or after `fold`."""
    counts: list[int] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts.append(output[0, 0].numel() * layer.get_parameter("weight").numel())

    hooks = [layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 4, network.config.input_px, network.config.input_px))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts)


def output_resize(input_px: int, patch_px: int) -> Tensor:
    """The published output resizes, S/4 -> S -> patch side, as one matrix (patch_px, S/4) for S = `input_px`.

    Both are bilinear and separable, so `R @ logits @ R.T` equals applying them one after the other.
    """
    identity = torch.eye(input_px // 4)[None, None]
    up = F.interpolate(identity, size=(input_px, input_px // 4), mode="bilinear", align_corners=False)
    return F.interpolate(up, size=(patch_px, input_px // 4), mode="bilinear", align_corners=False)[0, 0]
