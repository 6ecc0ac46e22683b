"""The object detector, and object persistence with planted boxes."""

import math

import pytest
import torch

from aapt.data.tiny_world.boxes import Boxes
from aapt.evaluate.kept_objects import measure_objects
from aapt.evaluate.object_detector import (
    FIRST_SEED,
    ObjectDetector,
    ObjectDetectorConfig,
    augment,
    count_found,
    load_detector,
    overlaps,
    targets,
    train_detector,
)
from aapt.evaluate.scenes import AUTOENCODER

from .test_evaluation import SMALL_DETECTOR
from .test_metrics import HEIGHT, WIDTH

BLOCK, ROUND = 0, 1
NONE = Boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def boxes(*entries):
    """Boxes of (class, left, top, right, bottom)."""
    if not entries:
        return NONE
    rows = torch.tensor([entry[1:] for entry in entries], dtype=torch.float32)
    return Boxes(rows, torch.tensor([entry[0] for entry in entries]))


# Matching.


def test_overlaps_by_hand():
    a = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 40]])
    b = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [0, 0, 5, 5], [20, 10, 30, 30]])
    expected = torch.tensor([[1, 1 / 3, 1 / 4, 0], [0, 0, 0, 1 / 3]])
    assert torch.allclose(overlaps(a, b), expected)


TRUE = boxes((BLOCK, 0, 0, 20, 20), (ROUND, 40, 10, 50, 40))


@pytest.mark.parametrize(
    ("found", "count"),
    [
        (TRUE, 2),
        (boxes((BLOCK, 10, 0, 30, 20), (ROUND, 40, 10, 50, 40)), 2),  # a half further: 1/3
        (boxes((BLOCK, 11, 0, 31, 20), (ROUND, 40, 10, 50, 40)), 1),  # more: 0.29
        (boxes((ROUND, 0, 0, 20, 20), (BLOCK, 40, 10, 50, 40)), 0),  # classes exchanged
        (boxes((ROUND, 40, 10, 50, 40)), 1),  # one erased
        (boxes((BLOCK, 0, 0, 20, 20), (BLOCK, 1, 0, 21, 20)), 1),  # one found twice
        (boxes(), 0),
    ],
)
def test_true_objects_are_counted(found, count):
    assert count_found(TRUE, found) == count


def test_one_found_object_stands_for_one_true_object():
    true = boxes((BLOCK, 0, 0, 20, 20), (BLOCK, 4, 0, 24, 20))
    assert count_found(true, boxes((BLOCK, 2, 0, 22, 20))) == 1
    # The best pairs first: the other order would leave the second without a partner.
    true = boxes((BLOCK, 0, 0, 20, 20), (BLOCK, 8, 0, 28, 20))
    assert count_found(true, boxes((BLOCK, 8, 0, 28, 20), (BLOCK, -9, 0, 11, 20))) == 2
    assert count_found(NONE, true) == 0


# Persistence.


class Planted:
    """Finds the boxes that belong to the value of a picture."""

    def __init__(self, *by_value):
        self.by_value = by_value

    def detect(self, pictures):
        return [self.by_value[picture.flatten()[0]] for picture in pictures]


def pictures(*values):
    return torch.stack([torch.full((8, 8, 3), value, dtype=torch.uint8) for value in values])


def test_persistence_is_a_share_of_the_autoencoder_s():
    true = [TRUE, TRUE]
    half = boxes((BLOCK, 0, 0, 20, 20))
    shown = {
        "truth": pictures(0, 0),
        AUTOENCODER: pictures(0, 1),
        "copy": pictures(1, 0),
        "worse": pictures(2, 1),
    }
    found = measure_objects(Planted(TRUE, half, NONE), true, shown)
    assert {name: each.recall for name, each in found.items()} == {
        "truth": 1.0,
        AUTOENCODER: 0.75,
        "copy": 0.75,
        "worse": 0.25,
    }
    assert found["copy"].kept == 1.0 and found["worse"].kept == 1 / 3
    assert found[AUTOENCODER].kept == 1.0 and found["truth"].kept == 4 / 3


def test_persistence_without_objects():
    shown = {AUTOENCODER: pictures(0), "model": pictures(0)}
    for true in (NONE, TRUE):  # nothing to find, and nothing found in the autoencoder's pictures
        found = measure_objects(Planted(NONE), [true], shown)["model"]
        assert (found.recall, found.kept) == ((None, None) if true is NONE else (0.0, None))


# The detector.


