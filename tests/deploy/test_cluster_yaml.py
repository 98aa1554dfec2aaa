"""The cluster configurations against Ray's own validator, command line and autoscaler; no cloud is touched."""

from __future__ import annotations

import shlex
import tomllib
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray._private.label_utils import validate_label_key, validate_label_value
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.scripts.scripts import start

from tests.deploy.heads import ROOT

CLOUD, OWN = "cluster.yaml", "deploy/cluster-onprem.yaml"


def _load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def _launched(demand: list[tuple[dict[str, float], str | None]]) -> dict[str, int]:
    """The machines that Ray's autoscaler would start from nothing for (resources, role) each, by type."""
    requests = []
    for resources, role in demand:
        selector = [[("bpr-role", LabelSelectorOperator.LABEL_OPERATOR_IN, [role])]] if role else None
        requests.append(ResourceRequestUtil.make(resources, label_selectors=selector))
    config = AutoscalingConfig(prepare_config(_load(CLOUD)), skip_content_hash=True)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(requests),
        )
    )
    launched: dict[str, int] = {}
    for request in reply.to_launch:
        launched[request.instance_type] = launched.get(request.instance_type, 0) + request.count
    # The head is there before the autoscaler is.
    launched.pop("head", None)
    return launched


@pytest.mark.parametrize("name", [CLOUD, OWN])
def test_ray_accepts_the_cluster_configuration(name):
    validate_config(prepare_config(_load(name)))


@pytest.mark.parametrize("name", [CLOUD, OWN])
def test_ray_start_knows_every_option_and_each_machine_asks_for_the_token(name):
    config = _load(name)
    for role in ("head", "worker"):
        commands = [line for line in config[f"{role}_start_ray_commands"] if "ray start" in line]
        assert len(commands) == 1
        words = shlex.split(commands[0].replace("$(", "'$(").replace(")", ")'"))
        assert words[:3] == ["RAY_AUTH_MODE=token", "ray", "start"]
        given = start.make_context("ray start", words[3:]).params
        assert given["head"] == (role == "head")
        if given["head"]:
            assert given["num_cpus"] == 0
            assert given["dashboard_host"] == "127.0.0.1"
            assert given["autoscaling_config"]
    assert "~/.ray/auth_token" in config["file_mounts"]


@pytest.mark.parametrize("name", [CLOUD, OWN])
def test_machines_have_shared_memory_and_go_when_idle(name):
    config = _load(name)
    assert any(option.startswith("--shm-size=") for option in config["docker"]["run_options"])
    assert 0 < config["idle_timeout_minutes"] <= 10


@pytest.mark.parametrize("name", [CLOUD, OWN])
def test_machines_install_the_pins_from_files_that_are_here(name):
    config = _load(name)
    for source in config["file_mounts"].values():
        assert source.startswith("~") or (ROOT / source).exists()
    types = config.get("available_node_types", {})
    lists = [config.get(f"{kind}setup_commands", []) for kind in ("", "head_", "worker_")]
    commands = [line for lines in lists for line in lines]
    commands += [line for each in types.values() for line in each.get("worker_setup_commands", [])]
    installs = [line for line in commands if "pip install" in line]
    assert installs
    assert all(line.endswith("--requirement ~/bpr/deploy/requirements.txt") for line in installs)
    assert config["file_mounts"]["~/bpr/deploy"] == "deploy"
    assert config["file_mounts"]["~/bpr/constraints.txt"] == "constraints.txt"


def test_the_requirements_are_what_the_project_needs_besides_ray():
    lines = (ROOT / "deploy" / "requirements.txt").read_text().splitlines()
    assert "--constraint ../constraints.txt" in lines
    listed = {line for line in lines if line and line[0] not in "#-"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["s3"], *extras["train"]]
    assert listed == {Requirement(line).name for line in needed} - {"ray"}


def test_labels_have_the_form_that_ray_allows():
    roles = [each["labels"] for each in _load(CLOUD)["available_node_types"].values() if "labels" in each]
    assert roles == [{"bpr-role": "refine"}, {"bpr-role": "extract"}]
    for labels in roles:
        for key, value in labels.items():
            assert validate_label_key(key) is None
            validate_label_value(value)


def test_the_head_does_no_work_and_gpu_machines_are_spot():
    types = _load(CLOUD)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["gpu"]["min_workers"] == types["cpu"]["min_workers"] == 0


def test_nothing_is_started_without_demand():
    assert _launched([]) == {}


def test_network_processes_start_gpu_machines_and_cutting_starts_cpu_machines():
    assert _launched([({"GPU": 1}, "refine")] * 3) == {"gpu": 3}
    assert _launched([({"CPU": 1}, "extract")] * 20) == {"cpu": 2}


def test_two_network_processes_share_a_gpu_where_each_asks_for_half():
    assert _launched([({"GPU": 0.5}, "refine")] * 4) == {"gpu": 2}


def test_more_network_processes_than_the_configuration_allows_start_its_most():
    assert _launched([({"GPU": 1}, "refine")] * 50) == {"gpu": 8}
