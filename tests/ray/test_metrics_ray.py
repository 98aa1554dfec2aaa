import json
import re
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from pipeline.run import run as refine_dump
from tests.dumps import make_dump

pytestmark = pytest.mark.slow

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "refinement.json"


@pytest.fixture(scope="module")
def served():
    """What a cluster serves to Prometheus once it holds a string."""
    import ray

    settings = {"metrics_report_interval_ms": 500}
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", _system_config=settings)
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def text(awaited):
        for _ in range(60):
            with urlopen(url, timeout=10) as answer:
                found = answer.read().decode()
            if awaited in found:
                return found
            time.sleep(0.5)
        raise AssertionError(f"{awaited} is not served")

    yield text
    ray.shutdown()


def _values(text, run_id):
    """(metric, own label) -> value of all that a run has counted."""
    found = {}
    for name, labels, value in re.findall(r"^ray_(bpr_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        if f'run_id="{run_id}"' in labels:
            own = re.search(r'(?:stage|direction)="(\w+)"', labels)
            found[name, own[1] if own else ""] = float(value)
    return found


@pytest.mark.parametrize("placement", ["fused", "spread"])
def test_prometheus_is_served_the_counts_of_the_summary(served, tmp_path, checkpoint_path, placement):
    dump = make_dump(tmp_path / "dump", frames=6)
    (dump.root / "images" / "frame_003.png").write_bytes(b"not an image")
    config = dump.config("cityscapes", tmp_path / "out", checkpoint_path, placement=placement)
    summary = refine_dump(config, log=lambda _: None)
    (path,) = (tmp_path / "out" / "_ledger" / "runs").iterdir()
    record = json.loads(path.read_text())
    text = served(f'run_id="{record["run_id"]}"')
    for _ in range(20):
        counted = _values(text, record["run_id"])
        if counted.get(("bpr_frames_left", "")) == 0:
            break
        time.sleep(0.5)
        text = served("bpr_frames_left")
    assert counted["bpr_frames_total", ""] == summary.frames == 5
    assert counted["bpr_quarantined_total", ""] == len(summary.quarantined) == 1
    assert counted["bpr_instances_total", ""] == summary.instances
    assert counted["bpr_instances_refined_total", ""] == summary.refined
    assert counted["bpr_patches_total", ""] == summary.patches
    for stage in ("extract", "refine", "assemble", "commit"):
        assert counted["bpr_stage_seconds_total", stage] == pytest.approx(summary.seconds[stage])
    assert counted["bpr_network_wait_seconds_total", ""] == pytest.approx(summary.seconds["wait"])
    assert counted["bpr_bytes_total", "read"] == record["bytes_read"] > 10_000
    assert counted["bpr_bytes_total", "written"] == record["bytes_written"] > 1000
    assert counted["bpr_batch_places_total", ""] >= summary.patches
    assert record["place"]["placement"] == placement
    assert "Dataset throughput" in record["place"]["ray_data_stats"]
    assert record["arithmetic"]


def test_everything_that_the_dashboard_asks_for_is_served(served):
    expressions = [
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]
    ]
    asked = set(re.findall(r"\bray_\w+", " ".join(expressions)))
    text = served("ray_node_cpu_utilization")
    # Of GPUs only a machine that has one tells.
    assert {name for name in asked if not re.search(rf"^{name}\b", text, re.MULTILINE)} <= {"ray_node_gpus_utilization"}
