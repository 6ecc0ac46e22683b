"""Whole-body keypoints from files of several tools, against points named by hand."""

import numpy as np
import pytest

from aapt.data.videos.keypoints import People, parse_keypoints
from aapt.data.videos.sample import Skipped


def person(points, score=0.9):
    """A person (133, 3) with only these points: {index: (x, y)}."""
    whole = np.zeros((133, 3), np.float32)
    for index, point in points.items():
        whole[index] = (*point, score)
    return whole


def entry(*people):
    return {
        "instances": [
            {"keypoints": p[:, :2].tolist(), "keypoint_scores": p[:, 2].tolist()} for p in people
        ]
    }


# Where each part of a body is among the 133 points, as COCO-WholeBody names them.
COCO = [
    *("nose", "left eye", "right eye", "left ear", "right ear", "left shoulder"),
    *("right shoulder", "left elbow", "right elbow", "left wrist", "right wrist", "left hip"),
    *("right hip", "left knee", "right knee", "left ankle", "right ankle"),
    *("left big toe", "left small toe", "left heel"),
    *("right big toe", "right small toe", "right heel"),
]
# As OpenPose's documentation lists them.
BODY_18 = [
    *("nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder"),
    *("left elbow", "left wrist", "right hip", "right knee", "right ankle", "left hip"),
    *("left knee", "left ankle", "right eye", "left eye", "right ear", "left ear"),
]
BODY_25 = [
    *("nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder"),
    *("left elbow", "left wrist", "mid hip", "right hip", "right knee", "right ankle"),
    *("left hip", "left knee", "left ankle", "right eye", "left eye", "right ear", "left ear"),
    *("left big toe", "left small toe", "left heel"),
    *("right big toe", "right small toe", "right heel"),
]
PLACES = {name: (10.0 + n, 500.0 - 2 * n) for n, name in enumerate([*COCO, "neck", "mid hip"])}


def flat(names, score=0.75):
    return [value for name in names for value in (*PLACES[name], score)]


def counted(count, first, score=0.5):
    """A part whose point n is at (first + n, n + 1)."""
    return [value for n in range(count) for value in (first + n, n + 1, score)]


def openpose_person(body=BODY_18, face=68, **parts):
    return {
        "pose_keypoints_2d": flat(body),
        "face_keypoints_2d": counted(face, 100),
        "hand_left_keypoints_2d": counted(21, 200),
        "hand_right_keypoints_2d": counted(21, 300),
    } | parts


def check_whole(points, feet=True):
    """Check the points of `openpose_person`."""
    assert points.shape == (133, 3) and points.dtype == np.float32
    for n, name in enumerate(COCO):
        expected = (*PLACES[name], 0.75) if n < 17 or feet else (0, 0, 0)
        assert tuple(points[n]) == expected, name
    for place, count, first in ((23, 68, 100), (91, 21, 200), (112, 21, 300)):
        part = points[place : place + count]
        assert part[:, 0].tolist() == list(range(first, first + count))
        assert part[:, 1].tolist() == list(range(1, count + 1)) and set(part[:, 2]) == {0.5}


def test_layouts_of_mmpose():
    one, two = person({0: (1, 2)}), person({5: (3, 4)})
    pictures = [entry(one, two), entry(), None, entry(two)]
    bare = [entry(one, two)["instances"], [], None, entry(two)["instances"]]
    for layout in (pictures, bare, {"meta_info": {}, "instance_info": pictures}):
        read = parse_keypoints(layout)
        assert [len(people.points) for people in read] == [2, 0, 0, 1]
        np.testing.assert_array_equal(read[0].on(7, 9), np.stack([one, two]))


def test_points_that_are_not_finite_are_not_seen():
    broken = entry(person({0: (1, 2), 1: (3, 4)}))
    broken["instances"][0]["keypoints"][0][0] = float("nan")
    broken["instances"][0]["keypoints"][1][0] = None
    (people,) = parse_keypoints([broken])
    assert not people.points.any()


def test_dwpose():
    """ComfyUI's nodes save a body of 18 points, and null for a part that was not found."""
    frame = {"people": [openpose_person()], "canvas_width": 640, "canvas_height": 480}
    alone = openpose_person(hand_left_keypoints_2d=None, face_keypoints_2d=[])
    del alone["hand_right_keypoints_2d"]
    frames = [frame, frame | {"people": []}, None, frame | {"people": [alone]}]
    read = parse_keypoints(frames)
    assert [people.points.shape for people in read] == [(n, 133, 3) for n in (1, 0, 0, 1)]
    check_whole(read[0].on(640, 480)[0], feet=False)
    assert not read[3].points[0, 17:].any() and read[3].points[0, :17, 2].all()
    np.testing.assert_allclose(read[0].on(320, 240)[0, :, :2], read[0].points[0, :, :2] / 2)


