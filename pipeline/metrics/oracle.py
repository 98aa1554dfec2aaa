"""What refinement could gain at best: predictions whose pixels near the boundary are taken from the ground truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from pipeline.ground_truth import TrueFrame, TrueInstance
from pipeline.metrics.boundary import disc
from pipeline.metrics.overlap import Located, Region, best_truths, box_of, check_frame, mask_within, within_frame
from pipeline.records import Frame, Instance, cut_to_box

LEAST_IOU = 0.5

DISTANCES_PX = (1.0, 2.0, 3.0, math.inf)
"""Those of the paper's Table 1."""


def oracle(truth: TrueFrame, frame: Frame, distances_px: Sequence[float] = DISTANCES_PX) -> list[Frame]:
    """One frame for each distance, in which all pixels up to so far from a predicted boundary are right.

    The upper bound of the paper's Table 1 ("Look Closer to Segment Better", section 3): the AP of these frames is
    what a perfect refiner of that reach would get. A prediction takes its pixels from the truth of its class, no
    crowd, with the highest IoU, which has to be at least 0.5; the others stay as they are. `math.inf` replaces the
    whole mask. InputError where the sizes of image and predictions differ.
    """
    check_frame(truth, frame)
    found = best_truths(frame.instances, truth.objects)
    targets = [target if iou >= LEAST_IOU else None for target, iou in found]
    return [
        replace(
            frame,
            instances=[
                one if target is None else _corrected(one, target, distance, truth.width, truth.height)
                for one, target in zip(frame.instances, targets)
            ],
        )
        for distance in distances_px
    ]


def boundary_band(region: Located, reach_px: float, width: int, height: int) -> Region:
    """The pixels within `reach_px` (Euclidean) of one on the other side of the mask's boundary.

    Cut to the mask's box and the pixels around it; a reach of 1 is a band two pixels wide. The frame's edge is no
    boundary.
    """
    box = within_frame(box_of(region, margin=int(reach_px)), width, height)
    mask = mask_within(region, box).astype(np.uint8)
    outside = cv2.dilate(mask, disc(reach_px))
    inside = cv2.erode(mask, disc(reach_px))
    return Region(outside != inside, (box.left, box.top))


def _corrected(instance: Instance, target: TrueInstance, distance: float, width: int, height: int) -> Instance:
    if math.isinf(distance):
        return replace(instance, mask=target.mask, origin=target.origin)
    band = boundary_band(instance, distance, width, height)
    box = box_of(band)
    mask, (x, y) = cut_to_box(np.where(band.mask, mask_within(target, box), mask_within(instance, box)))
    return replace(instance, mask=mask, origin=(box.left + x, box.top + y) if mask.size else (0, 0))
