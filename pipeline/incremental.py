"""What has changed in a dump since earlier runs on an output: which frames are to be refined, and which are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.identity import unchanged
from pipeline.ledger import Ledger
from pipeline.records import FrameRef


@dataclass(frozen=True)
class Difference:
    """Between the frames of a dump and those that a ledger holds as finished."""

    todo: list[FrameRef]
    """New and changed frames, and those set aside before, in the dump's order."""
    changed: list[str]
    """Frame ids with another image or other predictions, or with a fault that they did not have."""
    removed: list[str]
    """Frame ids that are no longer in the dump."""
    renewed: dict[str, str]
    """Identity of frames that have not changed but whose predictions lie elsewhere than before."""
    unchanged: int

    @property
    def new(self) -> int:
        """Number of frames that were never finished."""
        return len(self.todo) - len(self.changed)


def compare(refs: Sequence[FrameRef], listed: Sequence[FrameRef], ledger: Ledger) -> Difference:
    """Compare the frames to refine, `refs`, and the whole dump, `listed`, with what was done before."""
    todo, changed, renewed = [], [], {}
    for ref in refs:
        before = ledger.identities.get(ref.frame_id)
        if before is not None and not ref.error and unchanged(before, ref.identity):
            if "@" in ref.identity and before != ref.identity:
                renewed[ref.frame_id] = ref.identity
            continue
        todo.append(ref)
        if before is not None or ref.frame_id in ledger.withdrawn:
            changed.append(ref.frame_id)
    there = {ref.frame_id for ref in listed}
    removed = [frame_id for frame_id in (*ledger.parts, *sorted(ledger.withdrawn)) if frame_id not in there]
    return Difference(todo, changed, removed, renewed, len(refs) - len(todo))
