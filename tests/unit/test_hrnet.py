import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import checkpoint
from model.hrnet import CONFIGS, RefinementNetwork, fold, multiply_adds, output_resize, pad_channels
from tests.conftest import seeded_network


@pytest.mark.parametrize(("name", "entries"), [("hrnet18s_128", 873), ("hrnet48_256", 1839)])
def test_every_published_key_has_its_name_and_shape(golden, name, entries):
    published = {}
    for line in (golden / f"{name}_keys.txt").read_text().splitlines():
        if not line.startswith("#"):
            key, shape, _ = line.split("\t")
            published[key] = tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
    ours = {key: tuple(value.shape) for key, value in RefinementNetwork(CONFIGS[name]).state_dict().items()}
    assert len(published) == entries
    assert ours == published


def test_features_and_logits_equal_the_references(golden):
    network = checkpoint.load(str(golden / "hrnet18s_128_seeded.pth"))
    expected = np.load(golden / "net_debug_hrnet18s_128.npz")
    with torch.inference_mode():
        x = torch.from_numpy(expected["x"])
        features, logits = network.backbone(x), network(x)
    for i, feature in enumerate(features):
        assert np.abs(feature.numpy() - expected[f"feat{i}"]).max() < 1e-4
    assert np.abs(logits.numpy() - expected["logits_low"]).max() < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_folding_changes_the_operations_but_not_the_function(name):
    network = seeded_network(name)
    x = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        two_classes = network(x)
        difference = fold(network)(x)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    expected = two_classes[:, 1:] - two_classes[:, :1]
    assert expected.std() > 0.01
    assert torch.allclose(difference, expected, atol=1e-4 * float(expected.abs().max()))


def test_widening_to_multiples_of_eight_channels_does_not_change_the_function():
    network = fold(seeded_network())
    x = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network(x)
        widened = pad_channels(network)(x)
    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(conv.weight.shape[0] % 8 == 0 for conv in convolutions if conv is not network.decode_head.difference)
    assert all(conv.weight.shape[1] % 8 == 0 for conv in convolutions if conv is not network.backbone.conv1)
    assert torch.allclose(widened, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("input_px", [128, 256])
def test_one_matrix_equals_the_two_output_resizes(input_px):
    logits = torch.randn(3, 1, input_px // 4, input_px // 4, generator=torch.Generator().manual_seed(2))
    up = F.interpolate(logits, size=(input_px, input_px), mode="bilinear", align_corners=False)
    expected = F.interpolate(up, size=(64, 64), mode="bilinear", align_corners=False)
    matrix = output_resize(input_px, 64)
    assert torch.allclose(matrix @ logits @ matrix.T, expected, atol=1e-5)


def test_multiply_adds_are_the_published_networks():
    small, large = (multiply_adds(RefinementNetwork(CONFIGS[name]).eval()) for name in ("hrnet18s_128", "hrnet48_256"))
    assert (round(small / 1e9, 2), round(large / 1e9, 1)) == (0.60, 23.3)
