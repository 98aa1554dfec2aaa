import os
import pickle
import random

import numpy as np
import pytest
import torch

from model import checkpoint
from model.checkpoint import CheckpointError
from model.hrnet import CONFIGS, RefinementNetwork
from tests.conftest import seeded_network


@pytest.fixture(scope="module")
def state():
    return seeded_network().state_dict()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "module."])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "with meta"])
def test_every_form_of_a_published_checkpoint_loads(tmp_path, state, legacy, prefix, wrapped):
    content = {prefix + key: value for key, value in state.items()}
    if wrapped:
        content = {"meta": {"epoch": 1, "CLASSES": ("a", "b")}, "state_dict": content}
    path = tmp_path / "w.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    loaded = checkpoint.load(str(path))
    assert loaded.config.name == "hrnet18s_128"
    assert not loaded.training
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_the_larger_network_is_recognised_from_its_shapes(tmp_path):
    path = tmp_path / "large.pth"
    torch.save(RefinementNetwork(CONFIGS["hrnet48_256"]).state_dict(), path)
    assert checkpoint.load(str(path)).config.name == "hrnet48_256"


def test_safetensors_keep_weights_to_half_precision_and_the_card(tmp_path, state):
    path = tmp_path / "w.safetensors"
    path.write_bytes(checkpoint.as_safetensors(seeded_network(), {"steps": 7}))
    loaded = checkpoint.load(str(path))
    for key, value in loaded.state_dict().items():
        assert torch.allclose(value.double(), state[key].double(), rtol=1e-3, atol=1e-6)
    assert b'\\"steps\\": 7' in path.read_bytes()[:2000]


def test_a_number_beyond_half_precision_is_kept_in_full(tmp_path):
    network, path = seeded_network(), tmp_path / "w.safetensors"
    network.backbone.bn1.running_var[0] = 7e4
    path.write_bytes(checkpoint.as_safetensors(network, {}))
    loaded = checkpoint.load(str(path)).backbone
    assert loaded.bn1.running_var[0] == 7e4
    assert torch.equal(loaded.bn2.running_var, network.backbone.bn2.running_var.half().float())


def _saved(tmp_path, state, change):
    state = dict(state)
    change(state)
    path = tmp_path / "w.pth"
    torch.save({"state_dict": state}, path)
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("backbone.bn1.bias"), "missing key 'backbone.bn1.bias'"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected key 'extra'"),
        (
            lambda s: s.update({"backbone.conv1.weight": torch.zeros(64, 4, 3, 3)}),
            r"'backbone.conv1.weight' has shape \(64, 4",
        ),
        (lambda s: s.pop("decode_head.conv_seg.weight"), "missing key 'decode_head.conv_seg.weight'"),
        (lambda s: s.update({"decode_head.conv_seg.weight": torch.zeros(2, 99, 1, 1)}), r"has shape \(2, 99, 1, 1\)"),
    ],
)
def test_a_checkpoint_of_another_network_names_the_first_wrong_key(tmp_path, state, change, message):
    path = _saved(tmp_path, state, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(path)
    assert path in str(caught.value)


class _Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickled_code_is_refused_and_not_run(tmp_path, legacy):
    path, marker = tmp_path / "w.pth", tmp_path / "pwned"
    torch.save({"state_dict": _Attack(str(marker))}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"without running code \(UnpicklingError\)$"):
        checkpoint.load(str(path))
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_checkpoint_with_an_array_in_its_meta_is_refused_with_what_to_do(tmp_path, legacy):
    path = tmp_path / "iter_80000.pth"
    content = {"meta": {"PALETTE": np.zeros((2, 3))}, "state_dict": {"x": torch.zeros(1)}}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"it holds numpy\S+: save its 'state_dict' alone\)$"):
        checkpoint.load(str(path))


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps([1, 2])], ids=["empty", "text", "list"])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(str(path))


def test_a_missing_checkpoint_lists_the_bundled_ones():
    with pytest.raises(FileNotFoundError, match="no_such_net: no such checkpoint file, nor bundled weights"):
        checkpoint.load("no_such_net")


def _imagenet_state(state):
    """What a published ImageNet file of HRNet holds: the backbone without mask stem, beside a classifier."""
    backbone = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    plain = {key: value for key, value in backbone.items() if key != "conv_mask.weight"}
    heads = ("incre_modules.0.0.conv1", "downsamp_modules.0.0", "final_layer.0", "classifier")
    return plain | {f"{head}.weight": torch.zeros(3) for head in heads}


