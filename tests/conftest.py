"""What several rooms' tests share: seeded networks, generated objects, and the reference's outputs where at hand."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch

from model.hrnet import CONFIGS, NetworkConfig, RefinementNetwork

# Read when Triton is first imported: without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the reference's outputs, kept outside the repository."""
    if not GOLDEN.is_dir():
        pytest.skip(f"the reference's outputs are not at {GOLDEN}")
    return GOLDEN


def golden_cases(golden: Path) -> Iterator[tuple[dict[str, Any], Mapping[str, np.ndarray]]]:
    """Every case that the reference could refine: its entry in `cases.json`, and its outputs."""
    for case in json.loads((golden / "inputs" / "cases.json").read_text()):
        path = golden / "cases" / f"{case['name']}.npz"
        if path.exists():
            yield case, np.load(path)


def peak_kib() -> int:
    """The largest size that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> 10 if sys.platform == "darwin" else peak  # macOS tells bytes


def seeded_network(config: str | NetworkConfig = "hrnet18s_128", seed: int = 0) -> RefinementNetwork:
    """A network with random weights and lively batch statistics, in eval mode: folding it wrongly shows."""
    torch.manual_seed(seed)
    network = RefinementNetwork(CONFIGS[config] if isinstance(config, str) else config)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.4, 0.8)
            torch.nn.init.uniform_(module.bias, -0.1, 0.1)
    torch.nn.init.normal_(network.decode_head.conv_seg.weight, std=0.1)
    return network.eval()


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the published form (`meta`, `state_dict`) with seeded weights."""
    path = tmp_path_factory.mktemp("checkpoint") / "seeded.pth"
    torch.save({"meta": {"CLASSES": ("background", "foreground")}, "state_dict": seeded_network().state_dict()}, path)
    return path


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, on disk and in memory."""
    return str(tmp_path) if request.param == "local" else f"memory://{uuid4().hex}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One small cluster for each file of tests that runs jobs on Ray."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


def random_patches(count: int, side: int = 64, seed: int = 0) -> np.ndarray:
    """(count, side, side, 4) uint8: noise as image, 0/1 noise as coarse mask."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (count, side, side, 4), dtype=np.uint8)
    patches[..., 3] &= 1
    return patches


def blob(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth random object (height, width) uint8 0/1, not empty."""
    ys, xs = np.mgrid[:height, :width]
    cx, cy = rng.uniform(0.3, 0.7) * width, rng.uniform(0.3, 0.7) * height
    angle = np.arctan2(ys - cy, xs - cx)
    radius = min(height, width) * 0.3 * (1 + 0.3 * np.sin(3 * angle + rng.uniform(0, 6)) * rng.uniform(0.2, 1))
    return ((xs - cx) ** 2 + (ys - cy) ** 2 < radius**2).astype(np.uint8)
