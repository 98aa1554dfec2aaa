"""From torchvision's Mask R-CNN to a dump: `python examples/from_torchvision.py IMAGES frames.parquet`.

It needs `pip install torchvision`. Then `python jobs/refine.py --predictions frames.parquet --images IMAGES
--output refined`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pipeline.images import decode_image
from pipeline.predictions import frame_of_masks, write_frames
from pipeline.records import Frame

Model = Callable[[list[torch.Tensor]], list[dict[str, torch.Tensor]]]


def predicted(model: Model, images: Path, least_score: float = 0.5) -> Iterator[Frame]:
    """The instances of each image below a folder, whose score is at least `least_score`."""
    for path in sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")):
        image = torch.from_numpy(decode_image(str(path))).permute(2, 0, 1) / 255
        with torch.inference_mode():
            output = model([image])[0]
        sure = output["scores"] >= least_score
        masks = output["masks"][sure, 0] > 0.5
        yield frame_of_masks(
            path.relative_to(images).as_posix(),
            masks.cpu().numpy(),
            output["labels"][sure].tolist(),
            output["scores"][sure].tolist(),
        )


def main(images: str, output: str) -> None:
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights, maskrcnn_resnet50_fpn_v2

    model = maskrcnn_resnet50_fpn_v2(weights=MaskRCNN_ResNet50_FPN_V2_Weights.DEFAULT).eval()
    print(f"wrote {write_frames(output, predicted(model, Path(images)))} frames to {output}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/from_torchvision.py IMAGES OUTPUT.parquet")
    main(sys.argv[1], sys.argv[2])
