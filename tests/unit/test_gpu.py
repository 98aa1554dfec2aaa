from collections.abc import Iterator
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model import Refiner, gpu
from model.backend import UnsupportedError
from model.gpu import DeviceQueue, suited_half
from model.hrnet import fold, pad_channels
from model.parts import Parts
from model.refiner import suited_precision
from tests.conftest import random_patches, seeded_network
from tests.fake_cuda import FakeTorch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def expected():
    return Refiner(seeded_network(), device="cpu", precision="fp32", backend="torch").probabilities(random_patches(7))


def one(queue: DeviceQueue, *patches: np.ndarray) -> np.ndarray:
    (found,) = queue.each([Parts(*patches)])
    return found


def test_batches_through_the_device_queue_come_back_in_order(expected):
    queue = DeviceQueue(pad_channels(fold(seeded_network())), batch_size=2)
    found = one(queue, random_patches(7))
    assert found.dtype == np.uint16
    assert expected.std() > 100
    assert np.abs(found.astype(np.int32) - expected).max() < 1e-4 * 65535
    assert np.array_equal(one(queue, random_patches(7)[4:5]), found[4:5])
    assert one(queue, random_patches(7)[:0]).shape == (0, 64, 64)


@pytest.mark.parametrize("sizes", [(3, 0, 1, 7, 2), (2, 2), (0,), (1,), ()])
def test_batches_are_filled_across_blocks(expected, sizes):
    queue, patches = DeviceQueue(fold(seeded_network()), batch_size=2), random_patches(sum(sizes))
    ends = np.cumsum(sizes)
    blocks = [Parts(patches[end - size : end]) for end, size in zip(ends, sizes)]
    found = list(queue.each(blocks))
    assert [len(block) for block in found] == list(sizes)
    assert queue.batches == -(-sum(sizes) // 2)
    assert all(
        np.array_equal(block, one(queue, patches[end - size : end])) for block, end, size in zip(found, ends, sizes)
    )


def test_a_call_may_come_in_between_the_blocks_of_another():
    queue, patches = DeviceQueue(fold(seeded_network()), batch_size=4), random_patches(9)
    blocks = (Parts(patches[start : start + 3]) for start in (0, 3, 6))
    found = [(block, one(queue, patches[:1])) for block in queue.each(blocks)]
    assert np.array_equal(np.concatenate([block for block, _ in found]), one(queue, patches))
    assert all(np.array_equal(between, found[0][0][:1]) for _, between in found)


def test_a_block_is_given_out_once_it_is_known_and_a_call_may_come_in_between_also_then():
    queue, patches = DeviceQueue(fold(seeded_network()), batch_size=1), random_patches(7)
    found = queue.each([Parts(patches[:1]), Parts(patches[1:])])
    first = next(found)
    # The second block is far longer than what is under way at a time.
    assert queue.batches < 4
    between = one(queue, patches[3:5])
    (second,) = found
    whole = one(queue, patches)
    assert np.array_equal(np.concatenate([first, second]), whole)
    assert np.array_equal(between, whole[3:5])


def test_one_batch_is_filled_while_two_are_under_way():
    queue = DeviceQueue(fold(seeded_network()), batch_size=1)
    under_way = []

    class Watched(gpu._Slot):
        def fill(self, *arguments):
            under_way.append(len(made) - 1 - len(queue.ready[64][1]))
            return super().fill(*arguments)

    one(queue, random_patches(1))
    made = [*queue.ready[64][1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_Slot", lambda *of: made.append(Watched(*of)) or made[-1])
        one(queue, random_patches(6))
    assert len(made) == 3
    assert under_way == [1, 2, 2, 2]


def test_a_caller_that_leaves_early_gives_the_memory_of_its_batches_back():
    queue, patches = DeviceQueue(fold(seeded_network()), batch_size=2), random_patches(9)
    expected = one(queue, patches)
    slots = {*map(id, queue.ready[64][1])}
    found = queue.each(Parts(patches[start : start + 3]) for start in (0, 3, 6))
    next(found)
    found.close()
    assert {*map(id, queue.ready[64][1])} == slots
    assert not any(slot.targets for slot in queue.ready[64][1])
    assert np.array_equal(one(queue, patches), expected)


def answers(patches: np.ndarray) -> np.ndarray:
    """What stands for the network's probabilities: every patch has its own."""
    return patches[..., 0] * np.uint16(251) + patches[..., 1]


class PlantedError(Exception):
    """What is raised where a block was expected."""


def run_at_random(monkeypatch, seed: int) -> None:
    """Blocks of any size and of two sides, calls in between, callers that leave early and blocks that fail."""
    fake = FakeTorch(seed)
    monkeypatch.setattr(gpu, "torch", fake)
    monkeypatch.setattr(gpu, "_exact", nullcontext)
    monkeypatch.setattr(gpu, "output_resize", lambda *_: SimpleNamespace(to=lambda _: None))
    monkeypatch.setattr(
        gpu, "probabilities_on_device", lambda _, patches, __: lambda: answers(patches.data).view(np.int16)
    )
    device = SimpleNamespace(type="cuda")
    weight = SimpleNamespace(device=device)
    network = SimpleNamespace(
        config=SimpleNamespace(input_px=16), backbone=SimpleNamespace(conv1=SimpleNamespace(weight=weight))
    )
    queue = DeviceQueue(network, fake.random.choice((1, 2, 3, 5)), lambda _: None)
    chance, numbers = fake.random.random, np.random.default_rng(seed)

    def call(depth: int) -> None:
        side, fails, leaves = fake.random.choice((4, 8)), chance() < 0.2, chance() < 0.3
        sizes = numbers.integers(0, 14, fake.random.randrange(6))
        blocks = [numbers.integers(0, 256, (size, side, side, 4), np.uint8) for size in sizes]

        def given() -> Iterator[Parts]:
            for block in blocks:
                if fails and chance() < 0.3:
                    raise PlantedError
                if depth and chance() < 0.2:
                    call(depth - 1)
                cut = fake.random.randrange(len(block) + 1)
                yield Parts(block[:cut], block[cut:])

        found = queue.each(given())
        with suppress(PlantedError):
            left = list(blocks)
            for probabilities in found:
                assert np.array_equal(probabilities, answers(left.pop(0)))
                if depth and chance() < 0.3:
                    call(depth - 1)
                if leaves and chance() < 0.5:
                    found.close()
                    return
            assert not left

    for _ in range(4):
        call(2)
    fake.run_until(lambda: not any(stream.queued for stream in fake.streams))


def test_no_batch_on_a_gpu_touches_what_another_uses_whatever_runs_first(monkeypatch):
    for seed in range(300):
        run_at_random(monkeypatch, seed)


@pytest.mark.parametrize("waiting", ["Stream.wait_event", "Event.synchronize"])
def test_a_wait_that_was_forgotten_on_a_gpu_would_be_noticed(monkeypatch, waiting):
    monkeypatch.setattr(f"tests.fake_cuda.{waiting}", lambda *_: None)
    with pytest.raises(AssertionError):
        test_no_batch_on_a_gpu_touches_what_another_uses_whatever_runs_first(monkeypatch)


def test_calls_in_torchs_inference_mode_and_outside_it_may_take_turns():
    queue, patches = DeviceQueue(fold(seeded_network()), batch_size=2), random_patches(3)
    with torch.inference_mode():
        within = one(queue, patches)
    assert np.array_equal(one(queue, patches), within)


def test_a_device_without_memory_is_one_line(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")

    monkeypatch.setattr(gpu, "_Slot", full)
    with pytest.raises(UnsupportedError, match=r"batch_size is 2, for which cpu has no memory left: expected a lower"):
        one(DeviceQueue(fold(seeded_network()), batch_size=2), random_patches(1))


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9")
def test_fp32_means_fp32_whatever_the_process_has_set_and_its_settings_come_back():
    convolution, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        of_convolution = convolution.fp32_precision
        with gpu._exact():
            assert (convolution.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
            assert torch.backends.cudnn.deterministic
        assert (convolution.fp32_precision, matmul.fp32_precision) == (of_convolution, "tf32")
        assert not torch.backends.cudnn.deterministic
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_weights_that_fp16_does_not_hold_get_bf16_where_the_gpu_has_it(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr("model.refiner.suited_half", lambda _: "bf16")
    assert suited_precision(None, torch.device("cuda"), "torch") == precision


def test_certain_probabilities_survive_the_way_through_signed_integers():
    network = fold(seeded_network())
    difference = network.decode_head.difference
    difference.weight.zero_()
    for bias, expected in ((-1e3, 0), (0, 32768), (1e3, 65535)):
        difference.bias.fill_(bias)
        assert (one(DeviceQueue(network, batch_size=1), random_patches(1)) == expected).all()


def test_half_precision_is_the_kind_whose_range_the_network_keeps_to():
    assert suited_half(fold(seeded_network())) == "fp16"
    network = seeded_network()
    network.backbone.bn2.weight.data *= 1e4
    assert suited_half(fold(network)) == "bf16"


@needs_gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.2), ("fp16", 0.02)])
def test_a_gpu_gives_the_cpus_probabilities(expected, backend, precision, tolerance):
    refiner = Refiner(seeded_network(), device="cuda", precision=precision, batch_size=2, backend=backend)
    found = refiner.probabilities(random_patches(7))
    assert np.abs(found.astype(np.int32) - expected).max() < tolerance * 65535
    assert np.array_equal(refiner.probabilities(random_patches(7)), found)
    assert np.array_equal(refiner.probabilities(random_patches(7)[4:5]), found[4:5])
