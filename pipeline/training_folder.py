"""What a training run keeps in its output folder: settings, checkpoint, log, event files, weights.

run.json              the settings, which every later run on this folder must share
last.pt               everything needed to go on
log.jsonl             one line per step, up to the checkpoint
best.safetensors      the weights with the best validation so far, and best.json about them
weights.safetensors   what came out, and weights.json about them, written last
tb/                   TensorBoard event files
_ledger/lease.json    who is training here now (pipeline/lease.py)
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from model import checkpoint
from model.hrnet import RefinementNetwork
from pipeline import storage
from pipeline.records import InputError

_OF_A_RUN = frozenset({"data", "data_patches", "batch_size", "fit.network"})
"""Settings that every run.json of a training run has; a file of that name may be another program's."""

_MADE = ("weights.json", "last.pt", "log.jsonl", "best.safetensors", "best.json", "weights.safetensors")
"""In the order in which a restart forgets them: killed in between, it leaves a run that goes on, or one to begin."""


class TrainingFolder:
    """The output of a training run at any fsspec URL; of several processes only one writes.

    A kill at any moment leaves files that fit together: each appears whole or not at all, and the checkpoint, which
    the others are cut back to, is written after what it speaks of.
    """

    def __init__(self, output: str) -> None:
        self.root = output.rstrip("/")
        self._log: list[str] = []
        self._events: _EventFiles | None = None

    def url(self, name: str) -> str:
        return f"{self.root}/{name}"

    def check(self, settings: dict[str, Any], restart: bool) -> bool:
        """Whether this is the folder of a run that a run with these settings goes on with; writes nothing.

        Raises InputError where it holds the checkpoint or weights of a run with other settings, naming the first that
        differs, or a file that a run would replace though none has made it.
        """
        before = self._settings_before()
        if before is None:
            for name in ("run.json", *_MADE):
                if storage.exists(self.url(name)):
                    raise InputError(f"{self.url(name)}: a file that no training run made here; choose another output")
        if before is None or restart or not (self.finished or storage.exists(self.url("last.pt"))):
            return False
        for key in sorted({*before, *settings}):
            if before.get(key) != settings.get(key):
                raise InputError(
                    f"{self.url('run.json')}: this output was made with {key} = {before.get(key)!r},"
                    f" not {settings.get(key)!r}; choose another output, or start anew with --restart"
                )
        return True

    def claim(self, settings: dict[str, Any], restart: bool) -> None:
        """Make this the folder of a run with these settings; with `restart`, forget what an earlier run left.

        Raises InputError as `check` does, and where it cannot be written.
        """
        if self.check(settings, restart):
            return
        if restart:
            for name in _MADE:
                storage.remove(self.url(name))
            if storage.is_dir(self.url("tb")):
                for name in storage.find(self.url("tb"), ("",)):
                    storage.remove(f"{self.url('tb')}/{name}")
        try:
            storage.put(self.url("run.json"), json.dumps(settings, indent=1, sort_keys=True).encode())
        except OSError as error:
            raise InputError(f"{self.root}: cannot write the output there ({error.strerror or error})") from None

    def _settings_before(self) -> dict[str, Any] | None:
        """What run.json says; None where there is none, or one that no training run has written."""
        content = storage.read_if_there(self.url("run.json"))
        try:
            found = json.loads(content or b"null")
        except ValueError:
            return None
        return found if isinstance(found, dict) and found.keys() >= _OF_A_RUN else None

    @property
    def finished(self) -> bool:
        """Whether the weights have been exported."""
        return storage.exists(self.url("weights.json"))

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint as given to `save`, or None where there is none. InputError for a damaged file."""
        path = self.url("last.pt")
        if not storage.exists(path):
            return None
        data = storage.read(path)
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a different type for each way a file can be broken
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise InputError(f"{path}: damaged ({reason}); start anew with --restart") from None

    def begin(self, step: int) -> None:
        """Open log and event files to go on after a step, dropping what they hold beyond it."""
        path = self.url("log.jsonl")
        self._log = storage.read(path).decode().splitlines()[:step] if step and storage.exists(path) else []
        self._events = _EventFiles(self.url("tb"), step)

    def log(self, entry: dict[str, Any]) -> None:
        """Add the line of the next step; it is on storage with the next checkpoint."""
        self._log.append(json.dumps(entry))
        if self._events:
            self._events.add(entry)

    def save(self, state: dict[str, Any]) -> None:
        """Write log, event files and then the checkpoint: tensors and plain values."""
        storage.put(self.url("log.jsonl"), "".join(f"{line}\n" for line in self._log).encode())
        if self._events:
            self._events.publish()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        storage.put(self.url("last.pt"), buffer.getvalue())

    def write_weights(self, name: str, network: RefinementNetwork, card: dict[str, Any]) -> None:
        """Write `<name>.safetensors` and its card."""
        storage.put(self.url(f"{name}.safetensors"), checkpoint.as_safetensors(network, card))
        self._write_card(name, card)

    def export_best(self) -> dict[str, Any]:
        """Make the best weights those that came out; returns their card."""
        data = storage.read(self.url("best.json"))
        try:
            card = json.loads(data)
        except ValueError:
            raise InputError(f"{self.url('best.json')}: damaged; start anew with --restart") from None
        storage.put(self.url("weights.safetensors"), storage.read(self.url("best.safetensors")))
        self._write_card("weights", card)
        return card

    def _write_card(self, name: str, card: dict[str, Any]) -> None:
        storage.put(self.url(f"{name}.json"), json.dumps(card, indent=1, sort_keys=True).encode())

    def close(self) -> None:
        if self._events:
            self._events.close()


class _EventFiles:
    """TensorBoard's files: in place on a local disk, else uploaded now and then."""

    EVERY = 10
    """Steps from one loss in the files to the next."""

    def __init__(self, url: str, step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise InputError(f"training needs more packages: pip install 'bpr-ray[train]' ({error})") from None
        local = storage.absolute(url)
        self.target, self.temporary = url, None
        if not os.path.isabs(local):
            self.temporary = tempfile.TemporaryDirectory()
            local = self.temporary.name
        # TensorBoard itself hides what an interrupted run has written from this step on.
        self.writer = SummaryWriter(local, purge_step=step + 1)
        self.folder = local

    def add(self, entry: dict[str, Any]) -> None:
        step, validation = entry["step"], entry.get("validation")
        if step % self.EVERY == 0 or validation:
            for name in ("loss", "rate", "grad_norm"):
                self.writer.add_scalar(f"train/{name}", entry[name], step)
        if validation:
            for when in ("before", "after"):
                for name, value in validation[when].items():
                    self.writer.add_scalar(f"validation_{when}/{name}", value, step)

    def publish(self) -> None:
        self.writer.flush()
        if self.temporary:
            for path in Path(self.folder).iterdir():
                storage.put(f"{self.target}/{path.name}", path.read_bytes())

    def close(self) -> None:
        self.writer.close()
        self.publish()
        if self.temporary:
            self.temporary.cleanup()
