"""Object persistence: the objects of the truth that generated pictures show at their places."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..data.tiny_world.boxes import Boxes
from .object_detector import ObjectDetector, count_found
from .scenes import AUTOENCODER

SECONDS = (1, 3, 10)  # of a rollout, at which objects are looked for


@dataclass(frozen=True)
class KeptObjects:
    """The objects of the truth that a detector finds in pictures of one moment, over all starts.

    Attributes:
        recall: Share of the true objects that are found: by class and place, see `count_found`.
            None without true objects.
        kept: Recall divided by that of the autoencoder's pictures of the truth; None if nothing is
            found there.
    """

    recall: float | None
    kept: float | None


def measure_objects(
    detector: ObjectDetector, true: Sequence[Boxes], pictures: Mapping[str, Tensor]
) -> dict[str, KeptObjects]:
    """Measure every source of pictures at one moment.

    true: boxes by start. pictures: uint8 (starts, H, W, 3) by source, AUTOENCODER among them.
    """
    found = {
        source: sum(map(count_found, true, detector.detect(shown)))
        for source, shown in pictures.items()
    }
    total, reference = sum(len(boxes.classes) for boxes in true), found[AUTOENCODER]
    return {
        source: KeptObjects(
            recall=count / total if total else None,
            kept=count / reference if reference else None,
        )
        for source, count in found.items()
    }
