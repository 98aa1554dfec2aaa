import os
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from model import Refiner
from model.backend import UnsupportedError, resolve_backend
from model.preprocess import MEAN_RGB, STD_RGB, network_input, resize_fixed_point, resize_patches, resize_uint8
from pipeline.guard import GuardConfig
from pipeline.metrics.boundary import iou
from tests.conftest import blob, golden_cases, random_patches, seeded_network

NO_GUARD = GuardConfig(enabled=False)


needs_openvino = pytest.mark.skipif(resolve_backend("auto") != "openvino", reason="OpenVINO is not installed")
BACKENDS = ["torch", pytest.param("openvino", marks=needs_openvino)]


@pytest.fixture(scope="module", params=BACKENDS)
def refiner(request):
    """In the precision that suits this CPU."""
    return Refiner(seeded_network(), device="cpu", backend=request.param)


@pytest.mark.parametrize(("source", "target"), [(64, 128), (64, 256), (80, 128), (32, 100)])
def test_the_resize_for_accelerators_equals_opencv_bit_for_bit(source, target):
    crops = random_patches(8, source)[..., :3]
    expected = np.stack([cv2.resize(crop, (target, target)) for crop in crops])
    assert np.array_equal(resize_fixed_point(torch.from_numpy(crops), target).numpy(), expected)
    assert np.array_equal(resize_uint8(torch.from_numpy(crops), target).numpy(), expected)


def test_the_resize_equals_the_references(golden):
    check = np.load(golden / "resize_check_hrnet18s_128.npz")
    resized = resize_fixed_point(torch.from_numpy(check["im"])[None], 128)[0]
    assert np.array_equal(resized.numpy(), check["out"])


def test_the_network_sees_normalised_rgb_and_a_mask_of_plus_and_minus_one():
    patch = random_patches(1)
    x = network_input(torch.from_numpy(patch), 128)[0].numpy()
    image = (cv2.resize(patch[0, ..., :3], (128, 128)) - np.float32(MEAN_RGB)) / np.float32(STD_RGB)
    mask = cv2.resize(patch[0, ..., 3], (128, 128), interpolation=cv2.INTER_NEAREST) * 2.0 - 1
    assert np.allclose(x[:3], image.transpose(2, 0, 1), atol=1e-5)
    assert np.array_equal(x[3], mask)


@pytest.mark.parametrize(("patch_px", "side"), [(64, 128), (50, 128), (80, 256)])
def test_patches_are_resized_alike_before_every_backend(patch_px, side):
    patches = random_patches(3, patch_px)
    resized = resize_patches(patches, side)
    x = network_input(torch.from_numpy(patches), side).numpy().transpose(0, 2, 3, 1)
    assert np.array_equal(x[..., :3], (resized[..., :3] - np.float32(MEAN_RGB)) / np.float32(STD_RGB))
    assert np.array_equal(x[..., 3] > 0, resized[..., 3] == 1)


def test_probabilities_do_not_depend_on_what_shares_the_batch(refiner):
    patches = random_patches(37)
    together = refiner.probabilities(patches)
    order = np.random.default_rng(0).permutation(37)
    assert together.std() > 100
    assert np.array_equal(refiner.probabilities(patches[order]), together[order])
    assert np.array_equal(refiner.probabilities(patches[5:6]), together[5:6])
    assert refiner.probabilities(patches[:0]).shape == (0, 64, 64)


def test_probabilities_do_not_depend_on_the_number_of_threads(refiner):
    patches = random_patches(9)
    alone = Refiner(seeded_network(), device="cpu", backend=refiner.backend, threads=1)
    assert np.array_equal(alone.probabilities(patches), refiner.probabilities(patches))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted on Linux")
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_threads_calculate_as_were_asked_for(backend):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        refiner = Refiner(seeded_network(), device="cpu", backend=backend, threads=1, batch_size=2)
        refiner.probabilities(random_patches(2))
        started = _ticks()
        refiner.probabilities(random_patches(24))
        busy = [ticks - started.get(thread, 0) for thread, ticks in _ticks().items()]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert max(busy) > 0.6 * sum(busy)


