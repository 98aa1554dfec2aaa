import struct
from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from model import Refiner
from pipeline import stages
from pipeline.formats.cityscapes import CityscapesWriter
from pipeline.guard import GuardConfig
from pipeline.images import decode_image
from pipeline.limits import LimitsConfig
from pipeline.patches import crop, paste
from pipeline.records import Frame, FrameRef, InputError, Instance, cut_to_box
from pipeline.stages import Cutting, assemble, commit, cut, extract, refine, refine_in_pieces
from pipeline.stores import AwayError, NotGivenError
from pipeline.work import Work
from tests.conftest import golden_cases, random_patches, seeded_network

CUTTING = Cutting(nms_threshold=0.25)
GUARD, NO_GUARD = GuardConfig(), GuardConfig(enabled=False)


class _Reader:
    """Two instances in every frame, or the given exception."""

    def __init__(self, error=None):
        self.error = error

    def read(self, ref, width, height):
        if self.error:
            raise self.error
        mask = np.zeros((height, width), bool)
        mask[10:60, 20:70] = True
        return [
            Instance("0", 24, 0.5, *cut_to_box(mask), status="refined", changed_pixels=9, confidence=0.1),
            Instance("1", 25, 0.4, np.zeros((0, 0), bool)),
        ]

    def identity(self, ref, instances):
        return ref.identity


@pytest.fixture
def image(tmp_path):
    pixels = random_patches(1, 100)[0, ..., :3]
    cv2.imwrite(str(tmp_path / "x.png"), pixels[..., ::-1])
    return pixels


def test_an_image_is_decoded_to_rgb(tmp_path, image):
    assert np.array_equal(decode_image(str(tmp_path / "x.png")), image)


@pytest.mark.parametrize("known", [1, 5, 8, 32773])
def test_a_tiff_packed_in_a_way_that_opencv_does_not_know_is_no_black_image(tmp_path, known):
    image = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    written = [cv2.IMWRITE_TIFF_COMPRESSION, known]
    data = cv2.imencode(".tif", image, written)[1].tobytes()
    (tmp_path / "x.tif").write_bytes(data)
    assert np.array_equal(decode_image(str(tmp_path / "x.tif")), image[..., ::-1])
    tag = struct.pack("<HHI", 259, 3, 1)
    (tmp_path / "x.tif").write_bytes(data.replace(tag + struct.pack("<H", known), tag + struct.pack("<H", 34712)))
    with pytest.raises(InputError, match=r"x\.tif: expected an image that OpenCV can decode"):
        decode_image(str(tmp_path / "x.tif"))


def test_extraction_cuts_the_patches_of_all_instances_of_a_frame(tmp_path, image):
    work, patches = extract(FrameRef("x", "x.png"), _Reader(), str(tmp_path), CUTTING, GUARD)
    assert work.error == ""
    assert [len(boxes) for boxes in work.boxes] == [len(patches), 0]
    x1, y1, x2, y2 = work.boxes[0][0]
    assert np.array_equal(patches[0, ..., :3], image[y1:y2, x1:x2])


@pytest.mark.parametrize(
    ("ref", "reader", "message"),
    [
        (FrameRef("x", "y.png"), _Reader(), "y.png: no such file"),
        (FrameRef("x", "../x.png"), _Reader(), "expected a path that stays below"),
        (FrameRef("x", "x.png"), _Reader(ZeroDivisionError("odd")), "x.png: ZeroDivisionError: odd"),
    ],
)
def test_whatever_is_wrong_with_a_frame_becomes_its_error(tmp_path, image, ref, reader, message):
    work, patches = extract(ref, reader, str(tmp_path), CUTTING, GUARD)
    assert message in work.error
    assert work.frame is None
    assert len(patches) == 0


def test_a_store_that_gives_nothing_is_no_fault_of_the_frame_that_is_read(tmp_path, image, monkeypatch):
    with pytest.raises(AwayError, match="away"):
        extract(FrameRef("x", "x.png"), _Reader(AwayError("away")), str(tmp_path), CUTTING, GUARD)
    monkeypatch.setattr(stages, "IN_PIECES", 1)
    work, _ = extract(FrameRef("x", "x.png"), _Reader(), str(tmp_path), CUTTING, GUARD)
    monkeypatch.setattr(stages, "decode_image", Mock(side_effect=AwayError("away")))
    with pytest.raises(AwayError, match="away"):
        refine_in_pieces(work, Refiner(seeded_network(), device="cpu"), str(tmp_path), CUTTING, GUARD, LimitsConfig())


def test_frames_share_batches_and_get_their_own_probabilities_back():
    refiner = Refiner(seeded_network(), device="cpu")
    patches = random_patches(9)
    parts = [patches[:4], patches[4:4], patches[4:]]
    works = [Work("a"), Work("b"), Work("c")]
    ((refined, probabilities),) = refine([(works, parts)], refiner, padding=0)
    assert refined is works
    assert [len(part) for part in probabilities] == [4, 0, 5]
    assert np.array_equal(np.concatenate(probabilities), refiner.probabilities(patches))


