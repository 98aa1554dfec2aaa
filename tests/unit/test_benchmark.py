import xml.etree.ElementTree as ET
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jobs import bench
from model.backend import UnsupportedError
from model.checkpoint import CheckpointError
from model.rates import Rate
from pipeline.benchmark import end_to_end, modes
from pipeline.benchmark.chart import svg
from pipeline.benchmark.cost import CostModel
from pipeline.benchmark.end_to_end import EndToEnd
from pipeline.benchmark.feed import Feed, Paced, measure_feed
from pipeline.benchmark.handling import HANDLING, Handling, Stage, measure_handling
from pipeline.benchmark.made_dump import CITYSCAPES, COCO, decoded, make_dump
from pipeline.benchmark.modes import Bench, BenchConfig
from pipeline.benchmark.results import Results, feed_line, left_by_handling, rays_price, stage_table
from pipeline.benchmark.scale import simulate, simulated_cluster
from pipeline.dump import reader
from pipeline.records import InputError

SMALL = {"width": 320, "height": 240, "instances": 3, "extent_px": (60, 20, 120)}
SCENERIES = [replace(CITYSCAPES, **SMALL), replace(COCO, **SMALL), decoded(replace(CITYSCAPES, **SMALL))]
NAMES = [scenery.name for scenery in SCENERIES]


def _handling(ratio, patches=100):
    stages = [Stage(name, 10 * ratio, 1.0, 25.0, "") for name in HANDLING]
    return Handling(patches, 10.0, stages, [np.zeros((4, 64, 64, 4), np.uint8)])


def _job(ratio, way="fused", cores=1.0):
    return EndToEnd(way, 24, 100 * ratio, 100, cores, 5.0, 1000.0)


@pytest.mark.parametrize("scenery", SCENERIES, ids=NAMES)
def test_a_made_dump_is_read_like_any_other_and_repeats_its_first_frames_under_other_names(tmp_path, scenery):
    dump = make_dump(tmp_path, scenery, 10)
    config = dump.config("refined")
    source = reader(config.predictions, config.images, scenery.form, image_pattern=config.image_pattern)
    refs = source.list_frames()
    assert [ref.error for ref in refs] == [""] * 10
    first, second, ninth = (list(source.read(refs[i], 320, 240)) for i in (0, 1, 8))
    assert len(first) == 3
    assert all(10 <= max(instance.mask.shape) <= 200 for instance in first)
    assert [i.area for i in first] == [i.area for i in ninth] != [i.area for i in second]


def test_a_smaller_dump_leaves_nothing_of_a_larger_one_made_before(tmp_path):
    make_dump(tmp_path, SCENERIES[0], 10)
    config = make_dump(tmp_path, SCENERIES[0], 2).config("refined")
    assert len(reader(config.predictions, config.images, "cityscapes").list_frames()) == 2


@pytest.mark.parametrize("scenery", SCENERIES, ids=NAMES)
def test_every_stage_is_measured_beside_a_floor_of_its_own(tmp_path, scenery):
    handling = measure_handling(make_dump(tmp_path, scenery, 2), 2)
    assert [stage.name for stage in handling.stages] == list(HANDLING)
    assert all(stage.floor_ms > 0 and stage.moved_mb > 0 for stage in handling.stages)
    assert handling.patches == np.mean([len(part) for part in handling.crops]) > 0
    assert (tmp_path / "handled").is_dir()


def test_handling_is_held_against_decoding_and_encoding_and_nothing_else():
    assert _handling(1.5).ratio == pytest.approx(5 * 15 / (2 * 25))


def test_the_stage_table_has_a_row_for_each_stage_in_a_frames_order_and_one_for_handling():
    network = Stage("network", 1000, 2.0, 900, "bare")
    rows = stage_table(_handling(1), network).splitlines()
    names = ["read + decode", "propose", "crop", "network", "paste + guard", "encode + write", "handling"]
    assert [row[:16].strip() for row in rows[1:-1]] == names
    assert rows[4].split()[3] == "100"  # patches/s: 100 patches in 1000 ms


def test_rays_price_is_told_against_the_run_without_ray():
    (line,) = rays_price([_job(0.9, "local"), _job(0.81)])
    assert line.startswith("Ray's price, fused: 0.90x")


def test_a_job_cannot_use_the_cpu_time_that_handling_takes():
    handling = _handling(1)
    # 100 patches take two CPUs nine times as long as handling takes one.
    bare = 100 * 2 * 1e3 / (9 * handling.cpu_ms)
    assert "on the same 2 CPUs, leaves at most 0.90x" in left_by_handling(handling, bare, 2)


