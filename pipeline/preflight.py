"""What is wrong with a dump, its settings and its cluster, said before a run spends hours on them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from model.bundled import CheckpointError, missing, resolve
from pipeline import dump, run, storage
from pipeline.config import RefineConfig
from pipeline.flow.local import on_gpu
from pipeline.flow.session import (
    Placement,
    alive_nodes,
    alone_without,
    cluster_named,
    labelled,
    may_grow,
    network_pool,
    placed,
    ray_session,
    room,
    selected_by,
)
from pipeline.incremental import compare
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.outputs import check_apart, check_writable_folder
from pipeline.preflight_frames import check_frames, estimate
from pipeline.preflight_report import SHOWN, Check, Estimate, Report, size_of
from pipeline.records import InputError
from pipeline.stages import Cutting


@dataclass(frozen=True, kw_only=True)
class CheckConfig(RefineConfig):
    """Say what is wrong with a run before it starts: give the settings of the run itself.

    Settings may also come from the run's YAML file, named first: `jobs/check.py nightly.yaml --sample 0`.
    """

    sample: int = 200
    """Frames to read and decode, always the same ones of a dump; 0 for all."""
    cluster: bool = False
    """Start Ray as the run would, and look at its machines; done anyway where RAY_ADDRESS names a cluster."""
    probe: bool = False
    """Write one small file to the output and remove it (folders made for it stay); otherwise nothing is written."""
    json: bool = False
    """Print json for programs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample < 0:
            raise InputError(f"sample is {self.sample}: expected a number of frames, or 0 for all")


def check(config: CheckConfig) -> Report:
    """Check a run's settings, input, output and cluster; nothing is changed, and faults are findings, not exceptions.

    Frames are read by the reader and decoder of the run itself, in threads. A frame that the run would set aside is an
    error.
    """
    checks: list[Check] = []
    digest = None
    with _finding("checkpoint", checks):
        digest = _checkpoint(config, checks)
    settled = None
    with _finding("settings", checks):
        # Paths are worth a look even where the weights are not.
        settled = run.absolute((config if digest else replace(config, checkpoint="hrnet18s_128")).settled())
    if settled is None:
        return Report(checks, None)
    with _finding("output", checks):
        check_apart(settled.output, settled.predictions)
        checks.append(_output(settled))
    with _finding("device", checks):
        if settled.local:
            on_gpu(settled.device)
            if digest:
                arithmetic = run.network_of(settled)().arithmetic
                checks.append(Check("device", "ok", f"this machine runs the network ({arithmetic})"))
    with _finding("cluster", checks):
        if not settled.local and (settled.cluster or cluster_named()):
            grows = may_grow()
            with ray_session():
                nodes = alive_nodes()
            checks += _labels(settled, [node["Labels"] for node in nodes])
            refining = [node["Resources"] for node in labelled(nodes, settled.refine_label)]
            checks.append(cluster([node["Resources"] for node in nodes], run.placement_of(settled), refining, grows))
    with _finding("images", checks):
        storage.check_folder(settled.images)
        with _finding("predictions", checks):
            return Report(checks, _dump(settled, digest, checks))
    return Report(checks, None)


@contextmanager
def _finding(name: str, checks: list[Check]) -> Iterator[None]:
    """Turn an exception into an error of the check `name`; stores raise all kinds of their own."""
    try:
        yield
    except InputError as error:
        checks.append(Check(name, "error", str(error)))
    except Exception as error:
        checks.append(Check(name, "error", f"{type(error).__name__}: {' '.join(str(error).split())}"))


def _checkpoint(config: CheckConfig, checks: list[Check]) -> str | None:
    """The SHA-256 of the weights; None where they do not load."""
    from model.checkpoint import load

    path = resolve(config.checkpoint)
    if not storage.exists(path):
        raise InputError(missing(config.checkpoint))
    weights = storage.read(path)
    try:
        network = load(path, weights)
    except CheckpointError as error:
        raise InputError(str(error)) from None
    checks.append(Check("checkpoint", "ok", f"{config.checkpoint} loads as {network.config.name}"))
    return hashlib.sha256(weights).hexdigest()


def _output(config: CheckConfig) -> Check:
    output = config.output
    if config.probe:
        check_writable_folder(output)
        return Check("output", "ok", f"{output} can be written")
    if not os.path.isabs(output):
        message = (
            f"{output}: whether it can be written is known by trying only; --probe writes and removes a small file"
        )
        return Check("output", "warning", message)
    place = _existing(f"{output}/_ledger")
    if not os.path.isdir(place):
        raise InputError(f"{output}: cannot be written, {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{output}: cannot be written, no permission in {place}")
    return Check("output", "ok", f"{output} may be written")


