"""Which reader and writer a dump's settings ask for."""

from __future__ import annotations

from typing import Literal

from pipeline import storage
from pipeline.config import Format, RefineConfig
from pipeline.formats import Reader, Writer
from pipeline.formats.cityscapes import CityscapesReader, CityscapesWriter
from pipeline.formats.coco import CocoReader, CocoWriter
from pipeline.formats.for_cityscapes import ReaderForCityscapes
from pipeline.formats.parquet import ParquetReader, ParquetWriter
from pipeline.records import InputError


def input_format(predictions: str, form: Format | Literal["auto"]) -> Format:
    """The form of the predictions: as set, or told by the path (.json, .parquet) and by what a folder holds."""
    if form != "auto":
        return form
    path = predictions.rstrip("/")
    if not storage.exists(path):
        raise InputError(f"{path}: no such file or folder of predictions")
    if path.endswith(".json"):
        return "coco"
    if path.endswith(".parquet"):
        return "parquet"
    if storage.is_dir(path):
        if storage.find(path, ("_pred.txt",)):
            return "cityscapes"
        if any(not found.startswith("_ledger/") for found in storage.find(path, (".parquet",))):
            return "parquet"
        if storage.exists(refined := storage.join(path, CocoWriter.result)):
            raise InputError(f"{path}: COCO results are given by their file; expected {refined}")
    raise InputError(f"{path}: expected a folder with *_pred.txt files, a results .json, or .parquet; or give --format")


def check_replaced(output: str, images: str, form: Format, restart: bool) -> None:
    """Raise InputError where a refined dump in the folder `output` would replace files that no run has written there.

    These are photographs, for which masks may be taken by their names, and a final file where there is no ledger.
    """
    if form == "cityscapes" and storage.contains(output, images):
        raise InputError(f"{output}: expected an output apart from the images in {images}")
    result = writer(output, form, form).result
    begun = restart or not result or storage.exists(f"{output}/_ledger/run.json")
    if not begun and storage.exists(storage.join(output, result)):
        raise InputError(
            f"{storage.join(output, result)}: is there, and no run on this output has written it;"
            " choose another output, or --restart to replace it"
        )


def reader(
    predictions: str,
    images: str,
    form: Format,
    image_list: str | None = None,
    image_pattern: str | None = None,
    any_category: bool = False,
) -> Reader:
    """The reader for a dump; InputError where the settings do not suit the form.

    Categories that the image list does not have are an error of their frame, unless `any_category`.
    """
    if form == "coco":
        return CocoReader(predictions, images, image_list, image_pattern, any_category)
    if image_list is not None or image_pattern is not None:
        raise InputError(f"image_list and image_pattern are for COCO json; {predictions} is read as {form}")
    return CityscapesReader(predictions, images) if form == "cityscapes" else ParquetReader(predictions, images)


def of_run(config: RefineConfig) -> tuple[Format, Format, Reader]:
    """The form that a run reads, the form that it writes, and its reader; InputError as of `input_format`, `reader`."""
    form = input_format(config.predictions, config.format)
    output_form = form if config.output_format == "same" else config.output_format
    found = reader(config.predictions, config.images, form, config.image_list, config.image_pattern)
    return form, output_form, ReaderForCityscapes(found) if output_form == "cityscapes" != form else found


def writer(output: str, form: Format, read_as: Format) -> Writer:
    """The writer for a refined dump below the folder `output`, of one that was read in the form `read_as`."""
    if form == "cityscapes":
        return CityscapesWriter(output, keeps_names=read_as == "cityscapes")
    return CocoWriter(output) if form == "coco" else ParquetWriter(output)
