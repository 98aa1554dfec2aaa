"""Training runs on a tiny data set: what they leave in their folder, and how they go on after any end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jobs import train as job
from model import Refiner
from model.augment import Augmentation
from model.fit import FitConfig, arithmetic
from pipeline import storage
from pipeline.config import parse
from pipeline.flow.session import threads_of
from pipeline.patch_dataset import pack, write_shards
from pipeline.records import InputError
from pipeline.training import Interrupted, TrainConfig, claimed, prepare, train
from pipeline.training_on_ray import room_on_gpus

FIT = ["--fit.recipe=adamw", "--fit.warmup-steps=2", "--fit.learning-rate=0.005"]
SMALL = ["--batch-size=4", "--side-px=32", "--val-every=4", "--checkpoint-every=3", *FIT]


def edges(count, seed, side=32):
    """(count, side, side, 5) uint8: straight bright-dark edges at any angle, and coarse masks that are shifted."""
    rng = np.random.default_rng(seed)
    out = np.empty((count, side, side, 5), np.uint8)
    for patch in out:
        angle = rng.uniform(0, 2 * np.pi)
        ys, xs = np.mgrid[:side, :side] - side / 2
        distance = xs * np.cos(angle) + ys * np.sin(angle)
        patch[..., :3] = rng.integers(0, 60, (side, side, 3)) + 150 * (distance > 0)[..., None]
        patch[..., 3], patch[..., 4] = distance > rng.uniform(-4, 4), distance > 0
    return out


def write_edges(folder):
    """A patch data set of two train shards and a val split."""
    for number in range(2):
        keys = [{"frame_id": f"{number}-{i}"} for i in range(24)]
        tables = {"train": pack(edges(24, number), keys), "val": pack(edges(8, 10 + number), keys[:8])}
        write_shards(str(folder), tables, f"part{number}")
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_edges(tmp_path_factory.mktemp("edges"))


def settings(data, output, *more):
    return parse(TrainConfig, ["--data", data, "--output", str(output), *SMALL, *more])


def run(config, stopping=lambda: False):
    said, prepared = [], prepare(config)
    with claimed(prepared) as check:
        train(prepared.config, lambda line, passing=False: said.append(line), stopping, check)
    return said


def log(output):
    return [json.loads(line) for line in Path(output, "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The folder of a run of 8 steps that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed")
    run(settings(data, output, "--fit.steps=8"))
    return output


@pytest.mark.slow
def test_training_makes_the_loss_fall_and_its_weights_refine(data, tmp_path):
    said = run(settings(data, tmp_path, "--fit.steps=30", "--val-every=15"))
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.5 * np.mean([line["loss"] for line in lines[:5]])
    assert [line["step"] for line in lines if "validation" in line] == [15, 30]
    assert lines[-1]["validation"]["patches"] == 16
    card = json.loads((tmp_path / "weights.json").read_text())
    assert card["validation"] == next(line for line in lines if line["step"] == card["trained_steps"])["validation"]
    device, precision = arithmetic(FitConfig())
    assert said[0].endswith(f", 16 to validate on; on {device.type} in {precision}")
    assert card["recipe"]["precision"] == precision
    refiner = Refiner.from_checkpoint(str(tmp_path / "weights.safetensors"), batch_size=2)
    assert refiner.probabilities(edges(2, 5)[..., :4]).shape == (2, 32, 32)
    assert any("patches/s  eta" in line for line in said)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose a pid is, else the next run waits for it")
def test_a_killed_run_goes_on_exactly(data, tmp_path, undisturbed):
    flags = ["--data", data, "--output", str(tmp_path), *SMALL, "--fit.steps=8"]
    process = subprocess.Popen([sys.executable, job.__file__, *flags], stdout=subprocess.DEVNULL)
    while not (tmp_path / "last.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "weights.json").exists()
    assert run(parse(TrainConfig, flags))[0].startswith("going on after step")
    assert log(tmp_path) == log(undisturbed)


@pytest.mark.slow
def test_a_run_told_to_stop_saves_first_and_goes_on_exactly(data, tmp_path, undisturbed):
    config = settings(data, tmp_path, "--fit.steps=8")
    answers = iter([False] * 4 + [True])
    with pytest.raises(Interrupted, match="stopped after step 5 of 8"):
        run(config, lambda: next(answers))
    assert len(log(tmp_path)) == 5
    # A kill between the log and its checkpoint leaves a log that is ahead.
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 99')
    run(config)
    for name in ("log.jsonl", "weights.safetensors", "weights.json"):
        assert (tmp_path / name).read_bytes() == Path(undisturbed, name).read_bytes()


@pytest.mark.slow
def test_a_signal_to_the_whole_group_of_processes_leaves_the_loaders_at_work_until_it_is_saved(data, tmp_path):
    # A read that takes its time, so that the signal comes while training waits for a batch.
    slow = "import time; from pipeline.patch_dataset import PatchBatches as P; g = P.__getitem__\n"
    slow += "P.__getitem__ = lambda *a: (time.sleep(0.5), g(*a))[1]\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    output = tmp_path / "output"
    flags = ["--data", data, "--output", str(output), *SMALL, "--fit.steps=200", "--loader-workers=1"]
    path = os.pathsep.join((str(tmp_path), str(Path(job.__file__).parents[1])))
    process = subprocess.Popen(
        [sys.executable, job.__file__, *flags],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (output / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (128 + signal.SIGTERM, "")
    assert "the same command goes on from there" in out
    assert (output / "last.pt").exists()


@pytest.mark.slow
def test_loading_processes_give_the_same_batches(data, tmp_path, undisturbed):
    run(settings(data, tmp_path, "--fit.steps=8", "--loader-workers=1"))
    assert log(tmp_path) == log(undisturbed)


def test_a_finished_run_is_not_done_again(data, undisturbed, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--data", data, "--output", str(undisturbed), *SMALL, "--fit.steps=8"])
    before = (undisturbed / "weights.safetensors").stat().st_mtime_ns
    assert job.main() == 0
    assert "training is finished already" in capsys.readouterr().out
    assert (undisturbed / "weights.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--batch-size=2", "with batch_size = 4, not 2"),
        ("--fit.learning-rate=0.1", "with fit.learning_rate = 0.005, not 0.1"),
        ("--augmentation.turn", "with augmentation.turn = False, not True"),
        ("--patience=3", "with patience = 0, not 3"),
    ],
)
def test_other_settings_on_the_same_output_are_refused_by_name(data, undisturbed, flag, expected):
    with pytest.raises(InputError, match=expected):
        prepare(settings(data, undisturbed, "--fit.steps=8", flag))


def test_where_a_run_goes_on_and_how_often_it_saves_may_change(data, undisturbed):
    more = ["--fit.steps=8", "--workers=2", "--loader-workers=1", "--checkpoint-every=7"]
    assert prepare(settings(data, undisturbed, *more)) is None


@pytest.mark.slow
def test_restart_forgets_the_earlier_run(data, tmp_path):
    run(settings(data, tmp_path, "--fit.steps=2"))
    run(settings(data, tmp_path, "--fit.steps=1", "--restart"))
    assert [line["step"] for line in log(tmp_path)] == [1]
    assert json.loads((tmp_path / "weights.json").read_text())["trained_steps"] == 1


def test_a_run_does_not_go_on_with_patches_that_were_cut_again(tmp_path):
    config = settings(write_edges(tmp_path / "data"), tmp_path / "run")
    with claimed(prepare(config)):
        (tmp_path / "run" / "last.pt").write_bytes(b"")
    assert prepare(config) is not None
    # As many under the same name.
    write_shards(config.data[0], {"train": pack(edges(24, 5), [{"frame_id": str(i)} for i in range(24)])}, "part1")
    with pytest.raises(InputError, match=r"run\.json: this output was made with data_shards = .*--restart"):
        prepare(config)


@pytest.mark.parametrize("flags", [(), ("--restart",)])
@pytest.mark.parametrize("name", ["weights.safetensors", "best.safetensors", "last.pt", "log.jsonl", "run.json"])
def test_files_of_another_origin_are_not_overwritten(data, tmp_path, name, flags):
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(InputError, match=f"{name}: a file that no training run made here; choose another output"):
        run(settings(data, tmp_path, *flags))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"precious")]


def test_a_run_json_of_another_program_is_not_overwritten(data, tmp_path):
    (tmp_path / "run.json").write_text('{"data": "mine"}')
    with pytest.raises(InputError, match=r"run\.json: a file that no training run made here"):
        run(settings(data, tmp_path, "--restart"))
    assert (tmp_path / "run.json").read_text() == '{"data": "mine"}'


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_second_run_on_an_output_is_told_who_trains_there_and_changes_nothing(data, tmp_path, place):
    output = str(tmp_path) if place == "local" else "memory://trained-twice"
    first = prepare(settings(data, output))
    with claimed(first):
        before = storage.read(f"{output}/run.json")
        with pytest.raises(InputError, match=rf"lease\.json: run \w+ on host .*, pid {os.getpid()}"):
            run(settings(data, output, "--restart", "--fit.learning-rate=0.1"))
        assert storage.read(f"{output}/run.json") == before


def test_a_run_that_was_taken_over_saves_nothing_more(data, tmp_path):
    prepared = prepare(settings(data, tmp_path, "--fit.steps=1"))

    def lost():
        raise InputError("another run is writing this output")

    with claimed(prepared), pytest.raises(InputError, match="another run"):
        train(prepared.config, lambda *_, **__: None, check=lost)
    assert not {"last.pt", "best.safetensors", "weights.safetensors"} & {path.name for path in tmp_path.iterdir()}


def test_a_damaged_checkpoint_is_named(data, tmp_path):
    with claimed(prepare(settings(data, tmp_path))):
        (tmp_path / "last.pt").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"last\.pt: damaged .*--restart"):
        run(settings(data, tmp_path))


@pytest.mark.slow
def test_training_stops_early_and_stays_stopped(data, tmp_path):
    # At a rate of nothing the first validation stays the best.
    config = replace(
        settings(data, tmp_path, "--val-every=1", "--patience=1"),
        fit=FitConfig(steps=50, learning_rate=0.0, ema_decay=0.9, recipe="adamw"),
        metric="mIoU",
    )
    said = run(config)
    steps = len(log(tmp_path))
    assert steps < 50
    assert f"stopped early after {steps}" in said[-1]
    (tmp_path / "weights.json").unlink()
    assert f"stopped early after {steps}" in run(config)[-1]
    assert len(log(tmp_path)) == steps


@pytest.mark.slow
def test_epochs_set_the_steps_and_start_weights_are_used(data, tmp_path):
    run(settings(data, tmp_path, "--epochs=0.2", "--batch-size=12", "--start=hrnet18s_128"))
    # 48 patches in batches of 12 are 4 steps per epoch.
    assert [line["step"] for line in log(tmp_path)] == [1]
    assert log(tmp_path)[0]["validation"]["after"]["boundary_f1"] > 0.5


@pytest.mark.slow
def test_the_output_may_be_any_store(data):
    run(settings(data, "memory://run", "--fit.steps=1"))
    files = fsspec.filesystem("memory").ls("/run", detail=False)
    assert {"/run/weights.safetensors", "/run/weights.json", "/run/log.jsonl", "/run/last.pt"} <= set(files)


def test_a_data_set_without_val_split_trains_but_cannot_be_watched(data, tmp_path):
    shutil.copytree(Path(data, "train"), tmp_path / "data" / "train")
    assert prepare(settings(f"{tmp_path}/data", tmp_path / "out")) is not None
    with pytest.raises(InputError, match=r"patience is 2, but .* no val split"):
        prepare(settings(f"{tmp_path}/data", tmp_path / "out", "--patience=2"))


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--data=/nowhere", "/nowhere: expected a folder"),
        ("--start=nothing", "nothing: no such checkpoint file, nor bundled weights"),
        ("--fit.network=hrnet7", "network: 'hrnet7' is none of"),
        ("--workers=50", "cannot feed 50 processes"),
    ],
)
def test_a_fault_is_one_line_and_exits_with_1(data, tmp_path, capsys, monkeypatch, flag, expected):
    monkeypatch.setattr(sys, "argv", ["train", "--data", data, "--output", str(tmp_path), *SMALL, flag])
    assert job.main() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"workers": "4:2"}, "workers is 4:2: expected"),
        ({"workers": "many"}, "workers is many: expected"),
        ({"batch_size": 0}, "batch_size is 0: expected at least 1"),
        ({"batch_size": 10**8}, "batch_size is 100000000: expected at most 65536"),
        ({"epochs": float("inf")}, "epochs is inf: expected a number above 0"),
        ({"epochs": 1.0, "fit": FitConfig(steps=3)}, "epochs and fit.steps are both given"),
        ({"start": "a", "backbone": "b"}, "start and backbone are both given"),
    ],
)
def test_settings_that_make_no_sense_are_named(flags, expected):
    with pytest.raises(InputError, match=expected):
        TrainConfig(data=("d",), output="o", **flags)


def test_settings_may_come_from_a_yaml_file_with_groups(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: [a, b]\noutput: o\nworkers: 2:8\n"
        "fit: {recipe: adamw, sync_batch_norm: false}\naugmentation:\n  turn: true\n"
    )
    config = parse(TrainConfig, [str(path), "--fit.steps", "7"])
    assert config.data == ("a", "b")
    assert config.workers_range == (2, 8)
    assert config.fit == FitConfig(recipe="adamw", sync_batch_norm=False, steps=7)
    assert config.augmentation == Augmentation(turn=True)
    path.write_text("fit: {stepps: 3}\n")
    with pytest.raises(InputError, match=r"unknown setting 'fit\.stepps'"):
        parse(TrainConfig, [str(path)])
    path.write_text("fit: 3\n")
    with pytest.raises(InputError, match="expected a mapping of settings under fit, got int"):
        parse(TrainConfig, [str(path)])


@pytest.mark.parametrize(
    ("cpus", "workers", "expected"),
    [([2], 2, (1, 2)), ([16], 4, (4, 4)), ([3, 5], 2, (3, 2)), ([2], 4, (1, 2)), ([0], 1, (1, 0))],
)
def test_workers_share_the_cpus_of_each_node(cpus, workers, expected):
    assert threads_of(cpus, workers) == expected


@pytest.mark.parametrize(
    ("nodes", "share", "expected"),
    [
        ([(16, 1)], 1, 1),
        ([(64, 8)], 1, 8),
        ([(64, 8)], 3, 2),
        ([(1, 2)], 1, 1),
        ([(4, 2), (2, 4), (8, 0)], 1, 4),
        ([(0, 1)], 1, 0),
    ],
)
def test_workers_on_gpus_need_a_cpu_each_beside_them(nodes, share, expected):
    assert room_on_gpus([{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in nodes], share) == expected
