import itertools

import numpy as np
import pytest
import torch

from model.fit import FitConfig, FitError, fit


def _batch(seed, side=32):
    """Patches whose target is the bright half of the image, while the coarse mask is shifted."""
    rng = np.random.default_rng(seed)
    batch = rng.integers(0, 60, (4, side, side, 5), dtype=np.uint8)
    batch[:, :, side // 2 :, :3] += 150
    batch[..., 3:] = 0
    batch[:, :, side // 2 + 4 :, 3] = 1
    batch[:, :, side // 2 :, 4] = 1
    return batch


@pytest.mark.slow
def test_the_loss_falls_and_the_same_seed_gives_the_same_weights():
    config = FitConfig(steps=8, warmup_steps=2)

    def train():
        losses = []
        network = fit(config, map(_batch, itertools.count()), lambda step, loss, average: losses.append(loss))
        return losses, network

    losses, network = train()
    again, other = train()
    assert len(losses) == 8
    assert losses[-1] < 0.8 * losses[0]
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values()))


def test_batches_that_end_early_are_an_error():
    with pytest.raises(FitError, match="ended after 1 of 5 steps"):
        fit(FitConfig(steps=5), [_batch(0)], lambda *_: None)