def test_openpose():
    """OpenPose's --write_json saves one entry: BODY_25, with the toes and heels of COCO-WholeBody,
    and a face with pupils, which COCO-WholeBody lacks."""
    frame = {"version": 1.3, "people": [openpose_person(BODY_25, face=70)]}
    for layout in (frame, [frame]):
        (people,) = parse_keypoints(layout)
        assert people.canvas is None
        check_whole(people.on(1, 1)[0])


def test_feet_apart_from_the_body():
    (people,) = parse_keypoints(
        {"people": [openpose_person(foot_keypoints_2d=flat(COCO[17:]))], "canvas_width": None}
    )
    check_whole(people.points[0])


def test_unseen_points_of_openpose_have_no_score():
    body = flat(BODY_18)
    body[3 * BODY_18.index("left wrist") + 2] = body[-1] = 0
    (people,) = parse_keypoints({"people": [{"pose_keypoints_2d": body}]})
    unseen = [COCO[n] for n in range(17) if not people.points[0, n, 2]]
    assert unseen == ["left ear", "left wrist"]


@pytest.mark.parametrize("canvas", [{}, {"canvas_width": 640, "canvas_height": 480}])
def test_fractions_of_the_canvas(canvas):
    """Some tools divide by the size. A hand may be outside, and a canvas may be small."""
    person = openpose_person(BODY_25)
    for part in person.values():
        part[0::3] = [x / 640 for x in part[0::3]]
        part[1::3] = [y / 480 for y in part[1::3]]
    read = parse_keypoints([{"people": [], **canvas}, {"people": [person], **canvas}])
    assert PLACES["nose"][1] > 480 and person["pose_keypoints_2d"][1] > 1
    points = read[1].on(640, 480)[0]
    np.testing.assert_allclose(points[0, :2], PLACES["nose"], rtol=1e-6)
    np.testing.assert_allclose(points[112, :2], (300, 1), rtol=1e-6)
    small = {"people": [{"pose_keypoints_2d": [value / 60 for value in flat(BODY_18)]}]}
    (people,) = parse_keypoints(small)
    np.testing.assert_allclose(people.on(9, 9)[0, 0, :2], np.divide(PLACES["nose"], 60))


def coco(images, annotations):
    return {"info": {}, "images": images, "annotations": annotations, "categories": []}


def test_coco_wholebody():
    """Annotations of several images in no order; the third value is visibility."""
    whole = {
        "image_id": 12,
        "bbox": [0, 0, 5, 5],
        "keypoints": flat(COCO[:17], score=2),
        "foot_kpts": flat(COCO[17:], score=1),
        "face_kpts": counted(68, 100, score=0.4),
        "lefthand_kpts": counted(21, 200, score=1),
        "righthand_kpts": counted(21, 300, score=1),
        "lefthand_valid": True,
    }
    body = {"image_id": 10, "keypoints": [0.0] * 48 + [3.0, 4.0, 1]}
    images = [{"id": n, "width": 640, "height": 480, "file_name": f"{n}.jpg"} for n in (12, 10, 11)]
    first, none, last = parse_keypoints(coco(images, [whole, body, whole]))
    assert first.points.shape == (1, 133, 3) and none.points.shape == (0, 133, 3)
    assert first.points[0, 16].tolist() == [3, 4, 1] and first.points[0, :, 2].sum() == 1
    assert last.points.shape == (2, 133, 3) and (last.points[..., 2] == 1).all()
    points = last.on(1280, 960)[1]
    for n, name in enumerate(COCO):
        assert tuple(points[n, :2]) == tuple(np.multiply(PLACES[name], 2)), name
    assert points[[23, 91, 112], 0].tolist() == [200, 400, 600]


def test_a_canvas_has_the_shape_of_the_video():
    people = People(np.ones((1, 133, 3), np.float32), (832.0, 480.0))
    np.testing.assert_allclose(people.on(1280, 720)[0, 0], (1280 / 832, 1.5, 1))
    for size in ((480, 832), (832, 832), (768, 480)):
        with pytest.raises(Skipped) as skipped:
            people.on(*size)
        assert str(skipped.value) == (
            f"bad keypoints: expected a canvas of the shape of {size[0]}x{size[1]}, got 832x480"
        )


