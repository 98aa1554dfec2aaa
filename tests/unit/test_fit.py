import datetime
import io
import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model.fit import RECIPES, FitConfig, FitError, fit
from model.hrnet import CONFIGS, RefinementNetwork, fold
from tests.conftest import seeded_network

STEPS = 4


def _batch(seed, side=16):
    """Patches whose target is the bright half of the image, while the coarse mask is shifted."""
    rng = np.random.default_rng(seed)
    batch = rng.integers(0, 60, (4, side, side, 5), dtype=np.uint8)
    batch[:, :, side // 2 :, :3] += 150
    batch[..., 3:] = 0
    batch[:, :, side * 5 // 8 :, 3] = 1
    batch[:, :, side // 2 :, 4] = 1
    return batch


def _batches(first):
    return map(_batch, itertools.count(first))


def _config(recipe="reference", **changes):
    return FitConfig(recipe=recipe, **{"steps": STEPS, "warmup_steps": 2, **changes})


def _trained(config, batches=_batches, stop_at=None, **begin):
    """Losses of the steps, the network, and the state after the last step, by way of a file."""
    losses, files = [], []

    def report(moment):
        losses.append(moment.loss)
        if moment.step in (stop_at, config.steps):
            files.append(io.BytesIO())
            torch.save(moment.state(), files[-1])
        return moment.step == stop_at

    network = fit(config, batches, report, **begin)
    files[-1].seek(0)
    return losses, network, torch.load(files[-1], weights_only=True)


def _same(network, other):
    a, b = network.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_falls(recipe):
    losses = _trained(_config(recipe, steps=8), lambda first: (_batch(seed, 32) for seed in itertools.count(first)))[0]
    assert len(losses) == 8
    assert losses[-1] < 0.8 * losses[0]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    (losses, network, _), (again, same, _) = _trained(_config()), _trained(_config())
    assert losses == again
    assert _same(network, same)
    assert not _same(network, _trained(_config(seed=1))[1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_resumed_in_the_middle_ends_as_if_never_stopped(recipe):
    losses, network, state = _trained(_config(recipe))
    before, _, middle = _trained(_config(recipe), stop_at=2)
    after, resumed, end = _trained(_config(recipe), state=middle)
    assert before + after == losses
    assert _same(resumed, network)
    assert end["step"] == STEPS
    # The state that was given is as it was: it may be resumed from once more.
    assert _trained(_config(recipe), state=middle)[0] == after
    assert torch.equal(end["network"]["backbone.conv1.weight"], state["network"]["backbone.conv1.weight"])


def test_a_state_at_the_end_gives_the_network_at_once():
    _, network, state = _trained(_config("adamw"))
    assert _same(fit(_config("adamw"), lambda first: [], lambda moment: pytest.fail("a step"), state=state), network)


def test_the_reference_recipe_decays_from_its_rate_towards_its_least():
    rates = []
    fit(_config(warmup_steps=None), _batches, lambda moment: rates.append(moment.rate))
    assert rates == pytest.approx([1e-4 + (1e-2 - 1e-4) * (1 - step / STEPS) ** 0.9 for step in range(STEPS)])


def test_the_adamw_recipe_warms_up_and_decays_as_a_cosine():
    rates = []
    fit(_config("adamw"), _batches, lambda moment: rates.append(moment.rate))
    cosine = [2e-3 * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]
    assert rates == pytest.approx([cosine[0] / 2, *cosine[1:]])


def test_without_averaging_the_last_weights_are_exported_and_with_it_others():
    _, plain, state = _trained(_config())
    assert all(torch.equal(value, state["network"][key]) for key, value in plain.state_dict().items())
    _, average, state = _trained(_config(ema_decay=0.9))
    assert not torch.equal(average.backbone.conv1.weight, state["network"]["backbone.conv1.weight"])


def test_what_is_reported_is_ready_to_export():
    keys = list(RefinementNetwork(CONFIGS["hrnet18s_128"]).state_dict())

    def report(moment):
        assert not any(module.training for module in moment.network.modules())
        assert list(moment.network.state_dict()) == keys
        assert moment.grad_norm > 0

    network = fit(_config(steps=1), _batches, report)
    assert fold(network)(torch.zeros(1, 4, 32, 32)).shape == (1, 1, 8, 8)


def test_given_weights_are_the_start_and_stay_as_they_are():
    start = seeded_network()
    network = fit(_config(learning_rate=0.0), _batches, lambda moment: None, start=start)
    assert _same(start, seeded_network())
    assert torch.equal(network.backbone.conv1.weight, start.backbone.conv1.weight)


def test_a_gradient_above_the_limit_is_scaled_down_to_it():
    def moved(clip_norm):
        start, norms = seeded_network(), []
        config = _config(steps=1, warmup_steps=0, momentum=0, weight_decay=0, learning_rate=1.0, clip_norm=clip_norm)
        network = fit(config, _batches, lambda moment: norms.append(moment.grad_norm), start=start)
        pairs = zip(network.parameters(), start.parameters())
        return math.sqrt(sum((a - b).square().sum().item() for a, b in pairs)), norms[0]

    (clipped, norm), (free, same_norm) = moved(0.01), moved(0)
    assert norm == same_norm > 0.01
    assert clipped == pytest.approx(0.01, rel=1e-2)
    assert free == pytest.approx(norm, rel=1e-2)


def test_batches_may_be_tensors_of_patches_whose_side_is_no_divisor_of_the_input():
    losses = _trained(_config(steps=1, patch_px=72), lambda first: [torch.from_numpy(_batch(0, 24))])[0]
    assert math.isfinite(losses[0])


@pytest.mark.parametrize("suited", [True, False])
def test_bf16_trains_as_well_and_is_taken_where_the_cpu_computes_in_it(monkeypatch, suited):
    losses, exact = (_trained(_config(steps=2, precision=precision))[0] for precision in ("bf16", "fp32"))
    assert losses != exact
    assert losses == pytest.approx(exact, rel=0.1)
    monkeypatch.setattr("model.fit.computes_in_bf16", lambda: suited)
    assert _trained(_config(steps=2))[0] == (losses if suited else exact)


def _background(first):
    for batch in _batches(first):
        batch[..., 3:] = 0
        yield batch


@pytest.mark.parametrize(
    ("config", "batches", "message"),
    [
        (_config(steps=5), lambda first: [_batch(0)], "^the batches ended after 1 of 5 steps$"),
        (_config(), lambda first: [_batch(0)[..., :4]], r"^step 1: the batch is \(4, 16, 16, 4\) uint8, expected "),
        (_config(), lambda first: [_batch(0)[:, :8]], r"^step 1: the batch is \(4, 8, 16, 5\) uint8, expected "),
        (
            _config(),
            lambda first: [_batch(0).astype(float)],
            r"^step 1: the batch is \(4, 16, 16, 5\) float64, expecte",
        ),
        (_config(), lambda first: ["patches"], r"^step 1: the batch is \(\) str, expected \(N, P, P, 5\) uint8$"),
        (_config(), lambda first: [_batch(0) * 255], "^step 1: the masks of the batch hold 255, expected 0 and 1$"),
        (_config(), _background, r"^no target has foreground \(steps 1 to 4\)$"),
        (
            _config(learning_rate=1e30, warmup_steps=0),
            _batches,
            r"^step 2: the loss is nan at learning rate .*; lower the learning rate \(1e\+30\)$",
        ),
        (_config(network="unet"), _batches, "^network: 'unet' is none of hrnet18s_128, hrnet48_256$"),
        (_config(precision="fp16"), _batches, "^precision: 'fp16' is none of auto, fp32, bf16$"),
        (_config(steps=0), _batches, "^steps: expected a number from 1, got 0$"),
        (_config(seed=-1), _batches, "^seed: expected a number from 0, got -1$"),
        (_config(ema_decay=1), _batches, "^ema_decay: expected a number below 1, got 1$"),
    ],
)
def test_what_cannot_be_trained_on_is_one_clear_error(config, batches, message):
    with pytest.raises(FitError, match=message):
        fit(config, batches, lambda moment: None)


def test_background_alone_is_an_error_after_some_batches_and_not_before(monkeypatch):
    monkeypatch.setattr("model.fit.BACKGROUND_BATCHES", 3)
    late_object = itertools.chain(itertools.islice(_background(0), 2), _batches(0))
    assert len(_trained(_config(), lambda first: late_object)[0]) == STEPS
    with pytest.raises(FitError, match=r"^no target has foreground \(steps 1 to 3\)$"):
        fit(_config(steps=1000), _background, lambda moment: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "adamw"}, "^state: recipe was reference, is adamw now; "),
        ({"steps": 9}, "^state: steps was 4, is 9 now; "),
        ({"network": "hrnet48_256"}, "^state: network was hrnet18s_128, is hrnet48_256 now; "),
        ({"learning_rate": 0.5}, "^state: learning_rate was 0.01, is 0.5 now; "),
    ],
)
def test_a_state_of_another_configuration_names_the_setting(reference_state, changes, message):
    with pytest.raises(FitError, match=message):
        fit(_config(**changes), _batches, lambda moment: None, state=reference_state)


def test_a_state_that_is_none_names_what_is_missing(reference_state):
    partial = {key: value for key, value in reference_state.items() if key != "optimizer"}
    with pytest.raises(FitError, match=r"^state: not a training state, 'optimizer' is missing$"):
        fit(_config(), _batches, lambda moment: None, state=partial)


def test_a_start_of_another_network_is_an_error():
    with pytest.raises(FitError, match=r"^network: the weights to start from are of hrnet18s_128, not hrnet48_256$"):
        fit(_config(network="hrnet48_256"), _batches, lambda moment: None, start=seeded_network())


@pytest.fixture(scope="module")
def reference_state():
    return _trained(_config(), stop_at=1)[2]


def _one_of_two(rank, rendezvous, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=datetime.timedelta(minutes=5)
    )
    # Only rank 0 starts well: what the others hold at the beginning must not matter.
    losses, network, state = _trained(
        _config("adamw"),
        lambda first: map(_batch, itertools.count(100 * rank + first)),
        start=seeded_network(seed=rank),
    )
    torch.save({"losses": losses, "exported": network.state_dict(), "network": state["network"]}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path):
    mp.spawn(_one_of_two, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0]["losses"] == ranks[1]["losses"]
    for part in ("network", "exported"):
        a, b = ranks[0][part], ranks[1][part]
        assert list(a) == list(seeded_network().state_dict())
        assert all(torch.equal(a[key], b[key]) for key in a)
    alone = _trained(_config("adamw"), start=seeded_network())[1]
    assert not torch.equal(alone.backbone.conv1.weight, ranks[0]["exported"]["backbone.conv1.weight"])