def _without_counters(state):
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _under_backbone(state):
    return {f"backbone.{key}": value for key, value in state.items()} | {"head.fc.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    "form",
    [
        lambda s: s,
        lambda s: {"state_dict": s},
        lambda s: {"meta": {}, "state_dict": _under_backbone(s)},
        lambda s: {f"module.{key}": value for key, value in s.items()},
        _without_counters,
    ],
    ids=["plain", "state_dict", "backbone.", "module.", "without counters"],
)
def test_a_pretrained_backbone_loads_and_leaves_mask_stem_and_head(tmp_path, state, form):
    network = seeded_network(seed=1)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    path = tmp_path / "hrnetv2_w18_small.pth"
    torch.save(form(_imagenet_state(state)), path)
    assert checkpoint.load_backbone(str(path), network) is network
    for key, value in network.state_dict().items():
        own = key.startswith("decode_head.") or key == "backbone.conv_mask.weight"
        assert torch.equal(value, (before if own else state)[key]), key


def test_the_backbone_of_a_refinement_checkpoint_brings_its_mask_stem(tmp_path, state):
    path = tmp_path / "w.pth"
    torch.save({"state_dict": state}, path)
    network = checkpoint.load_backbone("elsewhere/w.pth", seeded_network(seed=1), path.read_bytes())
    assert torch.equal(network.backbone.conv_mask.weight, state["backbone.conv_mask.weight"])
    assert not torch.equal(network.decode_head.conv_seg.weight, state["decode_head.conv_seg.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bn1.bias"), r"w\.pth: missing key 'bn1.bias' of hrnet18s_128"),
        (lambda s: s.update({"fc.weight": torch.zeros(1)}), r"w\.pth: unexpected key 'fc.weight' for hrnet18s_128"),
        (
            lambda s: s.update({"transition1.0.0.weight": torch.zeros(48, 256, 3, 3)}),
            r"w\.pth: key 'transition1.0.0.weight' has shape \(48, 256, 3, 3\), hrnet18s_128 expects \(18, ",
        ),
        (lambda s: s.clear() or s.update({"features.0": torch.zeros(1)}), r"w\.pth: missing key 'conv1.weight'"),
    ],
)
def test_another_backbone_names_the_first_wrong_key_and_changes_nothing(tmp_path, state, change, message):
    network = seeded_network(seed=1)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    path = _saved(tmp_path, _imagenet_state(state), change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_backbone(path, network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_missing_backbone_is_a_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such checkpoint file"):
        checkpoint.load_backbone(str(tmp_path / "none.pth"), seeded_network())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda old: torch.full_like(old, float("nan")), r"'backbone.bn1.bias' has values that are no finite numbers"),
        (lambda old: old.half() * float("inf"), r"'backbone.bn1.bias' has values that are no finite numbers"),
        (lambda old: old.to(torch.complex64), r"'backbone.bn1.bias' has other values than plain numbers"),
        (lambda old: old.to_sparse(), r"'backbone.bn1.bias' has other values than plain numbers"),
        # 4 bytes in the file, and 256 TB when they are looked at.
        (lambda old: torch.zeros(1).expand(1 << 46), r"'backbone.bn1.bias' has shape \(70368744177664,\)"),
    ],
    ids=["nan", "inf", "complex", "sparse", "bomb"],
)
def test_weights_that_are_no_plain_finite_numbers_are_refused(tmp_path, state, value, message):
    key = "backbone.bn1.bias"
    path = _saved(tmp_path, state, lambda changed: changed.update({key: value(changed[key])}))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["w.pth", "legacy.pth", "w.safetensors"])
def test_a_damaged_checkpoint_loads_or_is_refused_in_one_line(tmp_path, state, name):
    path = tmp_path / name
    if name == "w.safetensors":
        path.write_bytes(checkpoint.as_safetensors(seeded_network(), {}))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name == "w.pth")
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = []
    for _ in range(40):
        data = bytearray(whole)
        # Most of a file is numbers; what says what they are is at its ends.
        for _ in range(rng.choice((1, 20))):
            data[rng.choice((rng.randrange(4000), -1 - rng.randrange(4000)))] ^= 1 << rng.randrange(8)
        try:
            checkpoint.load(name, bytes(data[: rng.choice((None, rng.randrange(len(data))))]))
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(message.startswith(name) and message.isprintable() for message in refused)
