"""A whole run, seen from the driver: list the dump, compare it with what is done, refine the rest, finish the output.

dump --list--> frames - ledger.done = todo -> flow -> receipts -> ledger -> final output
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from model.backend import Backend, UnsupportedError, resolve_backend
from model.bundled import missing, resolve
from pipeline import dump, flow, storage
from pipeline.config import RefineConfig, with_absolute
from pipeline.formats import Reader, Writer
from pipeline.formats.parts import PartError, damaged, sweep
from pipeline.incremental import Difference, compare
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.outputs import check_apart, check_kept
from pipeline.progress import Progress, Summary
from pipeline.records import FrameRef, InputError
from pipeline.redaction import redacted
from pipeline.run_log import RunLog
from pipeline.run_record import recorded
from pipeline.stages import Cutting, commit
from pipeline.work import Receipt, Work

if TYPE_CHECKING:
    from model import Refiner

METHOD = 2
"""Raised with every change of this program that makes other masks of the same input and settings."""


def run(config: RefineConfig, log: Callable[[str], None] = print) -> Summary:
    """Refine a dump: list it, leave out what is done and has not changed, refine the rest, write the final output.

    Raises InputError where nothing can be done at all, or another run is writing the output. Frames with a fault are
    set aside in `_ledger/quarantine.csv`; what the run did is kept in `_ledger/runs/`.
    """
    report = RunLog(config.log_format, log)
    with report.telling_the_end():
        summary = _run(config, report)
    told = {**asdict(summary), "quarantined": len(summary.quarantined), "output": redacted(summary.output)}
    report.event("finished", **told)
    return summary


def _run(config: RefineConfig, report: RunLog) -> Summary:
    started = time.monotonic()
    config = absolute(config.settled())
    places = config.predictions, config.images, config.output
    if not config.local and any(url.startswith("memory:") for url in places):
        raise InputError("memory:// is the memory of one process: expected --local with it")
    check_apart(config.output, config.predictions)
    storage.check_folder(config.images)
    form, output_form, reader = dump.of_run(config)
    dump.check_replaced(config.output, config.images, output_form, config.restart)
    writer = dump.writer(config.output, output_form, form)
    cutting = Cutting(config.threshold(form), config.patch_size, config.padding, config.parity)
    weights = storage.read(config.checkpoint)
    settings = fingerprint(config, form, output_form, cutting, hashlib.sha256(weights).hexdigest())

    with (
        flow.stopped_by_signals(),
        Lease(config.output) as lease,
        closing(Ledger(config.output, lease.confirm)) as ledger,
    ):
        ledger.load(settings, restart=config.restart)
        listed = reader.list_frames(ledger.identities)
        if not listed:
            raise InputError(f"{config.predictions}: no frame found, read as {form}")
        refs = listed[: config.limit]
        if ledger.anew:
            before = [*ledger.parts, *ledger.withdrawn]
            ledger.withdraw(before, [])
            _take_back(ledger, writer, refs, before)
        ledger.start(settings)
        ledger.forget_others({ref.frame_id for ref in listed})
        difference = compare(refs, listed, ledger)
        gone = difference.removed if config.prune else []
        ledger.withdraw([*difference.changed, *gone], [])
        _take_back(ledger, writer, listed, [*difference.changed, *gone])
        ledger.withdraw([], gone)
        ledger.renew(difference.renewed)
        todo, place = difference.todo, {}
        report.run_id = lease.run_id
        facts = _facts(lease, len(listed), refs, difference)
        report.event("start", **facts)
        if not report.json:
            removed = f"{len(difference.removed)} removed" + (" (outputs as well)" if gone else "")
            report.write(
                f"dump         {difference.new} new, {len(difference.changed)} changed, {removed},"
                f" {difference.unchanged} unchanged"
            )
        event = report.event if report.json else None
        progress = Progress(total=len(todo), done_before=difference.unchanged, log=report.write, event=event)
        metrics = flow.Metrics(lease.run_id, config.output, len(todo))
        with recorded(ledger, {**facts, "settings": settings}, progress, place), ledger.flushed():
            for receipts in _blocks_of_receipts(config, todo, reader, writer, cutting, weights, place):
                lease.check()
                ledger.record(receipts)
                report.set_aside(receipts)
                progress.update(receipts)
                metrics.update(receipts)
            ledger.flush()
            _finish(ledger, writer, refs, lease.confirm)
        if todo or lease.taken_over:
            lease.confirm()
            storage.sweep_temporary(config.output)
        summary = progress.summary(config.output, ledger.aside, time.monotonic() - started)
    return replace(
        summary,
        new=difference.new,
        changed=len(difference.changed),
        unchanged=difference.unchanged,
        removed=len(difference.removed),
        pruned=config.prune,
    )


def _take_back(ledger: Ledger, writer: Writer, refs: Sequence[FrameRef], frame_ids: Sequence[str]) -> None:
    """Remove the files of withdrawn frames that no frame of `refs` will replace.

    The ledger knows them as withdrawn before: no frame whose files are gone must count as finished, whatever becomes of
    this run and of the dump; and it knows them until they are gone, so that a run killed in between finds them again.
    """
    if frame_ids and not writer.result:
        names = ledger.file_names({*frame_ids})
        writer.withdraw([FrameRef(frame_id, name) for frame_id, name in names.items()], refs)


def _facts(lease: Lease, frames: int, refs: Sequence[FrameRef], difference: Difference) -> dict[str, Any]:
    return {
        "run_id": lease.run_id,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": lease.started,
        "frames_in_dump": frames,
        "frames": len(refs),
        "todo": len(difference.todo),
        "new": difference.new,
        "changed": len(difference.changed),
        "removed": len(difference.removed),
        "unchanged": difference.unchanged,
    }


def _finish(ledger: Ledger, writer: Writer, refs: Sequence[FrameRef], confirm: Callable[[], None]) -> None:
    """Make the final output, unless it was made of the very same parts before and is still there.

    `confirm` raises where the output is another run's by now, which must keep its parts.
    """
    if not writer.result:
        return
    before, files = ledger.finished()
    there = storage.exists(storage.join(ledger.output, writer.result))
    if before is None and not there and not any(ref.frame_id in ledger.parts for ref in refs):
        return
    key = _key(refs, ledger.parts)
    confirm()
    if key != before or not there or not all(storage.exists(storage.join(ledger.output, path)) for path in files):
        ledger.note_finished(None)
        try:
            files = writer.finish(refs, ledger.parts)
        except PartError as error:
            # Where one is lost, others may be, and each would end a run of its own.
            lost = damaged(ledger.output, {*ledger.parts.values()})
            frames = [frame_id for frame_id, part in ledger.parts.items() if part in lost]
            ledger.withdraw(frames, [])
            raise InputError(
                f"{error}; the same command refines the {len(frames)} frames of {len(lost)} such parts again"
            ) from None
        try:
            confirm()
        except InputError:
            # It may have replaced the other run's, which the next run is to make anew.
            ledger.note_finished(None)
            raise
        ledger.note_finished(key, files)
    confirm()
    sweep(ledger.output, {*ledger.parts.values()})


def _key(refs: Sequence[FrameRef], parts: Mapping[str, str]) -> str:
    """Tells what a final output is made of: which part holds which frame, in which order."""
    made = hashlib.blake2b(digest_size=16)
    for ref in refs:
        made.update(f"{ref.frame_id}\n{parts.get(ref.frame_id)}\n{ref.positions}\n".encode(errors="surrogatepass"))
    return made.hexdigest()


def _blocks_of_receipts(
    config: RefineConfig,
    todo: list[FrameRef],
    reader: Reader,
    writer: Writer,
    cutting: Cutting,
    weights: bytes,
    place: dict[str, Any],
) -> Iterator[list[Receipt]]:
    """Refine the frames; those that the listing has found wrong take no worker, and start no cluster.

    `place` is told where they are refined (`flow.Plan.place`).
    """
    if rejected := [Work(ref.frame_id, error=ref.error, file_name=ref.file_name) for ref in todo if ref.error]:
        yield commit(rejected, writer)
    sound = [ref for ref in todo if not ref.error]
    if not sound:
        return
    from model.checkpoint import load

    # Here a wrong checkpoint is one clear line; in an actor it would be a pool that never starts.
    load(config.checkpoint, weights)
    plan = flow.Plan(
        flow.Stages(reader, writer, config.images, cutting, config.guard, config.limits),
        network_of(config),
        sound,
        frames_per_block=config.frames_per_block,
        device=config.device,
        ledger=True,
        place=place,
    )
    if config.local:
        place["placement"] = "local"
    for receipts in flow.run_local(plan) if config.local else flow.run_ray(plan, placement_of(config)):
        # What an earlier run made of a frame before it went wrong is not its output any more.
        writer.withdraw([FrameRef(receipt.frame_id, receipt.file_name) for receipt in receipts if receipt.error], ())
        yield receipts


def absolute(config: RefineConfig) -> RefineConfig:
    """The same settings with paths that mean the same in every process."""
    check_kept(config.output)
    checkpoint = resolve(config.checkpoint)
    if not storage.exists(checkpoint):
        raise InputError(missing(config.checkpoint))
    config = replace(config, checkpoint=checkpoint)
    return with_absolute(config, "predictions", "images", "output", "image_list", "checkpoint")


def placement_of(config: RefineConfig) -> flow.Placement:
    """Where the run wants its stages."""
    return flow.Placement(
        mode=config.placement,
        workers=config.workers,
        gpus_per_worker=config.gpus_per_worker,
        device=config.device,
        refine_label=config.refine_label,
        extract_label=config.extract_label,
    )


def network_of(config: RefineConfig) -> Callable[[], Refiner]:
    """What loads the network, in the process that is to run it."""
    backends = backends_of(config)
    return partial(flow.load_refiner, config.checkpoint, config.precision, config.batch_size, *backends, config.device)


def backends_of(config: RefineConfig) -> tuple[Backend, Backend]:
    """What runs the network on a CPU, told here once so that no worker chooses another, and what on a GPU."""
    try:
        return resolve_backend(config.backend), "torch" if config.backend == "torch" else "auto"
    except UnsupportedError as error:
        raise InputError(str(error)) from None


def fingerprint(config: RefineConfig, form: str, output_form: str, cutting: Cutting, weights: str) -> dict[str, Any]:
    """The settings that decide what becomes of a frame; `weights` is the SHA-256 of the checkpoint."""
    # The thresholds of a guard that is switched off make no difference.
    guard = asdict(config.guard) if config.guard.enabled else {"enabled": False}
    return {
        "method": METHOD,
        "predictions": redacted(config.predictions),
        "images": redacted(config.images),
        "image_list": config.image_list and redacted(config.image_list),
        "image_pattern": config.image_pattern,
        "format": form,
        "output_format": output_form,
        "weights_sha256": weights,
        "nms_threshold": cutting.nms_threshold,
        "patch_size": cutting.patch_px,
        "padding": cutting.padding,
        "parity": cutting.parity,
        **{f"guard.{name}": value for name, value in guard.items()},
        "backend": backends_of(config)[0],
        "gpu_backend": backends_of(config)[1],
        "precision": config.precision,
        "batch_size": config.batch_size,
    }