def test_a_run_on_a_machine_that_others_used_says_so():
    assert "others were using the machine" in rays_price([_job(0.9, cores=0.5)])[-1]
    assert rays_price([_job(0.9)]) == []


def test_the_cost_model_follows_from_patches_per_frame_and_the_assumed_rate_of_a_gpu():
    cost = CostModel(patches_per_frame=150, handling_cpu_ms=100, gpu_patches_per_s=3000, measured=False)
    assert cost.frames_per_gpu_hour == 72_000
    assert cost.cores_per_gpu == pytest.approx(2)
    assert cost.hours(720_000, gpus=2) == pytest.approx(5)
    assert "ASSUMING 3,000 patches/s" in cost.text()
    assert "with the 3,000 patches/s measured" in replace(cost, measured=True).text()
    assert "1,600,000 frames per GPU hour" in replace(cost, gpu_patches_per_s=68_123).text()


def test_the_cost_is_told_in_minutes_below_one_hour():
    lines = CostModel(patches_per_frame=150, handling_cpu_ms=100, gpu_patches_per_s=3000, measured=False).text(144_000)
    assert "2.0 GPU hours in all" in lines
    assert [line.split(": ")[1].strip() for line in lines.splitlines()[2:]] == [
        "2.0 hours",
        "30 minutes",
        "7.5 minutes",
        "1.9 minutes",
    ]


def test_the_chart_is_well_formed_and_shows_every_figure_beside_its_floor():
    results = Results(handling=_handling(1), jobs=[_job(0.9, "local"), _job(0.8)])
    root = ET.fromstring(svg(results.charts()))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {*HANDLING, "local", "fused"} < {*texts}
    bars = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    assert len(bars) == 1 + 2 * (len(HANDLING) + 2)


def test_the_json_has_stages_with_ratios_and_no_pixels():
    plain = Results(handling=_handling(1), network=Stage("network", 10, 1, 5, ""), jobs=[_job(0.9)]).plain()
    assert plain["stages"][-1]["ratio"] == 2
    assert plain["jobs"][0]["ratio"] == pytest.approx(0.9)
    assert plain["handling"].keys() == {"patches", "copy_gb_per_s", "cpu_ms", "floor_ms", "ratio"}


def test_the_ways_to_run_the_network_are_in_the_json_and_in_the_chart():
    results = Results(
        ways=[Rate("torch fp32", 100, 50, 1, None, None), Rate("gpu triton fp16", 7e4, 1e5, 700, 1e-5, 0)]
    )
    assert [way["patches_per_s"] for way in results.plain()["ways"]] == [100, 7e4]
    assert "gpu triton fp16" in svg(results.charts())


def test_a_gpu_without_memory_for_the_larger_batch_is_measured_with_the_usual_one(monkeypatch):
    def rate(refiner, *_):
        if refiner.batch_size > room:
            raise UnsupportedError("no memory left")
        return 100.0

    def refiner(*_, batch_size=4, **__):
        return SimpleNamespace(batch_size=batch_size)

    monkeypatch.setattr(end_to_end, "rate", rate)
    monkeypatch.setattr(end_to_end.Refiner, "from_checkpoint", refiner)
    room = 4
    usual, best, found = end_to_end.best_network("", "auto", np.zeros(0))
    assert usual is best
    assert found == {4: 100.0}
    room = 1
    with pytest.raises(UnsupportedError, match="no memory left"):
        end_to_end.best_network("", "auto", np.zeros(0))


@pytest.fixture
def measured(monkeypatch):
    """Let the smoke run meet given ratios instead of measuring."""

    def use(handling, jobs):
        handlings, ends = map(_handling, handling), map(_job, jobs)
        monkeypatch.setattr(modes, "make_dump", lambda *_: None)
        monkeypatch.setattr(modes, "measure_handling", lambda *_: next(handlings))
        monkeypatch.setattr(modes, "best_network", lambda *_, **__: (None, None, {4: 100.0}))
        monkeypatch.setattr(modes, "run_job", lambda *_: next(ends))

    return use


