"""3D rotary positions (docs/method.md#4): angles in float64, stretched in space, unbounded in
time."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import ModelConfig


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines (tokens, head_dim / 2) of queries and keys.

    The `sink` pair rotates queries for the clamped distance of the first frame (docs/method.md#12);
    it is None if the distance is absolute.
    """

    cos: Tensor
    sin: Tensor
    cos_sink: Tensor | None = None
    sin_sink: Tensor | None = None


class RotaryPositions(nn.Module):
    """Angles of every token of a frame grid, for any frame index.

    Row i of a grid of h rows sits at i * h0 / h of the reference grid, columns likewise, so that
    a trained grid maps onto a new one. Time is the frame index itself.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.axes = dict(zip(("time", "rows", "columns"), config.rope_axes, strict=True))
        for name in self.axes:
            self.register_buffer(f"{name}_frequency", self._frequencies(name), persistent=False)

    def _frequencies(self, name: str) -> Tensor:
        exponent = torch.arange(0, self.axes[name], 2, dtype=torch.float64) / self.axes[name]
        return self.config.rope_theta**-exponent

    def _apply(self, fn, recurse=True):
        # Frequencies stay float64 in a model of any dtype, because an angle at frame 5000 would
        # lose three digits in float32. They follow the device alone, and get values on leaving
        # `meta`.
        device = fn(torch.empty(0, device=self.time_frequency.device)).device
        for name in self.axes:
            self._buffers[f"{name}_frequency"] = self._frequencies(name).to(device)
        return self

    def forward(
        self,
        frames: Tensor,
        grid: tuple[int, int],
        places: tuple[Tensor, Tensor] | None = None,
    ) -> Rotation:
        """Returns the rotation of frames with indices `frames` (T,), any integer type, on a `grid`
        of (rows, columns) tokens. places: `places(grid)`, computed here unless given."""
        places = places or self.places(grid)
        cos, sin = self._table(frames, places)
        if self.config.sink_distance == "absolute":
            return Rotation(cos, sin)
        distances = frames.clamp(max=self.config.window(grid) + 1)
        return Rotation(cos, sin, *self._table(distances, places))

    def places(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines of the rows and columns, (tokens, pairs): they are those of
        every frame."""
        device = self.time_frequency.device
        rows, columns = (
            torch.arange(size, dtype=torch.float64, device=device) * (reference / size)
            for size, reference in zip(grid, self.config.reference_grid, strict=True)
        )
        shape = (len(rows), len(columns), -1)
        angles = torch.cat(
            [
                (rows[:, None] * self.rows_frequency)[:, None].expand(shape),
                (columns[:, None] * self.columns_frequency)[None].expand(shape),
            ],
            dim=-1,
        ).flatten(0, 1)
        return angles.cos().float(), angles.sin().float()

    def _table(self, frames: Tensor, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        time = frames.to(self.time_frequency.device, torch.float64)
        angles = (time[:, None] * self.time_frequency)[:, None]
        tables = []
        for moment, place in zip((angles.cos(), angles.sin()), places, strict=True):
            shape = (len(time), len(place), -1)
            parts = [moment.float().expand(shape), place[None].expand(shape)]
            tables.append(torch.cat(parts, dim=-1).flatten(0, 1))
        return tables[0], tables[1]
