"""A Ray cluster of several nodes on this machine, in a process of its own: `python -m tests.faults.nodes '<json>'`.

The json has `head` and `nodes`, arguments of `ray.cluster_utils.Cluster.add_node`, and `temp_dir`. It prints one json
line when the cluster is up. Then each line it reads is a request, answered by one line: `{"remove": <raylet pid>}`
kills all processes of a node, `{"fill": <bytes>}` puts so much into the object store and holds on to it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.faults import processes
from tests.faults.bench import Bench, await_that
from tests.faults.trial import Trial


def main() -> None:
    import logging

    import numpy as np
    import ray
    from ray.cluster_utils import Cluster

    wanted = json.loads(sys.argv[1])
    common = {"include_dashboard": False, "temp_dir": wanted["temp_dir"]}
    cluster = Cluster(initialize_head=True, head_node_args=common | wanted["head"])
    nodes = [cluster.head_node, *(cluster.add_node(**common | node) for node in wanted["nodes"])]
    held = []
    try:
        print(json.dumps({"address": cluster.address}), flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            if "remove" in request:
                (node,) = (node for node in nodes if _raylet(node) == request["remove"])
                cluster.remove_node(node, allow_graceful=False)
            else:
                ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False)
                held = [ray.put(np.ones(1 << 20, np.uint8)) for _ in range(request["fill"] >> 20)]
            print(json.dumps({"done": len(held)}), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid if "raylet" in node.all_processes else 0


class Nodes:
    """The requests of that process, from outside."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.address = self._answer()["address"]

    def remove(self, raylet: int) -> None:
        self._ask({"remove": raylet})

    def fill(self, count: int) -> None:
        """Fill the object store with so many bytes."""
        self._ask({"fill": count})

    def _ask(self, request: dict[str, int]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(f"the cluster's process ended with {self.process.wait()}")


@contextmanager
def nodes(bench: Bench, trial: Trial, head: dict[str, Any], others: list[dict[str, Any]]) -> Iterator[Nodes]:
    """A cluster for the jobs of a trial; stopped, and all of it ended, when the block is left."""
    wanted = {"head": head, "nodes": others, "temp_dir": str(bench.root / "ray")}
    before = set(processes.below(bench.root))
    with (bench.root / "nodes.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nodes", json.dumps(wanted)],
            cwd=bench.root,
            env=bench.environment(trial.switches.folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        made = Nodes(process)
        trial.env["RAY_ADDRESS"] = made.address
        yield made
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await_that(lambda: process.poll() is not None, "the end of the cluster", 60)
        finally:
            processes.end(set(processes.below(bench.root)) - before)


if __name__ == "__main__":
    main()
