import numpy as np
import pytest
import torch

from model import Refiner
from model.gpu import DeviceQueue
from model.hrnet import fold, pad_channels
from tests.conftest import random_patches, seeded_network

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def expected():
    return Refiner(seeded_network(), device="cpu", backend="torch").probabilities(random_patches(7))


def test_batches_through_the_device_queue_come_back_in_order(expected):
    queue = DeviceQueue(pad_channels(fold(seeded_network())), batch_size=2)
    found = queue.probabilities(random_patches(7))
    assert found.dtype == np.uint16
    assert expected.std() > 100
    assert np.abs(found.astype(np.int32) - expected).max() < 1e-4 * 65535
    assert np.array_equal(queue.probabilities(random_patches(7)[4:5]), found[4:5])
    assert queue.probabilities(random_patches(7)[:0]).shape == (0, 64, 64)


def test_certain_probabilities_survive_the_way_through_signed_integers():
    network = fold(seeded_network())
    difference = network.decode_head.difference
    difference.weight.zero_()
    for bias, expected in ((-1e3, 0), (0, 32768), (1e3, 65535)):
        difference.bias.fill_(bias)
        assert (DeviceQueue(network, batch_size=1).probabilities(random_patches(1)) == expected).all()


@needs_gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.2), ("fp16", 0.02)])
def test_a_gpu_gives_the_cpus_probabilities(expected, precision, tolerance):
    refiner = Refiner(seeded_network(), device="cuda", precision=precision, batch_size=2)
    found = refiner.probabilities(random_patches(7))
    assert np.abs(found.astype(np.int32) - expected).max() < tolerance * 65535
    assert np.array_equal(refiner.probabilities(random_patches(7)), found)
    assert np.array_equal(refiner.probabilities(random_patches(7)[4:5]), found[4:5])