def _ticks():
    """CPU time of each thread of this process so far, in clock ticks."""
    used = {}
    for path in Path("/proc/self/task").iterdir():
        fields = (path / "stat").read_text().rpartition(")")[2].split()
        used[path.name] = int(fields[11]) + int(fields[12])
    return used


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_equal_the_references(golden, backend):
    path = str(golden / "hrnet18s_128_seeded.pth")
    refiner = Refiner.from_checkpoint(path, device="cpu", precision="fp32", backend=backend)
    compared = 0
    for _, expected in golden_cases(golden):
        patches = np.concatenate([expected["img_t025"][..., ::-1], expected["mask_t025"][..., None] // 255], axis=-1)
        probabilities = refiner.probabilities(patches) / np.float32(65535)
        assert np.abs(probabilities - expected["prob18s_t025"]).max() < 1e-4
        compared += len(patches)
    assert compared > 90


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({"avx512_f": True}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True, "avx512_bf16": False}, "bf16")],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cpu_computes_in_bf16_where_it_has_instructions_for_it(monkeypatch, backend, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    if backend == "openvino":
        monkeypatch.setattr("model.openvino_backend.can_calculate_in", lambda precision: True)
    chosen = Refiner(seeded_network(), device="cpu", backend=backend)
    assert chosen.arithmetic == f"cpu {backend} {precision}"
    asked = Refiner(seeded_network(), device="cpu", backend=backend, precision="fp32")
    assert asked.arithmetic == f"cpu {backend} fp32"


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_in_16_bits_are_twice_as_large_unless_given(monkeypatch, backend):
    if backend == "openvino":
        monkeypatch.setattr("model.openvino_backend.can_calculate_in", lambda precision: True)

    def size(precision, given=None):
        return Refiner(seeded_network(), "cpu", precision, batch_size=given, backend=backend).batch_size

    assert size("bf16") == 2 * size("fp32")
    assert size("bf16", 3) == size("fp32", 3) == 3


def test_masks_keep_shape_and_dtype_through_the_library(refiner):
    image = random_patches(1, 120)[0, ..., :3]
    mask = np.zeros((120, 120), np.uint8)
    mask[30:90, 40:80] = 1
    stack = refiner.refine(image, np.stack([mask, 0 * mask]), guard=NO_GUARD)
    assert stack.shape == (2, 120, 120)
    assert stack.dtype == np.uint8
    assert not stack[1].any()
    assert (stack[0] != mask).any()
    assert np.array_equal(refiner.refine(image, mask.astype(bool), guard=NO_GUARD), stack[0].astype(bool))


def test_the_bundled_weights_move_a_coarse_contour_to_a_clear_edge():
    rng = np.random.default_rng(4)
    precise = blob(160, 200, rng)
    image = np.where(precise[..., None] > 0, np.uint8((40, 90, 150)), np.uint8((200, 180, 140)))
    image = (image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)
    coarse = np.roll(precise, 5, axis=1)
    refined = Refiner.from_checkpoint().refine(image, coarse)
    assert iou(coarse, precise) < 0.95
    assert iou(refined, precise) > 0.5 + 0.5 * iou(coarse, precise)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 200), (64, 64), (30, 50), (65, 20)])
def test_frames_of_any_size_are_refined(refiner, height, width):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    refined = refiner.refine(image, np.ones((height, width), bool), guard=NO_GUARD)
    assert refined.shape == (height, width)


def test_the_library_keeps_masks_of_which_the_network_is_not_sure(refiner):
    image = random_patches(1, 120)[0, ..., :3]
    mask = np.zeros((120, 120), np.uint8)
    mask[30:90, 40:80] = 1
    assert np.array_equal(refiner.refine(image, mask, guard=GuardConfig(min_confidence=1.0)), mask)


def test_wrong_shapes_types_and_thresholds_are_named(refiner):
    with pytest.raises(ValueError, match=r"image: expected \(H, W, 3\) uint8"):
        refiner.refine(np.zeros((5, 5), np.uint8), np.zeros((5, 5), bool))
    with pytest.raises(ValueError, match=r"masks: expected \(N, 5, 6\)"):
        refiner.refine(np.zeros((5, 6, 3), np.uint8), np.zeros((6, 5), bool))
    image, mask = np.zeros((5, 6, 3), np.uint8), np.zeros((5, 6), bool)
    with pytest.raises(ValueError, match=r"masks: expected bool or whole numbers, got float32; of probabilities give"):
        refiner.refine(image, mask.astype(np.float32))
    with pytest.raises(ValueError, match=r"nms_threshold is 2: expected a number between 0 and 1"):
        refiner.refine(image, mask, nms_threshold=2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"precision": "int8"}, "precision is 'int8': expected one of auto, fp32, bf16, fp16"),
        ({"batch_size": -1}, "batch_size is -1: expected at least 1"),
    ],
)
def test_settings_that_cannot_be_had_are_named(setting, message):
    with pytest.raises(UnsupportedError, match=message):
        Refiner(seeded_network(), device="cpu", **setting)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_of_its_process_is_told_to_load_its_own(refiner):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            refiner.probabilities(random_patches(1))
        except RuntimeError as error:
            os._exit(0 if "'spawn'" in str(error) else 2)
        os._exit(3)
    assert os.waitpid(child, 0)[1] == 0
