"""Configurations of models: frozen dataclasses with everything that builds a network."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """A causal video transformer (docs/method.md#2 to 4).

    Sizes are in tokens, latent pixels or latent frames. `window_frames` is N of docs/method.md#3;
    `grid_windows` replaces it for the token grids it lists.
    """

    width: int
    heads: int
    head_dim: int
    depth: int
    text_width: int
    text_tokens: int
    window_frames: int
    reference_grid: tuple[int, int]  # token grid (rows, columns) onto which positions stretch
    rope_axes: tuple[int, int, int]  # rotated channels of a head: time, rows, columns
    grid_windows: tuple[tuple[int, int, int], ...] = ()  # (rows, columns, N)
    rope_theta: float = 10_000.0
    latent_channels: int = 16
    condition_channels: int = 0
    patch: int = 2  # latent pixels along each side of a token
    mlp_ratio: int = 4
    sink_distance: Literal["absolute", "clamped"] = "absolute"
    recycle: bool = True  # False: the ablation without recycled frames (docs/method.md#12)
    residual_head: bool = False  # v = x_t - x_prev - net instead of v = net
    output_clamp: float | None = None  # c: the one-step output is c tanh(x / c)
    text_encoder: str = "bytes"  # a name in `text_encoders.TEXT_ENCODERS`

    def __post_init__(self):
        for name in ("width", "heads", "head_dim", "depth", "text_width", "text_tokens", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.window_frames < 0:
            raise ValueError(f"window_frames: expected 0 or more, got {self.window_frames}")
        if not _are_grid_windows(self.grid_windows):
            raise ValueError(
                "grid_windows: expected a tuple of (rows, columns, window_frames), each grid once, "
                f"got {self.grid_windows!r}"
            )
        if self.sink_distance not in ("absolute", "clamped"):
            raise ValueError(
                f"sink_distance: expected 'absolute' or 'clamped', got {self.sink_distance!r}"
            )
        if self.residual_head and not self.recycle:
            raise ValueError("residual_head: expected False without recycled frames, got True")
        if self.heads * self.head_dim != self.width:
            raise ValueError(
                f"width: expected heads * head_dim = {self.heads * self.head_dim}, got {self.width}"
            )
        axes = self.rope_axes
        if len(axes) != 3 or sum(axes) != self.head_dim or any(axis % 2 for axis in axes):
            raise ValueError(
                f"rope_axes: expected three even numbers that sum to {self.head_dim}, "
                f"got {self.rope_axes}"
            )

    @property
    def input_channels(self) -> int:
        """Noise, recycled frame and conditions, concatenated on channels."""
        return 2 * self.latent_channels + self.condition_channels

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a latent frame of `height` x `width` latent pixels.
        ValueError if the patch does not divide them."""
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"latent size: expected multiples of {self.patch}, got {height} x {width}"
            )
        return height // self.patch, width // self.patch

    def window(self, grid: tuple[int, int]) -> int:
        """Returns N of docs/method.md#3 for frames of `grid` = (rows, columns) of tokens."""
        for rows, columns, frames in self.grid_windows:
            if (rows, columns) == grid:
                return frames
        return self.window_frames


def _are_grid_windows(windows: object) -> bool:
    """Checks that all are (rows, columns, N), and each grid appears once."""
    if not isinstance(windows, tuple):
        return False
    for entry in windows:
        if not isinstance(entry, tuple) or [*map(type, entry)] != [int] * 3:
            return False
        rows, columns, frames = entry
        if rows < 1 or columns < 1 or frames < 0:
            return False
    return len({entry[:2] for entry in windows}) == len(windows)


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling of a diffusion model: `steps` Euler steps along v per frame, each with guidance.

    Attributes:
        steps, shift: The times are t_k = shift(k / steps), shifted as in training
            (docs/method.md#7).
        guidance: w of v = v_empty + w (v_prompt - v_empty); 1 for none, 10 in the paper
            (docs/method.md#12).
    """

    steps: int
    shift: float
    guidance: float

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps: expected 1 or more, got {self.steps}")
        if not self.shift > 0:
            raise ValueError(f"shift: expected more than 0, got {self.shift}")
        if not self.guidance >= 0:
            raise ValueError(f"guidance: expected 0 or more, got {self.guidance}")

    @property
    def branches(self) -> int:
        """Passes per step: 1, or 2 with guidance (one with the prompt, one with an empty
        prompt)."""
        return 1 if self.guidance == 1 else 2

    @property
    def passes(self) -> int:
        """Forward passes (NFE) per latent frame."""
        return self.steps * self.branches


@dataclass(frozen=True)
class CameraConfig:
    """Motion of the camera per control, and the scale of its rays (docs/method.md#10).

    `yaw_step` (radians) and `forward_step` (world units) are the motion of one *video frame* at
    full deflection. The ray channels are divided by the two deviations, which brings them to about
    unit deviation. `frames` is the time factor of the autoencoder.
    """

    field_of_view: float  # horizontal, radians
    yaw_step: float
    forward_step: float
    origin_deviation: float
    direction_deviation: float
    frames: int = 4  # video frames per latent frame

    @property
    def channels(self) -> int:
        return 6 * self.frames
