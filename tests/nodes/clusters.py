"""Ray clusters whose nodes have folders of their own, and the jobs that run on them as a user starts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.util import get_node_ip_address as ray_address

from tests.deploy.heads import UNDRAINED
from tests.faults import processes
from tests.faults.bench import REPOSITORY, Job, await_that
from tests.faults.nodes import Nodes
from tests.nodes.store import NODE
from tests.stores.conftest import ENVIRONMENT

RAY = str(Path(sys.executable).parent / "ray")
STORE_BYTES = 80 << 20
"""Of the object store of each node; Ray's least is 75 MiB."""

HEAD = [RAY, "start", "--head", "--block", "--include-dashboard=false", f"--object-store-memory={STORE_BYTES}"]

JOINED = """
import ray, sys
ray.init(logging_level="ERROR")
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]))
"""
"""A driver that tells by its exit status whether so many nodes are there; `ray status` answers before the head does."""

_TOKEN = "a-cluster-of-the-tests"
_RAYS_OWN = ("ray", ".ray")


@dataclass
class Place:
    """A folder in which all processes of a test have their working directory, and each node a home of its own."""

    root: Path
    started: int = 0

    def environment(self, store: str, node: str, **more: str) -> dict[str, str]:
        """Of the processes of a node: its own home, the store at `store`, and the name under which it asks there."""
        home = self.root / node
        for folder in (home / "home", home / "tmp"):
            folder.mkdir(parents=True, exist_ok=True)
        # What this process was told about Ray and other stores is not meant for them.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "FSSPEC_"))}
        return kept | {
            **ENVIRONMENT,
            "AWS_ENDPOINT_URL_S3": store,
            NODE: node,
            "HOME": str(home / "home"),
            "TMPDIR": str(home / "tmp"),
            "PYTHONPATH": str(REPOSITORY),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Machines that run tests can be slow.
            "RAY_raylet_start_wait_time_s": "180",
            **UNDRAINED,
            # The ports of a cluster are open to other machines.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": _TOKEN,
            "RAY_TMPDIR": str(home / "tmp"),
            **more,
        }

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> Job:
        self.started += 1
        log = self.root / f"job{self.started}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=self.root, env=dict(environment), stdout=file, stderr=file, start_new_session=True
            )
        return Job(process, log, self.root)

    def left(self, node: str) -> list[str]:
        """The files that a node's processes have left on its disk, other than Ray's own."""
        home = self.root / node
        files = (path.relative_to(home) for path in home.rglob("*") if path.is_file())
        return sorted(str(path) for path in files if not set(path.parts) & {*_RAYS_OWN})


@contextmanager
def place() -> Iterator[Place]:
    """A place that ends every process started there, and removes its folder."""
    # Short: the paths of Ray's sockets may have 107 characters.
    root = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp")).resolve()
    try:
        yield Place(root)
    finally:
        processes.end(processes.below(root))
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def cluster(here: Place, store: str, names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Ray nodes of one CPU with these names beside a head without any; yields the environment of a driver."""

    def node(name: str, cpus: int) -> dict[str, Any]:
        # Their own disks: whatever a process of theirs makes on its own account lies there.
        own = here.environment(store, name)
        told = {key: own[key] for key in (NODE, "HOME", "TMPDIR", "RAY_TMPDIR")}
        folder = f"{own['RAY_TMPDIR']}/ray"
        return {"num_cpus": cpus, "object_store_memory": STORE_BYTES, "temp_dir": folder, "env_vars": told}

    wanted = {"head": node("head", 0), "nodes": [node(name, 1) for name in names], "temp_dir": ""}
    said = here.root / "cluster.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nodes", json.dumps(wanted)],
            cwd=here.root,
            env=here.environment(store, "head"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        try:
            address = Nodes(process).address
        except AssertionError as error:
            raise AssertionError(f"{error}\n{said.read_text(errors='replace')}") from None
        yield here.environment(store, "driver", RAY_ADDRESS=address)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with suppress(AssertionError):  # what is left of it ends with the place
            await_that(lambda: process.poll() is not None, "the end of the cluster", 60)


@contextmanager
def growing(here: Place, store: str, types: Mapping[str, Mapping[str, float]]) -> Iterator[dict[str, str]]:
    """A head without CPUs whose autoscaler adds at most one node of each type, given by its resources.

    Ray's `AutoscalingCluster` makes the same of a file that its wheels lack, and ends every Ray of this machine first.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    unused = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    unused += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude")
    config = {
        **{name: [] for name in (*unused, "rsync_filter")},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
        "upscaling_speed": 1.0,
        "cluster_name": "growing",
        "max_workers": len(types),
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{ray_address()}:{port}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{
                name: {
                    "resources": {**resources, "object_store_memory": STORE_BYTES},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": 1,
                }
                for name, resources in types.items()
            },
        },
    }
    file = here.root / "autoscaling.json"
    file.write_text(json.dumps(config))
    told = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    head = here.start(
        [
            *HEAD,
            "--num-cpus=0",
            f"--port={port}",
            f"--autoscaling-config={file}",
            f"--temp-dir={here.root}/head/tmp/ray",
        ],
        here.environment(store, "head", **told),
    )
    driver = here.environment(store, "driver", RAY_ADDRESS=f"{ray_address()}:{port}")
    try:
        check = [sys.executable, "-c", JOINED, "1"]
        head.await_that(lambda: here.start(check, driver).wait() == 0, "a head that drivers can join")
        yield driver
    finally:
        head.kill(signal.SIGTERM)
        head.wait(60)