def test_padding_is_cut_off_the_probabilities():
    refiner = Refiner(seeded_network(), device="cpu")
    patches = random_patches(2, 80)
    ((_, (inner,)),) = refine([([Work("a")], [patches])], refiner, padding=8)
    assert np.array_equal(inner, refiner.probabilities(patches)[:, 8:-8, 8:-8])


@pytest.mark.parametrize("most", [1, 3, 7])
def test_a_frame_with_too_many_patches_is_refined_in_pieces_to_the_same_masks(tmp_path, image, monkeypatch, most):
    class Reader(_Reader):
        def read(self, *rest):
            masks = [np.zeros((h, w), bool) for h, w in ((50, 60), (30, 30), (0, 0), (70, 20))]
            for number, mask in enumerate(masks):
                mask[2:-2, 2:-2] = True
                yield Instance(str(number), 1, 0.5, mask, (5, 5) if mask.size else (0, 0))

    refiner = Refiner(seeded_network(), device="cpu")
    guard = GuardConfig(enabled=False)
    ref = FrameRef("x", "x.png")
    whole, patches = extract(ref, Reader(), str(tmp_path), CUTTING, guard)
    ((_, (probabilities,)),) = refine([([whole], [patches])], refiner, padding=0)
    assemble(whole, probabilities, guard)
    monkeypatch.setattr(stages, "IN_PIECES", most)
    work, none = extract(ref, Reader(), str(tmp_path), CUTTING, guard)
    assert (len(none), work.in_pieces, work.patches) == (0, True, len(patches))
    refine_in_pieces(work, refiner, str(tmp_path), CUTTING, guard, LimitsConfig())
    assemble(work, none, guard)
    assert [i.status for i in work.frame.instances] == ["refined", "refined", "kept", "refined"]
    for one, other in zip(work.frame.instances, whole.frame.instances):
        assert np.array_equal(one.mask, other.mask)
        assert (one.origin, one.confidence, one.changed_pixels) == (
            other.origin,
            other.confidence,
            other.changed_pixels,
        )


def test_a_frame_in_pieces_whose_image_vanishes_is_set_aside(tmp_path, image, monkeypatch):
    monkeypatch.setattr(stages, "IN_PIECES", 1)
    work, _ = extract(FrameRef("x", "x.png"), _Reader(), str(tmp_path), CUTTING, GUARD)
    assert work.in_pieces
    (tmp_path / "x.png").unlink()
    refine_in_pieces(work, Refiner(seeded_network(), device="cpu"), str(tmp_path), CUTTING, GUARD, LimitsConfig())
    assert "x.png: no such file" in work.error
    assert work.frame is None


def test_of_a_block_that_cannot_be_written_only_the_frame_that_is_the_cause_is_set_aside():
    class Writer:
        def commit(self, frames):
            if any(frame.frame_id == "b" for frame in frames):
                raise ZeroDivisionError("odd")
            return "part"

    works = [Work(name, Frame(name, f"{name}.png", 5, 5, []), file_name=f"{name}.png") for name in "abc"]
    receipts = commit(works, Writer())
    assert [receipt.part for receipt in receipts] == ["part", "", "part"]
    assert [receipt.error for receipt in receipts] == ["", "b.png: ZeroDivisionError: odd", ""]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        AwayError("s3://b/a: cannot be read"),
        NotGivenError("s3://b/a: cannot be read"),
    ],
)
def test_a_store_that_fails_is_no_fault_of_a_frame(error):
    with pytest.raises(type(error), match=r"No space left|cannot be read"):
        commit([Work(name, Frame(name, "a.png", 5, 5, [])) for name in "ab"], Mock(commit=Mock(side_effect=error)))


def test_a_name_too_long_to_be_written_is_the_fault_of_its_frame(tmp_path):
    # With 247 characters the list's name is too long, that of the PNG is not.
    names, mask = ("a", "x" * 245, "y" * 247, "z" * 251), np.ones((5, 5), bool)
    frames = [Frame(name, f"{name}.jpg", 5, 5, [Instance("0", 24, 0.9, mask)]) for name in names]
    works = [Work(frame.frame_id, frame, file_name=frame.file_name) for frame in frames]
    receipts = commit(works, CityscapesWriter(str(tmp_path)))
    assert [receipt.error for receipt in receipts[:2]] == ["", ""]
    assert all("File name too long" in receipt.error for receipt in receipts[2:])
    left = {f"{name}{ending}" for name in names[:2] for ending in ("_000.png", "_pred.txt")}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_assembly_replaces_the_mask_and_says_what_changed(tmp_path, image):
    work, patches = extract(FrameRef("x", "x.png"), _Reader(), str(tmp_path), CUTTING, GUARD)
    (coarse, origin), empty = (work.frame.instances[0].mask, work.frame.instances[0].origin), work.frame.instances[1]
    certain = np.zeros(patches.shape[:3], np.uint16)
    certain[:] = patches[..., 3] * np.uint16(65535)
    dented = [box.tolist() for box in work.boxes[0]]
    for (x1, y1, _, _), probability in zip(dented, certain):
        probability[max(0, 10 - y1) : max(0, 14 - y1), max(0, 20 - x1) : max(0, 70 - x1)] = 0
    assemble(work, certain, GUARD)
    refined = work.frame.instances[0]
    assert refined.status == "refined"
    assert refined.changed_pixels == 4 * 50
    assert refined.bbox == [20, 14, 50, 46]
    assert refined.area == 46 * 50
    assert refined.confidence == 1.0
    assert coarse.shape == (50, 50)
    assert origin == (20, 10)
    assert refined.reason == ""
    assert (empty.status, empty.reason) == ("kept", "no_boundary")
    assert empty.bbox == [0, 0, 0, 0]


