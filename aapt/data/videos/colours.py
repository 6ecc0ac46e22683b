"""Colours of decoded frames: brought to BT.709, or refused if that needs a tone curve.

A frame has four tags of its colours. FFmpeg's scaler carries out the matrix and the range; the
primaries are converted here; a transfer curve of high dynamic range is refused.
"""

from functools import cache

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc

from .sample import Skipped

UNTAGGED = 2
HD = (1280, 720)  # columns or rows from which players take untagged video for BT.709

# Curves of standard range. Players show all of them alike, and so does this reader.
STANDARD_CURVES = {
    *(ColorTrc.BT709, ColorTrc.UNSPECIFIED, ColorTrc.GAMMA22, ColorTrc.GAMMA28),
    *(ColorTrc.SMPTE170M, ColorTrc.SMPTE240M, ColorTrc.IEC61966_2_4, ColorTrc.BT1361_ECG),
    *(ColorTrc.IEC61966_2_1, ColorTrc.BT2020_10, ColorTrc.BT2020_12),
}
# Matrices of FFmpeg's scaler. RGB (0) has none.
MATRICES = {0, UNTAGGED, 3, *(int(space) for space in Colorspace), 6}
# (x, y) of red, green and blue (ITU-T H.273, table 2), for primaries whose white is D65.
PRIMARIES = {
    ColorPrimaries.BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    ColorPrimaries.BT470BG: ((0.640, 0.330), (0.290, 0.600), (0.150, 0.060)),
    ColorPrimaries.SMPTE170M: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    ColorPrimaries.SMPTE240M: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    ColorPrimaries.BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    ColorPrimaries.SMPTE432: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    ColorPrimaries.EBU3213: ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077)),
}
D65 = (0.3127, 0.3290)
GAMMA = 2.4  # of a display (ITU-R BT.1886)
LIGHT = (np.arange(256, dtype=np.float32) / 255) ** GAMMA


def check_colours(frame: av.VideoFrame) -> None:
    """Raise Skipped for `hdr` if the frame's colours are not of standard range, or not known."""
    given = []
    if frame.color_trc not in STANDARD_CURVES:
        given.append(f"transfer {_name(ColorTrc, frame.color_trc)}")
    if frame.color_primaries not in {UNTAGGED, *PRIMARIES}:
        given.append(f"primaries {_name(ColorPrimaries, frame.color_primaries)}")
    if frame.colorspace not in MATRICES:
        given.append(f"matrix {int(frame.colorspace)}")
    if given:
        raise Skipped(
            "hdr",
            f"expected colours of standard range, got {', '.join(given)}; convert the video to "
            "BT.709",
        )


def _name(tags, tag: int) -> str:
    return tags(tag).name if tag in set(tags) else str(int(tag))


def matrix_of(frame: av.VideoFrame) -> Colorspace | None:
    """Matrix to read the frame with; None for the one in its tag, or FFmpeg's choice of BT.601."""
    large = frame.width >= HD[0] or frame.height >= HD[1]
    if large and not frame.format.is_rgb and frame.colorspace in (0, UNTAGGED, 3):
        return Colorspace.ITU709
    return None


def with_primaries_of_bt709(rgb: np.ndarray, primaries: int) -> np.ndarray:
    """Convert uint8 (rows, columns, 3) of other primaries; colours outside BT.709 are clipped."""
    if primaries in (UNTAGGED, ColorPrimaries.BT709):
        return rgb
    light = np.clip(LIGHT[rgb] @ _to_bt709(primaries).T, 0, 1)
    return (255 * light ** (1 / GAMMA) + 0.5).astype(np.uint8)


@cache
def _to_bt709(primaries: int) -> np.ndarray:
    """(3, 3), from linear light of `primaries` to linear light of BT.709."""
    matrix = np.linalg.inv(_to_xyz(ColorPrimaries.BT709)) @ _to_xyz(primaries)
    return matrix.astype(np.float32)


def _to_xyz(primaries: int) -> np.ndarray:
    """(3, 3), from linear light to CIE XYZ: columns of the primaries that sum to white."""
    columns = np.array([_xyz(point) for point in PRIMARIES[primaries]]).T
    return columns * np.linalg.solve(columns, _xyz(D65))


def _xyz(point: tuple[float, float]) -> tuple[float, float, float]:
    x, y = point
    return x / y, 1.0, (1 - x - y) / y
