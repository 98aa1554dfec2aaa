"""What a frame's inputs are, in a few characters: an identity that changes whenever its image or predictions do.

`<image>.<predictions>`, two digests; `+<others>` is appended where the frame may read files that only reading it shows,
`@<place>` where the predictions need not be read again as long as they lie where they did.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from pipeline import storage
from pipeline.records import FrameRef, InputError

LISTED_FROM = 1000
"""Images from which on a store is asked for a listing of their folder, which has about as many in one answer."""


def digest(*values: str | bytes) -> str:
    """16 characters that differ where the values do: enough where only two versions of one frame are ever compared."""
    made = hashlib.blake2b(digest_size=8)
    for value in values:
        data = value.encode(errors="surrogatepass") if isinstance(value, str) else value
        made.update(b"%d:" % len(data) + data)
    return made.hexdigest()


def unchanged(before: str, now: str) -> bool:
    """Whether a frame that was `before` when it was read is so `now`, as it is listed; unknown is not the same."""
    before, now = before.partition("@")[0], now.partition("@")[0]
    return bool(before) and before == (now if "+" in before else now.partition("+")[0])


def identified(refs: Sequence[FrameRef], images: str, predictions: Sequence[str]) -> list[FrameRef]:
    """References with their identity: that of each image below the folder `images`, and a digest of its predictions."""
    versions = image_versions(images, (ref.file_name for ref in refs))
    return [
        replace(ref, identity=f"{digest(ref.file_name, versions.get(ref.file_name, ''))}.{content}")
        for ref, content in zip(refs, predictions)
    ]


def image_versions(images: str, file_names: Iterable[str]) -> dict[str, str]:
    """The version of each image below the folder `images`; empty where it is not there."""
    names = {name for name in file_names if storage.stays_below(name)}
    found: dict[str, str] = {}
    if len(names) >= LISTED_FROM and not storage.is_local(images):
        try:
            found = {path: version for path, version in storage.versions(images) if path in names}
        except (InputError, NotImplementedError, OSError):  # a store that cannot list
            found = {}
    missing = [name for name in names if not found.get(name)]
    found.update(zip(missing, storage.versions_of(images, missing)))
    return found
