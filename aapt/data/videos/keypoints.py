"""People as the 133 points of COCO-WholeBody, read from files of pose estimators and data sets.

The points are 17 of the body, 6 of the feet, 68 of the face, 21 of the left hand and 21 of the
right. A file has an entry per video frame, in one of three layouts, which their keys tell apart:

- MMPose (RTMW, DWPose, ...): an entry has `instances` with `keypoints` and `keypoint_scores`, or is
  a list of instances. The list of entries may be under `instance_info`.
- OpenPose, and the DWPose nodes of ComfyUI: an entry has `people` with `pose_keypoints_2d` and so
  on. The file is one entry, or a list of entries.
- COCO-WholeBody's annotations: `images` are the entries, and `annotations` of these images have
  `keypoints`, `foot_kpts` and so on.

An entry that is null has no people. A part that a person lacks counts as not seen.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from .sample import Skipped

REASON = "bad keypoints"
POINTS = 133
FACE, LEFT_HAND, RIGHT_HAND = slice(23, 91), slice(91, 112), slice(112, 133)

# COCO's body points in the order of OpenPose, whose neck is between the shoulders (5, 6).
BODY = (0, "neck", 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
BODY_OF_OPENPOSE = [BODY.index(point) for point in range(17)]
MID_HIP = 8  # a further point of BODY_25; its last six are COCO-WholeBody's feet

MAX_FRAMES = 10**7  # video frames of a video: four days at 24 fps
SHAPE_TOLERANCE = 0.05  # estimators resize images to multiples of a number of pixels


@dataclass(frozen=True)
class People:
    """The people in one video frame.

    Attributes:
        points: (people, 133, 3) of (x, y, score); a score of 0 for points that are not seen.
        canvas: (width, height) of the image in which the points were found; (1, 1) for fractions of
            its sides; None for an image of the video's own size.
    """

    points: np.ndarray
    canvas: tuple[float, float] | None = None

    def on(self, columns: int, rows: int) -> np.ndarray:
        """Convert the points to pixels of an upright video frame of this size.

        Skipped if the canvas has another aspect ratio, because the crop or the turn between the two
        is not known.
        """
        if self.canvas is None:
            return self.points
        width, height = self.canvas
        stretch = columns / width / (rows / height)
        if self.canvas != (1, 1) and max(stretch, 1 / stretch) > 1 + SHAPE_TOLERANCE:
            raise Skipped(
                REASON,
                f"expected a canvas of the shape of {columns}x{rows}, got {width:g}x{height:g}",
            )
        return self.points * np.array((columns / width, rows / height, 1), np.float32)


NOBODY = People(np.zeros((0, POINTS, 3), np.float32))


def parse_keypoints(data: Any) -> list[People]:
    """The people of each video frame, from the JSON of a file.

    Skipped for `bad keypoints`, naming the entry, if no layout fits.
    """
    if isinstance(data, dict):
        if "annotations" in data:
            return _coco_wholebody(data)
        data = [data] if "people" in data else data.get("instance_info")
    if not isinstance(data, list):
        raise Skipped(
            REASON, "expected a list of entries, 'instance_info', 'people' or 'annotations'"
        )
    if any(isinstance(entry, dict) and "people" in entry for entry in data):
        return _openpose(data)
    return _mmpose(data)


def _mmpose(entries: list) -> list[People]:
    people = []
    for index, entry in enumerate(entries):
        with _explained(f"entry {index}"):
            instances = entry if isinstance(entry, list) else (entry or {}).get("instances")
            people.append(People(_stacked(instances, _mmpose_person)))
    return _placed(people, entries)


def _mmpose_person(person: dict) -> np.ndarray:
    points = np.array(person["keypoints"], np.float32)
    scores = np.array(person["keypoint_scores"], np.float32)
    if points.shape != (POINTS, 2) or scores.shape != (POINTS,):
        raise ValueError(
            f"expected {POINTS} points (x, y) and scores, got {points.shape} and {scores.shape}"
        )
    return np.concatenate([points, scores[:, None]], axis=1)


def _openpose(entries: list) -> list[People]:
    """People in pixels, or in fractions of the canvas.

    The median of the whole file decides which, because single points may be outside the canvas.
    """
    people = []
    for index, entry in enumerate(entries):
        with _explained(f"entry {index}"):
            entry = entry or {}
            points = _stacked(entry.get("people"), _openpose_person)
            people.append(People(points, _size(entry, "canvas_width", "canvas_height")))
    seen = [p.points[p.points[..., 2] > 0][:, :2] for p in people]
    if sum(map(len, seen)) and np.median(np.concatenate(seen)) <= 1:
        people = [_in_pixels(p) for p in people]
    return _placed(people, entries)


def _in_pixels(people: People) -> People:
    """Convert fractions to pixels of the canvas; without a canvas keep them."""
    canvas = people.canvas or (1.0, 1.0)
    return People(people.points * np.array((*canvas, 1), np.float32), canvas)


def _openpose_person(person: dict) -> np.ndarray:
    """The points (133, 3) of a person.

    The body has 18 points, as in OpenPose's COCO model and DWPose, or 25; the face has 68 points,
    or 70 with the pupils.
    """
    body = _part(person, "pose_keypoints_2d", 18, 25)
    feet = _part(person, "foot_keypoints_2d", 6)
    if len(body) == 25:
        body, feet = np.delete(body[:19], MID_HIP, axis=0), body[19:]
    face = _part(person, "face_keypoints_2d", 68, 70)[:68]
    hands = [_part(person, f"hand_{side}_keypoints_2d", 21) for side in ("left", "right")]
    return np.concatenate([body[BODY_OF_OPENPOSE], feet, face, *hands])


def _coco_wholebody(data: dict) -> list[People]:
    """People of the images, in the order of `id`."""
    people, found = [], defaultdict(list)
    with _explained("annotations"):
        for annotation in data["annotations"]:
            found[annotation["image_id"]].append(annotation)
        images = sorted(data["images"], key=lambda image: image["id"])
    for image in images:
        with _explained(f"image {image['id']}"):
            points = _stacked(found[image["id"]], _coco_person)
            people.append(People(points, _size(image, "width", "height")))
    return _placed(people, images)


def _placed(people: list[People], entries: list) -> list[People]:
    """The people of each video frame: entries by their `frame_id`, and nobody in between.

    Without such numbers entry n belongs to video frame n. `frame_id` counts from 1, as in MMPose's
    demos, unless one of them is 0.
    """
    numbers = [entry.get("frame_id") if isinstance(entry, dict) else None for entry in entries]
    if all(number is None for number in numbers):
        return people
    for index, number in enumerate(numbers):
        if type(number) is not int or not 0 <= number <= MAX_FRAMES:
            expected = f"expected a frame_id from 0 to {MAX_FRAMES}"
            raise Skipped(REASON, f"entry {index}: {expected}, got {number!r}")
    if len(set(numbers)) < len(numbers):
        number = Counter(numbers).most_common(1)[0][0]
        raise Skipped(REASON, f"expected each frame_id once, got {number} again")
    first = min(1, *numbers)
    placed = [NOBODY] * (1 + max(numbers) - first)
    for number, found in zip(numbers, people):
        placed[number - first] = found
    return placed


def _coco_person(person: dict) -> np.ndarray:
    """The points (133, 3) of a person. The third value of a point is 0 if it is not labelled."""
    parts = {"keypoints": 17, "foot_kpts": 6, "face_kpts": 68}
    parts |= {"lefthand_kpts": 21, "righthand_kpts": 21}
    points = np.concatenate([_part(person, name, count) for name, count in parts.items()])
    points[:, 2] = points[:, 2] > 0
    return points


def _part(person: dict, name: str, *counts: int) -> np.ndarray:
    """A part of a person as (points, 3); ValueError unless it has one of the counts.

    A missing part has the first count, and none of its points is seen.
    """
    values = np.array(person.get(name) or [], np.float32).ravel()
    if not values.size:
        return np.zeros((counts[0], 3), np.float32)
    if values.size not in [3 * count for count in counts]:
        raise ValueError(
            f"{name}: expected (x, y, score) of {' or '.join(map(str, counts))} points, "
            f"got {values.size} numbers"
        )
    return values.reshape(-1, 3)


def _size(entry: dict, width: str, height: str) -> tuple[float, float] | None:
    if entry.get(width) is None or entry.get(height) is None:
        return None
    size = float(entry[width]), float(entry[height])
    if not all(0 < side < math.inf for side in size):
        raise ValueError(f"expected a {width} and {height} above 0, got {size[0]:g}x{size[1]:g}")
    return size


def _stacked(given: list | None, read: Callable[[dict], np.ndarray]) -> np.ndarray:
    """(people, 133, 3). Points that are not finite count as not seen."""
    people = np.stack([np.zeros((POINTS, 3), np.float32), *map(read, given or [])])[1:]
    people[~np.isfinite(people).all(axis=-1)] = 0
    return people


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn the errors that a file of another layout causes into Skipped, naming the place."""
    try:
        yield
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        what = f"expected {error}" if isinstance(error, KeyError) else error
        raise Skipped(REASON, f"{where}: {what}") from None
