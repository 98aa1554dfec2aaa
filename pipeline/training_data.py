"""What training reads: this process's batches, loaded ahead, and its share of the validation patches."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from multiprocessing import forkserver, resource_tracker
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from model.augment import middle
from model.hrnet import RefinementNetwork, fold, output_resize
from model.preprocess import network_input
from pipeline import storage
from pipeline.metrics.patches import PatchScores
from pipeline.patch_dataset import PatchBatches, PatchDataset
from pipeline.records import InputError

VALIDATION_BATCH = 64

GPU_LOADERS = 4
"""Processes that cut and augment batches for each GPU, where the setting is left open."""


def place() -> tuple[int, int]:
    """The rank of this process in torch.distributed and the number of all; (0, 1) where it is not in use."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


def gathered(mine: Any) -> list[Any]:
    """What each process gives, in their order."""
    _, world = place()
    found = [mine] * world
    if world > 1:
        dist.all_gather_object(found, mine)
    return found


def validation_set(data: Sequence[str], val_data: Sequence[str]) -> PatchDataset | None:
    """The val split of `val_data`, or all where it has none; without `val_data` the val split of `data`, if any."""
    urls = val_data or data
    if any(path.startswith("val/") for url in urls for path in storage.find(url, (".parquet",))):
        return PatchDataset(urls, "val")
    return PatchDataset(urls, "train") if val_data else None


class Validation:
    """This process's share of the validation patches, and the scores of a network on those of all processes."""

    def __init__(self, dataset: PatchDataset, patch_px: int, limit: int) -> None:
        self.patch_px = patch_px
        side = min(self.patch_px, dataset.side_px)
        batches = dataset.iterate(VALIDATION_BATCH, *place(), limit)
        self.batches = [np.ascontiguousarray(middle(batch, side)) for batch in batches]

    @torch.inference_mode()
    def scores(self, network: RefinementNetwork) -> dict[str, Any]:
        """PatchScores.result() over all processes, and the number of patches."""
        device = next(network.parameters()).device
        folded = fold(deepcopy(network))
        mine = PatchScores()
        for batch in self.batches:
            side = network.config.input_px * batch.shape[1] // self.patch_px
            x = network_input(torch.from_numpy(batch[..., :4]).to(device), side)
            resize = output_resize(side, batch.shape[1]).to(device)
            refined = (resize @ folded(x) @ resize.T)[:, 0] > 0
            mine.add(batch[..., 3], refined.cpu().numpy(), batch[..., 4])
        total = sum(gathered(mine), PatchScores())
        return {"patches": total.patches, **total.result()}


class _Steps(Dataset):
    """The batches of PatchBatches, which each loading process opens for itself."""

    def __init__(self, make: Callable[[], PatchBatches]) -> None:
        self.make, self.batches = make, None

    def __getitem__(self, step: int) -> np.ndarray:
        if self.batches is None:
            self.batches = self.make()
        return self.batches[step]


def load_batches(
    make: Callable[[], PatchBatches], steps: int, loaders: int | None, first: int
) -> Iterable[torch.Tensor]:
    """The batches of steps `first` up to `steps`, loaded ahead by `loaders` processes; None suits the device."""
    if loaders is None:
        loaders = GPU_LOADERS if torch.cuda.is_available() else 0
    if loaders:
        _begin_forkserver()
    loader = DataLoader(
        _Steps(make),
        batch_size=None,
        sampler=range(first, steps),
        num_workers=loaders,
        # A fork would inherit locks held by the threads of torch and of storage clients.
        multiprocessing_context="forkserver" if loaders else None,
        worker_init_fn=_begin_loading if loaders else None,
        prefetch_factor=4 if loaders else None,
    )
    try:
        yield from loader
    except InputError as error:
        # A loading process puts its traceback into the message.
        raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from None


def _begin_forkserver() -> None:
    """Start the process that loaders are forked from, all deaf to SIGTERM.

    Who stops training often tells the whole group of processes; without its loaders the training process could not go
    on to where it saves. It ends them itself.
    """
    # This one first: it lets SIGTERM through again when it is started.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_loading(_: int) -> None:
    cv2.setNumThreads(0)
    # Ctrl-C reaches the whole group of processes; the training process decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
