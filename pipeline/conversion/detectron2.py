"""What Detectron2's COCOEvaluator writes: `coco_instances_results.json` and `instances_predictions.pth`."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.conversion import tensors
from pipeline.conversion.entries import Entry, results
from pipeline.conversion.image_list import ImageList
from pipeline.records import InputError


def entries(url: str, listed: ImageList) -> Iterator[tuple[str, Entry]]:
    """The instances of either file; ids of images are the data set's own in both.

    The json has the data set's category ids too, and is passed on. The other has labels from 0 in the order of these
    ids, and is read whole, as torch does; where it holds Detectron2's own objects (`proposals`), it is refused.
    """
    if not url.endswith(tensors.ENDINGS):
        yield from results(url)
        return
    predictions = tensors.load(url)
    if not isinstance(predictions, list):
        raise InputError(f"{url}: expected a list with a dict for each image, as in instances_predictions.pth")
    for number, image in enumerate(predictions):
        instances = image.get("instances") if isinstance(image, dict) else None
        if not isinstance(instances, list):
            raise InputError(f"{url}: image {number}: expected a dict with a list of instances")
        for place, instance in ((f"{url}: image {number}, instance {i}", one) for i, one in enumerate(instances)):
            if not isinstance(instance, dict):
                raise InputError(f"{place}: expected a dict as in COCO results")
            yield place, instance | {"category_id": listed.category(place, instance.get("category_id"), ordered=True)}