def numbered(numbers, **fields):
    """An entry per number with one person, whose nose is at (number, 1)."""
    return [{"frame_id": n, **entry(person({0: (n, 1)})), **fields} for n in numbers]


@pytest.mark.parametrize(
    "numbers, expected",
    [
        ([1, 2, 5], {0: 1, 1: 2, 4: 5}),  # MMPose's demos count from 1
        ([0, 1, 4], {0: 0, 1: 1, 4: 4}),  # its inferencer from 0
        ([3, 2], {1: 2, 2: 3}),
        ([1], {0: 1}),
    ],
)
def test_entries_with_a_frame_id_belong_to_that_video_frame(numbers, expected):
    for layout in (numbered(numbers), {"instance_info": numbered(numbers)}):
        read = parse_keypoints(layout)
        found = {n: p.points[0, 0, 0] for n, p in enumerate(read) if len(p.points)}
        assert found == expected and len(read) == max(expected) + 1


def test_frame_ids_of_the_other_layouts():
    people = [{"frame_id": n, "people": [openpose_person()]} for n in (1, 3)]
    assert [len(found.points) for found in parse_keypoints(people)] == [1, 0, 1]
    images = [{"id": 7, "frame_id": 1}, {"id": 8, "frame_id": 4}]
    body = {"image_id": 8, "keypoints": [0.0] * 48 + [3.0, 4.0, 1]}
    assert [len(found.points) for found in parse_keypoints(coco(images, [body]))] == [0, 0, 0, 1]


NO_LAYOUT = "expected a list of entries, 'instance_info', 'people' or 'annotations'"
IMAGE = {"id": 7}
BAD = [
    (3, NO_LAYOUT),
    ({}, NO_LAYOUT),
    ({"instance_info": {}}, NO_LAYOUT),
    ([[1]], "entry 0: "),
    ([1], "entry 0: "),
    ([None, {"instances": [{}]}], "entry 1: expected 'keypoints'"),
    (
        [{"instances": [{"keypoints": [[1, 2]], "keypoint_scores": [1]}]}],
        "entry 0: expected 133 points (x, y) and scores, got (1, 2) and (1,)",
    ),
    ([{"instances": [{"keypoints": [["a", 2]], "keypoint_scores": [1]}]}], "entry 0: could"),
    ({"people": [3]}, "entry 0: "),
    (
        [None, {"people": [{"pose_keypoints_2d": [1.0] * 51}]}],
        "entry 1: pose_keypoints_2d: expected (x, y, score) of 18 or 25 points, got 51 numbers",
    ),
    (
        {"people": [], "canvas_width": 0, "canvas_height": 3},
        "entry 0: expected a canvas_width and canvas_height above 0, got 0x3",
    ),
    (
        {"people": [], "canvas_width": 5, "canvas_height": float("nan")},
        "entry 0: expected a canvas_width and canvas_height above 0, got 5xnan",
    ),
    ({"people": [{"face_keypoints_2d": [10**400]}]}, "entry 0: "),
    ({"annotations": []}, "annotations: expected 'images'"),
    ({"annotations": [{}], "images": []}, "annotations: expected 'image_id'"),
    ({"annotations": None, "images": []}, "annotations: "),
    (coco([{"id": 1}, {"id": "a"}], []), "annotations: "),
    (numbered([1, 2, 1]), "expected each frame_id once, got 1 again"),
    (numbered([1, -1]), "entry 1: expected a frame_id from 0 to 10000000, got -1"),
    (numbered([1]) + [entry()], "entry 1: expected a frame_id from 0 to 10000000, got None"),
    ([None, *numbered([2])], "entry 0: expected a frame_id from 0 to 10000000, got None"),
    ([{"frame_id": "2", "instances": []}], "entry 0: expected a frame_id from 0 to"),
    ([{"frame_id": 10**9, "instances": []}], "entry 0: expected a frame_id from 0 to"),
    (
        coco([IMAGE], [{"image_id": 7, "face_kpts": [0, 0]}]),
        "image 7: face_kpts: expected (x, y, score) of 68 points, got 2 numbers",
    ),
]


@pytest.mark.parametrize("data, expected", BAD)
def test_a_bad_file_says_which_entry(data, expected):
    with pytest.raises(Skipped) as skipped:
        parse_keypoints(data)
    assert skipped.value.reason == "bad keypoints" and skipped.value.detail.startswith(expected)
