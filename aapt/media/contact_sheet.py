"""An image of many videos: one row per video, one column per moment."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

SHOWN_ROWS = 160  # smaller frames are enlarged

LINE = 14  # height of a line of Pillow's default font
GAP = 4
BACKGROUND, INK = (24, 24, 28), (232, 232, 232)


def contact_sheet(
    groups: Sequence[Sequence[tuple[str, Tensor]]], columns: Sequence[str], scale: int = 2
) -> Image.Image:
    """Draw rows of frames, enlarged `scale` times, under the headings `columns`.

    groups: rows that stand close together. A row is (label, uint8 (len(columns), H, W, 3)); a label
    may have several lines. ValueError for a row with another number of frames.
    """
    rows = [row for group in groups for row in group]
    for label, frames in rows:
        if len(frames) != len(columns):
            raise ValueError(f"row {label!r}: expected {len(columns)} frames, got {len(frames)}")
    _, height, width, _ = rows[0][1].shape
    height, width = scale * height, scale * width
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = GAP + max(math.ceil(ruler.multiline_textbbox((2, 0), label)[2]) for label, _ in rows)
    size = (
        left + len(columns) * (width + 1),
        LINE + GAP + len(rows) * (height + 1) + (len(groups) - 1) * GAP,
    )
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for place, heading in enumerate(columns):
        draw.text((left + place * (width + 1) + 2, 2), heading, INK)
    top = LINE + GAP
    for group in groups:
        for label, frames in group:
            draw.multiline_text((2, top + 2), label, INK)
            for place, frame in enumerate(frames.numpy()):
                large = frame.repeat(scale, axis=0).repeat(scale, axis=1)
                image = Image.fromarray(np.ascontiguousarray(large))
                sheet.paste(image, (left + place * (width + 1), top))
            top += height + 1
        top += GAP
    return sheet
