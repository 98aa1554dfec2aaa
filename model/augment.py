"""Random changes to training patches (N, P, P, 5) uint8: RGB, coarse mask 0/1, target mask 0/1."""

from __future__ import annotations

import cv2
import numpy as np

BRIGHTNESS = 32.0
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
HUE_DEGREES = 2 * 18.0
"""The reference's photometric distortion; its hue is in OpenCV's half degrees."""


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


def augment(patches: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All of the above, for a small training set."""
    for change in (flip, turn, invert, distort, vary):
        patches = change(patches, rng)
    return patches