def test_targets_by_hand():
    """A box of 16x8 pixels at (8, 4): its middle half is cells 3 and 4 of rows 1 and 2."""
    classes, distances = targets(boxes((ROUND, 8, 4, 24, 12)), rows=4, columns=8)
    inside = torch.zeros(4, 8)
    inside[1:3, 3:5] = 1
    assert torch.equal(classes[ROUND], inside) and not classes[BLOCK].any()
    # The centre of cell (1, 3) is (14, 6): in cells of four pixels.
    expected = torch.tensor([6 / 4, 2 / 4, 10 / 4, 6 / 4]).log()
    assert torch.allclose(distances[:, 1, 3], expected)
    assert not (distances * (1 - inside)).any()
    # A smaller box comes first in the cells of both, and the smallest has a cell.
    near, far = (BLOCK, 0, 0, 32, 16), (ROUND, 14, 6, 18, 10)
    classes, _ = targets(boxes(far, near), rows=4, columns=8)
    assert classes[ROUND, 2, 4] == 1 and classes[BLOCK, 2, 4] == 0
    assert classes[BLOCK].sum() > 3


class Told(ObjectDetector):
    """A detector that says the targets of planted boxes."""

    def __init__(self, planted):
        super().__init__(8)
        self.planted = planted

    def forward(self, images):
        rows, columns = images.shape[2] // 4, images.shape[3] // 4
        said = [targets(each, rows, columns) for each in self.planted]
        classes, distances = (torch.stack(part) for part in zip(*said))
        return 20 * classes - 10, distances


def test_boxes_come_back_from_targets():
    planted = [TRUE, NONE, boxes((BLOCK, 3, 2, 33, 30), (BLOCK, 40, 4, 60, 20))]
    found = Told(planted).detect(torch.zeros(3, 40, 64, 3, dtype=torch.uint8))
    for true, each in zip(planted, found):
        order = true.corners[:, 0].argsort()
        mine = each.corners[:, 0].argsort()
        assert torch.allclose(each.corners[mine], true.corners[order], atol=1e-4)
        assert torch.equal(each.classes[mine], true.classes[order])


def test_a_mirrored_picture_has_mirrored_targets():
    random = torch.Generator().manual_seed(1)
    images = torch.rand(16, 3, 40, 64)
    one = targets(TRUE, 10, 16)
    mirrored = boxes((BLOCK, 44, 0, 64, 20), (ROUND, 14, 10, 24, 40))
    other = targets(mirrored, 10, 16)
    given = [x.expand(16, *x.shape) for x in one]
    made, classes, distances = augment(images, *given, random)
    kinds = set()
    for index in range(16):
        direct = (made[index] - images[index]).abs().mean()
        turned = (made[index] - images[index].flip(-1)).abs().mean()
        expected = one if direct < turned else other
        kinds.add(bool(direct < turned))
        assert torch.equal(classes[index], expected[0])
        assert torch.allclose(distances[index], expected[1], atol=1e-5)
    assert kinds == {True, False}


def test_a_short_training_finds_the_objects_that_it_saw(monkeypatch):
    monkeypatch.setattr("aapt.evaluate.object_detector.HELD_OUT_SEED", FIRST_SEED)
    sizes = {"worlds": 6, "held_out_worlds": 6, "pictures": 1, "batch": 6, "width": 16}
    _, quality = train_detector(ObjectDetectorConfig(steps=150, **sizes), 48, 64)
    assert quality.recall > 0.5 and quality.precision > 0.5
    _, untrained = train_detector(ObjectDetectorConfig(steps=2, **sizes), 48, 64)
    assert untrained.recall < 0.2


def test_equal_settings_give_equal_detectors():
    (one, quality), (other, same) = (train_detector(SMALL_DETECTOR, HEIGHT, WIDTH) for _ in "ab")
    assert same == quality
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_detector_is_trained_once_per_configuration(tmp_path, monkeypatch):
    detector, quality = load_detector(tmp_path, SMALL_DETECTOR, HEIGHT, WIDTH)
    assert math.isfinite(quality.recall)
    (path,) = tmp_path.glob("object-detector-*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"quality"', b'"qualitx"'))
    message = r"object detector: expected one in the cache, .*the object detector's quality \(2,\)"
    with pytest.warns(UserWarning, match=message):
        _, same = load_detector(tmp_path, SMALL_DETECTOR, HEIGHT, WIDTH)
    assert same == quality and path.read_bytes() == whole
    monkeypatch.setattr(
        "aapt.evaluate.object_detector.train_detector", lambda *_: pytest.fail("again")
    )
    again, same = load_detector(tmp_path, SMALL_DETECTOR, HEIGHT, WIDTH)
    assert same == quality
    for name, tensor in detector.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with pytest.raises(pytest.fail.Exception, match="again"):
        load_detector(tmp_path, SMALL_DETECTOR, HEIGHT, 2 * WIDTH)