def _existing(path: str) -> str:
    """The nearest folder (or file) on the way to a local path that is there."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def cluster(
    nodes: Sequence[Mapping[str, float]],
    wish: Placement,
    refining: Sequence[Mapping[str, float]] | None = None,
    grows: bool = True,
) -> Check:
    """Whether Ray can place the network processes and still has a CPU for the other stages.

    `nodes` are the resources of the machines that are alive, `refining` of those on which network processes may be; all
    unless given; others may come where it `grows`. Ray says nothing of a process that fits no machine, and starves
    tasks in silence.
    """
    total: Counter[str] = Counter()
    for node in nodes:
        total.update({name: node.get(name, 0) for name in ("CPU", "GPU")})
    refining = nodes if refining is None else refining
    size = f"{len(nodes)} machines, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs"
    if wish.device == "gpu" and not total["GPU"]:
        network_pool(refining, wish)
        if not grows:
            raise alone_without("GPU")
        message = f"{size}: no GPU is up; a run waits until an autoscaler starts machines with some"
        return Check("cluster", "warning", message)
    if total["CPU"] < 1:
        raise InputError(f"{size}: expected at least 1 CPU for reading and writing")
    network = network_pool(refining, wish)
    pool, needs = network.size, network.resources
    name, need = ("GPU", needs["num_gpus"]) if "num_gpus" in needs else ("CPU", needs["num_cpus"])
    places = sum(room(node.get(name, 0), need) for node in refining) if need else pool
    largest = max(node.get(name, 0) for node in refining)
    if not places:
        raise InputError(
            f"{size}: a network process needs {need:g} {name}s of one machine, the largest has {largest:g};"
            " the run would wait for ever"
        )
    left = total["CPU"] - min(pool, places) * needs["num_cpus"]
    if left < 1:
        raise InputError(f"{size}: {left:g} CPUs are left for reading and writing, expected at least 1")
    if places < pool:
        message = f"{size}: of {pool} network processes with {need:g} {name}s only {places} find a place"
        return Check("cluster", "warning", message)
    if placed(nodes, network, wish) == "fused":
        return Check("cluster", "ok", f"{size}: {pool} network processes, which read and write as well")
    if left < 2:
        message = f"{size}: {left:g} CPUs are left for reading and writing, so that these take turns"
        return Check("cluster", "warning", message)
    return Check("cluster", "ok", f"{size}: {pool} network processes, {left:g} CPUs for the other stages")


def _labels(config: CheckConfig, labels: Sequence[Mapping[str, str]]) -> list[Check]:
    """A warning for each label of a stage that no machine has."""
    found = []
    for label in (config.refine_label, config.extract_label):
        (wanted,) = selected_by(label).get("label_selector", {None: None}).items()
        if label and wanted not in {pair for machine in labels for pair in machine.items()}:
            message = f"no machine that is up has the label {label}; a run waits until an autoscaler starts one"
            found.append(Check("cluster", "warning", message))
    return found


def _dump(config: CheckConfig, digest: str | None, checks: list[Check]) -> Estimate | None:
    """Check what depends on the dump: its listing, frames, an earlier run on the output, and space."""
    form, output_form, reader = dump.of_run(config)
    cutting = Cutting(config.threshold(form), config.patch_size, config.padding, config.parity)
    ledger = Ledger(config.output)
    with _finding("earlier run", checks):
        fingerprint = run.fingerprint(config, form, output_form, cutting, digest or "")
        ledger.load(fingerprint, restart=True)
        dump.check_replaced(config.output, config.images, output_form, config.restart)
        if digest:
            checks.append(_earlier_run(config, fingerprint, len(ledger.parts)))
        if going_on := Lease(config.output).held_by_another():
            checks.append(Check("earlier run", "warning", going_on))
    listed = reader.list_frames(ledger.identities)
    if not listed:
        raise InputError(f"{config.predictions}: no frame found, read as {form}")
    refs = listed[: config.limit]
    checks.append(Check("predictions", "ok", f"{len(refs)} frames, read as {form}"))
    found, measured = check_frames(config, config.sample, reader, cutting, form, output_form, refs)
    checks += found
    todo = refs if config.restart else compare(refs, listed, ledger).todo
    to_do = estimate(measured, sum(not ref.error for ref in todo))
    if to_do and os.path.isabs(config.output) and os.path.isdir(_existing(config.output)):
        with _finding("space", checks):
            checks.append(_space(config.output, to_do.output_bytes))
    return to_do


def _earlier_run(config: CheckConfig, fingerprint: dict[str, Any], done: int) -> Check:
    run = f"{config.output}/_ledger/run.json"
    if not storage.exists(run):
        return Check("earlier run", "ok", "none on this output")
    before = json.loads(storage.read(run))
    differing = sorted(key for key in {*before, *fingerprint} if before.get(key) != fingerprint.get(key))
    if not differing:
        return Check("earlier run", "ok", f"same settings, {done} frames are done")
    if config.restart:
        return Check("earlier run", "ok", f"other settings; --restart forgets the {done} frames that are done")
    if not done:
        return Check("earlier run", "ok", "other settings, but it finished no frame")
    findings = [f"{run}: {key} = {before.get(key)!r}, not {fingerprint.get(key)!r}" for key in differing]
    message = "this output was made with other settings; choose another output, or --restart to refine every frame anew"
    return Check("earlier run", "error", message, findings[:SHOWN], len(findings))


def _space(output: str, needed: int) -> Check:
    free = shutil.disk_usage(_existing(output)).free
    text = f"about {size_of(needed)} needed, {size_of(free)} free at {output}"
    if free < needed:
        raise InputError(text)
    # Refined outlines are longer than coarse ones, and the ledger and the last files need their place too.
    return Check("space", "warning" if free < 2 * needed else "ok", text)
