import struct

import cv2
import numpy as np
import pytest

from pipeline.limits import LimitsConfig, check_image
from pipeline.records import FrameRef, InputError, Instance
from pipeline.stages import Cutting, extract
from tests.poison import PoisonedReader


def _png_header(width, height):
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + struct.pack(">II", width, height)
        + b"\x08\x02"
        + bytes(7)
    )


def test_an_image_that_promises_more_pixels_than_fit_is_refused_by_its_header():
    with pytest.raises(InputError, match=r"bomb\.png: image of 60000 x 60000 pixels, expected one that fits"):
        check_image("bomb.png", _png_header(60000, 60000), 4 << 30)
    check_image("large.png", _png_header(20000, 20000), 4 << 30)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tiff", ".bmp"])
def test_images_of_every_kind_tell_their_size(ending):
    data = cv2.imencode(ending, np.zeros((100, 200, 3), np.uint8))[1].tobytes()
    check_image("x", data, 60000)
    with pytest.raises(InputError, match="200 x 100"):
        check_image("x", data, 59999)


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"rubbish" * 99])
def test_a_file_without_a_size_is_left_to_the_decoder(data):
    check_image("x", data, 1)


def test_a_frame_whose_masks_do_not_fit_is_set_aside_without_reading_the_rest(tmp_path):
    cv2.imwrite(str(tmp_path / "x.png"), np.zeros((50, 50, 3), np.uint8))

    class Reader(PoisonedReader):
        def read(self, ref, width, height):
            for number in range(1000):
                assert number < 5
                # As large as it says, but a single pixel in memory.
                yield Instance(str(number), 0, 1.0, np.broadcast_to(np.ones((1, 1), bool), (10_000, 1000)))

    limits = LimitsConfig(memory_gb=10_000_000 * (16 + 3.5) / (1 << 30))
    work, patches = extract(
        FrameRef("x", "x.png"), Reader("", ""), str(tmp_path), Cutting(0.3), limits=limits, guard=None
    )
    assert "x.png: image and the first 4 masks need" in work.error
    assert work.frame is None
    assert len(patches) == 0


@pytest.mark.parametrize(
    "setting",
    [
        {"seconds": 0},
        {"seconds": float("inf")},
        {"memory_gb": 0.09},
        {"memory_gb": float("nan")},
        {"memory_gb": float("inf")},
    ],
)
def test_a_limit_that_is_none_is_refused(setting):
    with pytest.raises(InputError, match=f"limits.{next(iter(setting))} is"):
        LimitsConfig(**setting)