@pytest.mark.parametrize(
    ("asked", "gpu", "run"), [("auto", False, "fp32"), ("bf16", False, "bf16"), ("auto", True, "auto")]
)
def test_the_smoke_run_is_in_fp32_on_a_cpu_unless_asked_otherwise(measured, monkeypatch, tmp_path, asked, gpu, run):
    measured(handling=[1.5], jobs=[0.9])
    flags = []
    monkeypatch.setattr(modes, "run_job", lambda dump, way, given, *_: flags.extend(given) or _job(0.9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    Bench(BenchConfig(precision=asked), tmp_path, print).smoke()
    assert flags[flags.index("--precision") + 1] == run


@pytest.mark.parametrize("error", [UnsupportedError("precision is 'fp16'"), CheckpointError("x.pth: no weights")])
def test_what_cannot_be_measured_is_one_line(monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(Bench, "network", fail)
    monkeypatch.setattr("sys.argv", ["bench.py", "--network"])
    assert bench.main() == 1
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_the_measurement(monkeypatch, tmp_path, capsys, flag):
    monkeypatch.setattr(Bench, "network", None)
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["bench.py", "--network", flag, str(tmp_path / "file" / "out")])
    assert bench.main() == 1
    assert f"error: {tmp_path}/file/out: cannot be written" in capsys.readouterr().err


def test_memory_is_refused_at_once_where_the_system_does_not_tell_it(monkeypatch, capsys):
    monkeypatch.setattr(modes, "memory_mb", lambda pid: 0.0)
    monkeypatch.setattr(Bench, "_made", None)
    monkeypatch.setattr("sys.argv", ["bench.py", "--memory"])
    assert bench.main() == 1
    assert capsys.readouterr().err.startswith("error: memory: this system does not tell that of all processes")


@pytest.mark.parametrize("frames", [0, -3])
def test_a_dump_without_frames_is_refused(frames):
    with pytest.raises(InputError, match=f"frames is {frames}: expected at least 1"):
        BenchConfig(frames=frames)


def test_the_smoke_run_passes_where_one_of_three_tries_does(measured, tmp_path, capsys):
    measured(handling=[2.5, 1.5], jobs=[0.5, 0.7, 0.8])
    run = Bench(BenchConfig(), tmp_path, print)
    run.smoke()
    assert run.passed
    assert capsys.readouterr().out.splitlines()[-1].startswith("passed: handling 1.50x")


@pytest.mark.parametrize(("handling", "jobs"), [([2.1] * 3, [0.9]), ([0.5], [0.7] * 3)])
def test_the_smoke_run_fails_where_handling_or_the_job_misses_its_mark_three_times(measured, handling, jobs, tmp_path):
    measured(handling, jobs)
    run = Bench(BenchConfig(), tmp_path, print)
    run.smoke()
    assert not run.passed


@pytest.mark.slow
def test_a_simulated_dump_goes_through_the_flow_on_ray_and_tells_its_rate_and_the_drivers_memory():
    with simulated_cluster(cpus=4, gpus=2) as (start_s, task_ms):
        run = simulate(frames=48, actors=2, delay_s=0.05)
    assert 0 < task_ms < 1e3 * start_s
    assert run.frames_per_s > 0
    assert run.driver_peak_mb > run.driver_before_mb > 10


def test_the_stand_in_for_a_gpu_answers_every_block_with_its_coarse_masks_moved_by_a_pixel():
    rng = np.random.default_rng(0)
    blocks = [[rng.integers(0, 2, (n, 64, 64, 4), np.uint8) for n in sizes] for sizes in ((700, 600), (0,), (5,))]
    found = list(Paced(np.inf).each(iter(blocks)))
    for block, answer in zip(blocks, found, strict=True):
        expected = np.roll(np.concatenate(block)[..., 3], 1, axis=2).astype(np.uint16) * 65535
        np.testing.assert_array_equal(answer, expected)


@pytest.mark.slow
def test_a_dump_too_short_for_a_rate_is_one_clear_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", "--feed", "--decoded", "--frames", "1", "--ways", "local"])
    assert bench.main() == 1
    assert "error: expected more frames than the 1 of this dump" in capsys.readouterr().err


def test_a_feed_tells_how_long_a_gpu_of_the_pace_would_be_busy_and_how_many_cpus_it_takes(tmp_path):
    dump = make_dump(tmp_path, SCENERIES[2], 400)
    most, paced = measure_feed(dump, "local", np.inf), measure_feed(dump, "local", 1000.0)
    assert most.patches_per_s > 0 == most.busy
    assert 0 < paced.busy < 1.1
    assert (tmp_path / "fed_local").is_dir()
    assert "a GPU of 70,000 patches/s takes 28 CPUs like these 4" in feed_line(Feed("local", np.inf, 10_000.0), 4, 7e4)
    results = Results(feeds=[most, paced])
    assert results.plain()["feeds"][0]["pace"] is None
    assert "CPUs feed a GPU" in svg(results.charts())
