"""Load and save weights: the reference's `.pth` files and our own safetensors, checked key by key."""

from __future__ import annotations

import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from model.bundled import CheckpointError, missing, resolve
from model.hrnet import CONFIGS, NetworkConfig, RefinementNetwork

BACKBONE = "backbone."
CLASSIFIER = ("incre_modules", "downsamp_modules", "final_layer", "classifier")
"""Where the backbone's keys lie, and what ImageNet checkpoints of HRNet hold beside them."""


def load(path_or_name: str, data: bytes | None = None) -> RefinementNetwork:
    """Build the network a checkpoint was made for and load it, in eval mode on the CPU, float32.

    `path_or_name` is a local path or the name of bundled weights; `data` gives the file's bytes where the caller has
    read them from elsewhere (the path then only names it in errors). Files ending in `.safetensors` are ours,
    everything else is read by torch with `weights_only=True`: zip or legacy format, with or without the `module.`
    prefix.

    Raises CheckpointError for a file of another kind or another network, FileNotFoundError for a missing one.
    """
    path, state = _read(path_or_name, data)
    config = recognise(state, path)
    network = RefinementNetwork(config)
    _check(state, network.state_dict(), config, path)
    network.load_state_dict(state)
    return network.eval()


def load_backbone(path_or_name: str, network: RefinementNetwork, data: bytes | None = None) -> RefinementNetwork:
    """Load the backbone of another checkpoint into an unfolded `network`, in place, and return it.

    Meant for the ImageNet weights that the reference starts from, open-mmlab's `hrnetv2_w18_small-*.pth` and
    `hrnetv2_w48-*.pth`: plain keys (`conv1.weight`, `stage2...`) beside a classifier, or keys under `backbone.` beside
    other parts; those others are left aside. The image half of the stem loads as it is; such files hold no mask half,
    and `conv_mask` stays as initialised, as in the reference. `path_or_name` and `data` are those of `load`.

    Raises CheckpointError with the first key that does not fit, FileNotFoundError for a missing file.
    """
    path, state = _read(path_or_name, data)
    if any(key.startswith(BACKBONE) for key in state):
        state = {key.removeprefix(BACKBONE): value for key, value in state.items() if key.startswith(BACKBONE)}
    state = {key: value for key, value in state.items() if key.split(".")[0] not in CLASSIFIER}
    expected = network.backbone.state_dict()
    # Refinement checkpoints have a mask stem; files written by old versions of torch lack the counters.
    optional = {key for key in expected if key == "conv_mask.weight" or key.endswith("num_batches_tracked")}
    absent = optional - state.keys()
    _check(state, {key: value for key, value in expected.items() if key not in absent}, network.config, path)
    network.backbone.load_state_dict(state, strict=False)
    return network


def as_safetensors(network: RefinementNetwork, card: dict[str, Any]) -> bytes:
    """An unfolded network as the bytes of a safetensors file, in half precision as far as its numbers fit.

    `card` (data, steps, figures) goes into the file's metadata as json.
    """
    state = {key: _halved(value).contiguous() for key, value in network.state_dict().items()}
    # One entry, as the format does not keep their order: the same weights are to be the same bytes.
    metadata = {"card": json.dumps({"config": network.config.name, **card}, sort_keys=True)}
    return save_safetensors(state, metadata=metadata)


def _halved(value: Tensor) -> Tensor:
    half = value.half() if value.is_floating_point() else value
    return half if half.isfinite().all() else value


def recognise(state: dict[str, Tensor], path: str) -> NetworkConfig:
    """Which published configuration a state dict belongs to, told by the head's width (unique to each)."""
    key = "decode_head.conv_seg.weight"
    by_width = {sum(config.stages[-1][2]): config for config in CONFIGS.values()}
    if key not in state:
        raise CheckpointError(
            f"{path}: missing key '{key}'; not a boundary refinement checkpoint ({len(state)} entries)"
        )
    shape = _shape(state[key])
    if len(shape) != 4 or shape[1] not in by_width:
        expected = ", ".join(f"{c.name} has (2, {w}, 1, 1)" for w, c in by_width.items())
        raise CheckpointError(f"{path}: key '{key}' has shape {shape}; {expected}")
    return by_width[shape[1]]


def _check(state: dict[str, Tensor], expected: dict[str, Tensor], config: NetworkConfig, path: str) -> None:
    for key, value in expected.items():
        if key not in state:
            raise CheckpointError(f"{path}: missing key '{key}' of {config.name}")
        found = state[key]
        if found.shape != value.shape:
            raise CheckpointError(
                f"{path}: key '{key}' has shape {_shape(found)}, {config.name} expects {tuple(value.shape)}"
            )
        if found.layout != torch.strided or found.device.type != "cpu" or found.is_quantized or found.is_complex():
            raise CheckpointError(f"{path}: key '{key}' has other values than plain numbers")
        # A network with such a weight has no opinion on any pixel, and says so nowhere.
        if found.is_floating_point() and not found.float().isfinite().all():
            raise CheckpointError(f"{path}: key '{key}' has values that are no finite numbers")
    for key in state:
        if key not in expected:
            raise CheckpointError(f"{path}: unexpected key {key[:200]!r} for {config.name}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Its first sizes: a file may claim any number of them."""
    return tuple(tensor.shape)[:8]


def _read(path_or_name: str, data: bytes | None) -> tuple[str, dict[str, Tensor]]:
    path = resolve(path_or_name)
    if data is None:
        if not Path(path).is_file():
            raise FileNotFoundError(missing(path_or_name))
        data = Path(path).read_bytes()
    return path, _read_safetensors(path, data) if path.endswith(".safetensors") else _read_torch(path, data)


def _read_safetensors(path: str, data: bytes) -> dict[str, Tensor]:
    try:
        return load_safetensors(data)
    except (SafetensorError, ArithmeticError, KeyError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({_reason(error)})") from None


def _read_torch(path: str, data: bytes) -> dict[str, Tensor]:
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for each way a file can be broken
        # torch's own sentence on this advises to run the code.
        reason = _held(error) if isinstance(error, pickle.UnpicklingError) else _reason(error)
        raise CheckpointError(f"{path}: not a torch checkpoint that loads without running code ({reason})") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: expected {{'state_dict': {{name: tensor}}}} or {{name: tensor}}")
    # Not made float here: of a value that says how large it is, no more is believed than its shape, until that fits.
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _held(error: pickle.UnpicklingError) -> str:
    """What a file holds beside tensors and plain values, such as an array in its `meta`, and what to do about it."""
    found = re.search(r"Unsupported global: GLOBAL ([\w.]{1,100}) ", str(error))
    return f"it holds {found[1]}: save its 'state_dict' alone" if found else type(error).__name__


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return "".join(filter(str.isprintable, lines[0][:200])) if lines else type(error).__name__
