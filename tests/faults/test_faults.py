"""What the output is after each fault: the bytes of an undisturbed run, every frame once, nothing left behind."""

import pytest

from tests.faults import cluster_faults, driver_faults, storage_faults
from tests.faults.table import BEGIN, END, publish, row, survived
from tests.faults.trial import Outcome

pytestmark = pytest.mark.slow


def _survives(outcome):
    assert survived(outcome), outcome


@pytest.mark.parametrize("form", ["cityscapes", "coco", "parquet"])
def test_sigkill_of_the_driver_twice(bench, form):
    _survives(driver_faults.sigkill(bench, form))


def test_sigterm_of_the_driver(bench):
    _survives(driver_faults.sigterm(bench, "parquet"))


def test_control_c(bench):
    _survives(driver_faults.control_c(bench, "cityscapes"))


def test_ray_job_stop(bench):
    _survives(cluster_faults.job_stop(bench, "coco"))


def test_sigkill_of_the_raylet(bench):
    _survives(cluster_faults.sigkill_of_the_raylet(bench, "parquet"))


@pytest.mark.parametrize(("placement", "form"), [("spread", "cityscapes"), ("fused", "parquet")])
def test_sigkill_of_the_actor(bench, placement, form):
    _survives(cluster_faults.sigkill_of_the_actor(bench, form, placement))


@pytest.mark.parametrize(("placement", "form"), [("spread", "coco"), ("fused", "cityscapes")])
def test_sigkill_of_the_processes_that_read_and_write(bench, placement, form):
    _survives(cluster_faults.sigkill_of_tasks(bench, form, placement))


def test_loss_of_a_node(bench):
    outcome = cluster_faults.loss_of_a_node(bench, "parquet")
    _survives(outcome)
    assert outcome.runs == 1


def test_object_store_full(bench):
    _survives(cluster_faults.object_store_full(bench, "cityscapes"))


def test_disk_full(bench):
    _survives(storage_faults.disk_full(bench, "cityscapes"))


def test_torn_write_of_the_ledger(bench):
    _survives(storage_faults.torn_segment(bench, "coco"))


def test_torn_write_of_a_part(bench):
    _survives(storage_faults.torn_part(bench, "parquet"))


def test_torn_write_of_a_frame(bench):
    _survives(storage_faults.torn_frame(bench, "cityscapes"))


@pytest.mark.parametrize(("how", "form"), [("500", "coco"), ("503", "cityscapes"), ("time-out", "parquet")])
def test_a_failing_store(bench, how, form):
    _survives(storage_faults.failing_store(bench, form, how))


def test_a_slow_store(bench):
    _survives(storage_faults.slow_store(bench, "coco"))


def test_two_runs_at_once(bench):
    _survives(driver_faults.two_runs_at_once(bench, "cityscapes"))


def test_a_clock_an_hour_ahead(bench):
    _survives(driver_faults.clock_ahead(bench, "parquet"))


def test_the_table_goes_between_its_markers_and_says_no_where_anything_is_wrong(tmp_path):
    good = Outcome("a fault", "coco", True, 0, 0, [], 3, 1, 0, [], 2, 9.6, 5.2)
    assert row(good) == "| a fault | COCO | yes | 0 | 3 (1) | 10 (5), 2 runs |"
    bad = Outcome("a fault", "coco", True, 0, 0, ["a.tmp"], 3, 1, 0, [], 2, 9.6, 5.2)
    assert "| **no** |" in row(bad)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    publish("new\n", readme)
    assert readme.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="expected the lines"):
        publish("new\n", readme)