def test_a_rejected_mask_stays_as_it_was_and_its_receipt_says_why(tmp_path, image):
    work, patches = extract(FrameRef("x", "x.png"), _Reader(), str(tmp_path), CUTTING, GUARD)
    doubtful = work.frame.instances[0]
    coarse, origin = doubtful.mask.copy(), doubtful.origin
    probabilities = patches[..., 3] * np.uint16(65535)
    for (_, y1, _, _), part in zip(work.boxes[0], probabilities):
        top = max(0, 14 - y1)
        part[:top] = np.minimum(part[:top], 30000)
    assemble(work, probabilities, GUARD)
    assert (doubtful.status, doubtful.reason, doubtful.changed_pixels) == ("rejected", "uncertain", 0)
    assert np.array_equal(doubtful.mask, coarse)
    assert doubtful.origin == origin
    assert 0 < doubtful.confidence < 1

    class Writer:
        def commit(self, frames):
            return "part"

    (receipt,) = commit([work], Writer())
    assert (receipt.instances, receipt.refined, receipt.reasons) == (2, 0, {"uncertain": 1, "no_boundary": 1})


def test_small_objects_are_kept_and_cost_no_patch(image):
    mask = np.zeros((100, 100), bool)
    mask[10:40, 10:40] = True
    small = Instance("0", 1, 1.0, *cut_to_box(mask), status="refined", reason="far_pieces", changed_pixels=3)
    boxes, patches = cut(image, [small], CUTTING, GUARD)
    assert [len(found) for found in boxes] == [0]
    assert patches.shape == (0, 64, 64, 4)
    work = Work("x", Frame("x", "x.png", 100, 100, [small]), boxes)
    assemble(work, np.zeros((0, 64, 64), np.uint16), GUARD)
    assert (small.status, small.reason, small.changed_pixels, small.area) == ("kept", "too_small", 0, 900)
    assert len(cut(image, [small], CUTTING, NO_GUARD)[1]) > 0


def test_frames_set_aside_write_nothing_but_get_a_receipt():
    written = []

    class Writer:
        def commit(self, frames):
            written.extend(frame.frame_id for frame in frames)
            return "part"

    good = Work("a", Frame("a", "a.png", 5, 5, []))
    receipts = commit([good, Work("b", error="broken")], Writer())
    assert written == ["a"]
    assert [(r.frame_id, r.error, r.part) for r in receipts] == [("a", "", "part"), ("b", "broken", "")]


@pytest.mark.slow
def test_refined_masks_differ_from_the_references_only_where_its_average_is_undecided(golden):
    """Its boxes, our crops, our network, our reassembly: the whole chain."""
    refiner = Refiner.from_checkpoint(str(golden / "hrnet18s_128_seeded.pth"), device="cpu", precision="fp32")
    compared = 0
    for case, expected in golden_cases(golden):
        image = decode_image(str(golden / "inputs" / "images" / case["image"]))
        mask = cv2.imread(str(golden / "inputs" / "masks" / case["mask"]), cv2.IMREAD_GRAYSCALE)
        inside, origin = cut_to_box(mask)
        boxes = expected["boxes_t055"]
        probabilities = refiner.probabilities(crop(image, inside, origin, boxes))
        refined, (left, top), _ = paste(inside, origin, mask.shape[::-1], boxes, probabilities)
        total, count = np.zeros(mask.shape), np.zeros(mask.shape)
        for (x1, y1, x2, y2), probability in zip(boxes, expected["prob18s_t055"]):
            total[y1:y2, x1:x2] += probability
            count[y1:y2, x1:x2] += 1
        decided = np.abs(total / np.maximum(count, 1) - 0.5) >= 1e-4
        full = np.zeros(mask.shape, bool)
        full[top : top + refined.shape[0], left : left + refined.shape[1]] = refined
        assert not ((full != expected["refined18s_t055"]) & decided).any(), case["name"]
        compared += 1
    assert compared == 14


def test_parity_finds_the_references_boxes_through_the_stage(golden):
    case, expected = next(found for found in golden_cases(golden) if found[0]["name"] == "color_blob")
    image = decode_image(str(golden / "inputs" / "images" / case["image"]))
    mask = cv2.imread(str(golden / "inputs" / "masks" / case["mask"]), cv2.IMREAD_GRAYSCALE)
    (boxes,), patches = cut(image, [Instance("0", 24, 1.0, *cut_to_box(mask))], Cutting(0.55, parity=True), NO_GUARD)
    assert np.array_equal(boxes, expected["stable_boxes_t055"])
    assert patches.shape == (len(boxes), 64, 64, 4)
