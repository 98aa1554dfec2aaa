import subprocess
import sys

import numpy as np
import pytest
import torch

from model import Refiner
from model.backend import resolve_backend
from tests.conftest import random_patches, seeded_network

needs_openvino = pytest.mark.skipif(resolve_backend("auto") != "openvino", reason="OpenVINO is not installed")


@needs_openvino
@pytest.mark.parametrize(
    ("name", "scale", "patch_px"),
    [
        ("hrnet18s_128", 1.0, 64),
        ("hrnet18s_128", 1.0, 80),
        pytest.param("hrnet48_256", 0.02, 64, marks=pytest.mark.slow),
    ],
)
def test_probabilities_equal_torchs(name, scale, patch_px):
    patches, found = random_patches(2, patch_px), []
    for library in ("torch", "openvino"):
        network = seeded_network(name)
        with torch.no_grad():  # the logits of random weights in so deep a network reach hundreds
            network.decode_head.conv_seg.weight.mul_(scale)
        found.append(Refiner(network, "cpu", "fp32", batch_size=1, backend=library).probabilities(patches))
    torchs, openvinos = found
    assert 0.01 * 65535 < torchs.std() < 0.4 * 65535
    assert np.abs(torchs.astype(np.int32) - openvinos).max() < 1e-4 * 65535


@needs_openvino
def test_probabilities_do_not_depend_on_the_batch_size():
    patches = random_patches(7)
    one, four = (
        Refiner(seeded_network(), device="cpu", backend="openvino", batch_size=size).probabilities(patches)
        for size in (1, 4)
    )
    assert np.array_equal(one, four)


@needs_openvino
def test_loading_openvino_does_not_load_what_reports_its_use():
    code = "import sys; from model import openvino_backend as b; b.can_calculate_in('bf16'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "openvino" in loaded
    assert not [name for name in loaded if name.startswith("openvino_telemetry")]


@needs_openvino
def test_a_precision_that_the_cpu_lacks_is_refused_where_asked_for_and_else_not_taken(monkeypatch):
    from model import openvino_backend

    class OldCore:
        def get_property(self, device, name):
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino_backend, "_core", OldCore)
    with pytest.raises(ValueError, match="precision is 'bf16', in which this CPU cannot calculate"):
        Refiner(seeded_network(), device="cpu", precision="bf16", backend="openvino")
    monkeypatch.setattr("model.refiner.computes_in_bf16", lambda: True)
    assert Refiner(seeded_network(), device="cpu", backend="openvino").precision == "fp32"


@pytest.mark.parametrize("backend", ["torch", pytest.param("openvino", marks=needs_openvino)])
def test_half_precision_stays_near(backend):
    patches = random_patches(3)
    try:
        half = Refiner(seeded_network(), device="cpu", precision="bf16", backend=backend, batch_size=1)
    except ValueError:
        pytest.skip("this CPU has no bf16")
    full = Refiner(seeded_network(), device="cpu", precision="fp32", backend=backend, batch_size=1)
    difference = np.abs(half.probabilities(patches).astype(np.int32) - full.probabilities(patches))
    assert 0 < difference.max() < 0.2 * 65535
    assert half.arithmetic == f"cpu {backend} bf16"


@needs_openvino
def test_a_network_that_is_dropped_on_another_thread_leaves_signal_handlers_a_stack_to_run_on():
    program = """
import signal, subprocess, threading
from model import Refiner

held = [Refiner.from_checkpoint("hrnet18s_128", backend="openvino")]
dropping = threading.Thread(target=held.clear)
dropping.start()
dropping.join()
signal.signal(signal.SIGCHLD, lambda *_: print("handled"))
subprocess.run(["true"])
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "handled\n"
