"""The Kubernetes manifests against the schemas of KubeRay and Kubernetes, and what they promise; no cluster is used."""

from __future__ import annotations

import copy
import datetime
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipeline.config import RefineConfig, parse
from tests.deploy.heads import ROOT

KUBERNETES = "1.34"
FOLDER = ROOT / "deploy" / "kubernetes"
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "kuberay.json").read_text())
CLUSTERS = ("raycluster.yaml", "rayjob.yaml", "raycronjob.yaml")


def _load(name: str) -> dict[str, Any]:
    # Through json: YAML's aliases would be one object in several places.
    return json.loads(json.dumps(yaml.safe_load((FOLDER / name).read_text())))


def _check_kuberay(manifest: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMA["$defs"][manifest["kind"]] | {"$defs": SCHEMA["$defs"]}).validate(manifest)


def _check_kubernetes(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def _ray_cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"].get("jobTemplate", manifest["spec"])
    return spec.get("rayClusterSpec", spec)


def _pod_templates(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    if manifest["kind"] == "CronJob":
        return [manifest["spec"]["jobTemplate"]["spec"]["template"]]
    job = manifest["spec"].get("jobTemplate", manifest["spec"])
    cluster = _ray_cluster(manifest)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    submitter = [job["submitterPodTemplate"]] if "submitterPodTemplate" in job else []
    return [group["template"] for group in groups] + submitter


@pytest.mark.parametrize("name", CLUSTERS)
def test_kuberay_accepts_the_manifest(name):
    _check_kuberay(_load(name))


@pytest.mark.parametrize("name", CLUSTERS)
def test_kubernetes_accepts_every_pod_of_the_manifest(name):
    manifest = _load(name)
    for template in _pod_templates(manifest):
        _check_kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template})
    options = _ray_cluster(manifest)["autoscalerOptions"]
    container = {"name": "x", "image": "x", **{name: options[name] for name in ("resources", "securityContext")}}
    _check_kubernetes(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [container]}}
    )


@pytest.mark.parametrize("name", ["cronjob.yaml", "settings.yaml"])
def test_kubernetes_accepts_the_manifest(name):
    _check_kubernetes(_load(name))


def test_a_misspelt_field_is_refused_by_each_of_the_schemas():
    manifest = _load("rayjob.yaml")
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        _check_kuberay(wrong)
    wrong = _load("cronjob.yaml")
    _pod_templates(wrong)[0]["spec"]["containers"][0]["commands"] = []
    with pytest.raises(jsonschema.ValidationError, match="commands"):
        _check_kubernetes(wrong)


def test_the_three_manifests_with_a_cluster_describe_the_same_one():
    first, *others = (_ray_cluster(_load(name)) for name in CLUSTERS)
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", [*CLUSTERS, "cronjob.yaml"])
def test_no_container_runs_as_root_or_takes_more_than_it_asked_for(name):
    for template in _pod_templates(_load(name)):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["restartPolicy"] == "Never"
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_pools_grow_from_nothing_carry_the_roles_and_have_shared_memory(name):
    cluster = _ray_cluster(_load(name))
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert {name: group["labels"] for name, group in groups.items()} == {
        "gpu": {"bpr-role": "refine"},
        "cpu": {"bpr-role": "extract"},
    }
    assert all(group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"] for group in groups.values())
    for group in (cluster["headGroupSpec"], *groups.values()):
        spec = group["template"]["spec"]
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in spec["containers"][0]["volumeMounts"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
    limits = {name: group["template"]["spec"]["containers"][0]["resources"]["limits"] for name, group in groups.items()}
    assert limits["gpu"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in limits["cpu"]


def test_every_version_of_ray_is_the_pinned_one():
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert all(_ray_cluster(_load(name))["rayVersion"] == pinned for name in CLUSTERS)
    for path in ("cluster.yaml", "deploy/cluster-onprem.yaml"):
        images = re.findall(r"rayproject/ray:([\d.]+)-", (ROOT / path).read_text())
        assert images
        assert set(images) == {pinned}


def test_images_are_those_that_the_dockerfile_tells_how_to_build():
    built = set(re.findall(r" -t (\S+)", (ROOT / "deploy" / "Dockerfile").read_text()))
    used = set()
    for name in (*CLUSTERS, "cronjob.yaml"):
        used |= {c["image"] for template in _pod_templates(_load(name)) for c in template["spec"]["containers"]}
    assert used == built


def test_entrypoints_are_console_scripts_and_the_settings_are_read(tmp_path):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    job = _load("rayjob.yaml")["spec"]
    assert job["entrypoint"] == _load("raycronjob.yaml")["spec"]["jobTemplate"]["entrypoint"]
    command, path = job["entrypoint"].split()
    assert command in scripts
    (tmp_path / "nightly.yaml").write_text(_load("settings.yaml")["data"][Path(path).name])
    settings = parse(RefineConfig, [str(tmp_path / "nightly.yaml")])
    assert settings.predictions == "s3://bucket/results"
    # No machine is up when the run begins: it gets what it asks for.
    (gpus,) = [
        group
        for group in _load("rayjob.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        if group["groupName"] == "gpu"
    ]
    assert (settings.device, settings.workers) == ("gpu", gpus["maxReplicas"])


def test_the_nightly_submission_has_one_id_a_day(tmp_path):
    """The container's own command, with a `ray` on the PATH that prints what it was given."""
    (tmp_path / "ray").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "ray").chmod(0o755)
    container = _pod_templates(_load("cronjob.yaml"))[0]["spec"]["containers"][0]
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    def today() -> str:
        return f"refine-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"

    before = today()
    given = subprocess.run(container["command"], env=environment, capture_output=True, text=True, check=True)
    words = given.stdout.split()
    assert words[:3] == ["job", "submit", "--submission-id"]
    assert words[3] in (before, today())
    assert words[4:] == ["--", *_load("rayjob.yaml")["spec"]["entrypoint"].split()]
