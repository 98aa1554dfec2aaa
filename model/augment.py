"""Random changes to training patches (N, P, P, 5) uint8: RGB, coarse mask 0/1, target mask 0/1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

BRIGHTNESS = 32.0
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
HUE_DEGREES = 2 * 18.0
"""The reference's photometric distortion; its hue is in OpenCV's half degrees."""

WOBBLE_PX = 4.0
WOBBLE_CELLS = (2, 6)
"""How far a perturbed coarse contour moves at most, and the side of the grid of random moves it follows smoothly."""


@dataclass(frozen=True)
class Augmentation:
    """The changes a training patch goes through: by default the reference's; the others help small data sets."""

    flip: bool = True
    """Mirror half of the patches left to right."""
    distort: bool = True
    """Photometric distortion of the image: brightness, contrast, saturation, hue."""
    turn: bool = False
    """Turn by multiples of 90 degrees: a set of upright objects lacks level edges."""
    rotate: float = 0.0
    """Rotate by up to so many degrees; best with patches that were cut with padding."""
    rescale: float = 1.0
    """Magnify or shrink by up to this factor."""
    invert: bool = False
    """Swap object and background in half of the patches."""
    vary: bool = False
    """Permute colour channels, blur, add grain."""
    perturb: float = 0.0
    """Share of the patches whose coarse contour is moved anew by up to 4 px."""

    def __post_init__(self) -> None:
        if not 0 <= self.perturb <= 1:
            raise ValueError(f"perturb is {self.perturb}: expected a share between 0 and 1")
        if not 0 <= self.rotate <= 360:
            raise ValueError(f"rotate is {self.rotate}: expected degrees from 0 to 360")
        if not 1 <= self.rescale < math.inf:
            raise ValueError(f"rescale is {self.rescale}: expected a factor of at least 1")


def flip(patches: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror each patch left to right with probability one half."""
    chosen = rng.random(len(patches)) < 0.5
    out = patches.copy()
    out[chosen] = patches[chosen, :, ::-1]
    return out


def turn(patches: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn each patch by a random multiple of 90 degrees: a set of upright objects lacks level edges."""
    return np.stack([np.rot90(patch, rng.integers(4)) for patch in patches])


def invert(patches: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Swap object and background in both masks with probability one half per patch.

    What then tells the two sides apart is the edge and the coarse mask, not what the objects of the training set happen
    to look like.
    """
    out = patches.copy()
    out[rng.random(len(patches)) < 0.5, ..., 3:] ^= 1
    return out


def vary(patches: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give the images what a small training set lacks: other colours (channels permuted), softness, grain."""
    out = patches.copy()
    for patch in out:
        image = patch[..., :3]
        if rng.random() < 0.5:
            image = image[..., rng.permutation(3)]
        if rng.random() < 0.3:
            image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.5))
        if rng.random() < 0.3:
            image = (image + rng.normal(0, rng.uniform(1, 8), image.shape)).clip(0, 255)
        patch[..., :3] = np.rint(image)
    return out


def distort(patches: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Photometric distortion of the image channels, each kind with probability one half per patch; masks stay."""
    out = patches.copy()
    for patch in out:
        image = patch[..., :3].astype(np.float32)
        if rng.random() < 0.5:
            image += rng.uniform(-BRIGHTNESS, BRIGHTNESS)
        contrast_first = rng.random() < 0.5
        contrast = rng.uniform(*CONTRAST) if rng.random() < 0.5 else 1.0
        if contrast_first:
            image *= contrast
        if (colour := rng.random(2) < 0.5).any():
            hsv = cv2.cvtColor(image.clip(0, 255) / 255, cv2.COLOR_RGB2HSV)
            if colour[0]:
                hsv[..., 1] = (hsv[..., 1] * rng.uniform(*SATURATION)).clip(0, 1)
            if colour[1]:
                hsv[..., 0] = (hsv[..., 0] + rng.uniform(-HUE_DEGREES, HUE_DEGREES)) % 360
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255
        if not contrast_first:
            image *= contrast
        patch[..., :3] = np.rint(image.clip(0, 255))
    return out


def perturb(patches: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Move the coarse contour smoothly, by up to WOBBLE_PX, in a share of the patches."""
    out = patches.copy()
    ys, xs = np.mgrid[: patches.shape[1], : patches.shape[2]].astype(np.float32)
    for i in np.flatnonzero(rng.random(len(patches)) < share):
        patch = out[i]
        cells = int(rng.integers(WOBBLE_CELLS[0], WOBBLE_CELLS[1] + 1))
        moves = rng.uniform(-1, 1, (cells, cells, 2)).astype(np.float32) * np.float32(rng.uniform(0, WOBBLE_PX))
        moves = cv2.resize(moves, patches.shape[2:0:-1], interpolation=cv2.INTER_CUBIC)
        coarse = np.ascontiguousarray(patch[..., 3])
        patch[..., 3] = cv2.remap(
            coarse, xs + moves[..., 0], ys + moves[..., 1], cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE
        )
    return out


def warp(patches: np.ndarray, side: int, degrees: float, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Rotate by up to `degrees` and magnify by 1/`factor` to `factor`; returns the middles (N, side, side, 5)."""
    out = np.empty((len(patches), side, side, patches.shape[3]), np.uint8)
    centre = (patches.shape[1] - 1) / 2
    for changed, patch in zip(out, patches):
        scale = float(np.exp(rng.uniform(-1, 1) * np.log(factor)))
        matrix = cv2.getRotationMatrix2D((centre, centre), float(rng.uniform(-degrees, degrees)), scale)
        matrix[:, 2] += (side - 1) / 2 - centre
        for channels, interpolation in ((slice(0, 3), cv2.INTER_LINEAR), (slice(3, 5), cv2.INTER_NEAREST)):
            part = np.ascontiguousarray(patch[..., channels])
            changed[..., channels] = cv2.warpAffine(
                part, matrix, (side, side), flags=interpolation, borderMode=cv2.BORDER_REFLECT_101
            )
    return out


def augment(patches: np.ndarray, side: int, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """The chosen changes to patches (N, S, S, 5), S >= side; returns their middles (N, side, side, 5) uint8."""
    if augmentation.rotate or augmentation.rescale != 1:
        patches = warp(patches, side, augmentation.rotate, augmentation.rescale, rng)
    else:
        patches = middle(patches, side)
    if augmentation.perturb:
        patches = perturb(patches, augmentation.perturb, rng)
    for chosen, change in (
        (augmentation.flip, flip),
        (augmentation.turn, turn),
        (augmentation.invert, invert),
        (augmentation.distort, distort),
        (augmentation.vary, vary),
    ):
        if chosen:
            patches = change(patches, rng)
    return patches


def middle(patches: np.ndarray, side: int) -> np.ndarray:
    """The middles (N, side, side, C) of patches (N, S, S, C)."""
    margin = (patches.shape[1] - side) // 2
    return patches[:, margin : margin + side, margin : margin + side]
