"""Configurations of models: frozen dataclasses with everything that builds a network."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    """A causal video transformer (docs/method.md#2 to 4, #15).

    Sizes are in tokens, latent pixels or latent frames. `window_frames` is N of docs/method.md#3;
    `grid_windows` replaces it for grids with as many tokens as a grid it lists.

    `block` names the family: "mmdit" joins text and frames in one attention; "wan" gives text a
    cross-attention of its own. A step makes `chunk` frames, the first step `first_chunk`, all of
    which see each other. Frames 0 to `sink_frames` - 1 stay visible for good.
    """

    width: int
    heads: int
    head_dim: int
    depth: int
    text_width: int
    text_tokens: int
    window_frames: int
    reference_grid: tuple[int, int] | None  # (rows, columns) onto which positions stretch, or none
    rope_axes: tuple[int, int, int]  # rotated channels of a head: time, rows, columns
    grid_windows: tuple[tuple[int, int, int], ...] = ()  # (rows, columns, N)
    rope_theta: float = 10_000.0
    latent_channels: int = 16
    condition_channels: int = 0
    patch: int | tuple[int, int] = 2  # latent pixels of a token: (rows, columns), or both
    mlp_ratio: int = 4
    mlp_width: int | None = None  # hidden width of the MLP; mlp_ratio * width unless given
    sink_distance: Literal["absolute", "clamped"] = "absolute"
    recycle: bool = True  # False: "mmdit" recycles frame 0 alone (docs/method.md#12), "wan" none
    residual_head: bool = False  # v = x_t - x_prev - net instead of v = net
    residual_map: bool = False  # a residual head with net + map(token of x_prev) for net
    output_clamp: float | None = None  # c: the one-step output is c tanh(x / c)
    block: Literal["mmdit", "wan"] = "mmdit"
    chunk: int = 1  # frames of a step
    first_chunk: int | None = None  # frames of the first step; `chunk` unless given
    sink_frames: int = 1
    text_encoder: str = "bytes"  # a name in `text_encoders.TEXT_ENCODERS`

    def __post_init__(self):
        sizes = ("width", "heads", "head_dim", "depth", "text_width", "text_tokens")
        for name in (*sizes, "chunk", "first_chunk", "mlp_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if len(self.patch_shape) != 2 or min(self.patch_shape) < 1:
            raise ValueError(
                f"patch: expected 1 or more, or two such, (rows, columns), got {self.patch}"
            )
        for name in ("window_frames", "sink_frames"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.block not in ("mmdit", "wan"):
            raise ValueError(f"block: expected 'mmdit' or 'wan', got {self.block!r}")
        if self.recycled_channels and (self.chunk, self.opening_frames) != (1, 1):
            raise ValueError(
                "chunk: expected 1 in a model with recycled channels, where each frame needs the "
                f"one before, got {self.chunk} after {self.opening_frames}"
            )
        if not _are_grid_windows(self.grid_windows):
            raise ValueError(
                "grid_windows: expected a tuple of (rows, columns, window_frames), each number of "
                f"tokens once, got {self.grid_windows!r}"
            )
        shortest = min(self.window_frames, *(frames for _, _, frames in self.grid_windows), 1 << 62)
        if max(self.chunk, self.opening_frames) > shortest + 1:
            raise ValueError(
                f"chunk: expected at most window_frames + 1 = {shortest + 1}, got {self.chunk} "
                f"after {self.opening_frames}"
            )
        if self.sink_distance not in ("absolute", "clamped"):
            raise ValueError(
                f"sink_distance: expected 'absolute' or 'clamped', got {self.sink_distance!r}"
            )
        if self.residual_head and not self.recycle:
            raise ValueError("residual_head: expected False without recycled frames, got True")
        if self.residual_map and not self.residual_head:
            raise ValueError("residual_map: expected False without a residual head, got True")
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
    def patch_shape(self) -> tuple[int, int]:
        """(rows, columns) of latent pixels of a token."""
        return (self.patch, self.patch) if isinstance(self.patch, int) else self.patch

    @property
    def patch_area(self) -> int:
        """Latent pixels of a token."""
        return math.prod(self.patch_shape)

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLP."""
        return self.mlp_ratio * self.width if self.mlp_width is None else self.mlp_width

    @property
    def opening_frames(self) -> int:
        """Frames of the first step."""
        return self.chunk if self.first_chunk is None else self.first_chunk

    @property
    def recycled_channels(self) -> int:
        """Input channels of the recycled frame."""
        return self.latent_channels if self.recycle or self.block == "mmdit" else 0

    @property
    def input_channels(self) -> int:
        """Noise, recycled frame and conditions, concatenated on channels."""
        return self.latent_channels + self.recycled_channels + self.condition_channels

    def can_start_from(self, channels: int) -> bool:
        """Returns True if weights with this number of input channels can start the model: those of
        the noise alone, or of noise, recycled frame and at most as many conditions."""
        least = self.latent_channels + self.recycled_channels
        return channels == self.latent_channels or least <= channels <= self.input_channels

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a latent frame of `height` x `width` latent pixels.
        ValueError if the patch does not divide them."""
        rows, columns = self.patch_shape
        if height % rows or width % columns:
            multiples = " and ".join(map(str, dict.fromkeys(self.patch_shape)))
            raise ValueError(
                f"latent size: expected multiples of {multiples}, got {height} x {width}"
            )
        return height // rows, width // columns

    def window(self, grid: tuple[int, int]) -> int:
        """Returns N of docs/method.md#3 for frames of `grid` = (rows, columns) of tokens. A grid
        on its side has the same N, because N is chosen for memory."""
        tokens = math.prod(grid)
        for rows, columns, frames in self.grid_windows:
            if rows * columns == tokens:
                return frames
        return self.window_frames


def _are_grid_windows(windows: object) -> bool:
    """Checks that all are (rows, columns, N), and each number of tokens appears once."""
    if not isinstance(windows, tuple):
        return False
    for entry in windows:
        if not isinstance(entry, tuple) or [*map(type, entry)] != [int] * 3:
            return False
        rows, columns, frames = entry
        if rows < 1 or columns < 1 or frames < 0:
            return False
    return len({rows * columns for rows, columns, _ in windows}) == len(windows)


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
class FewStepConfig:
    """Sampling of a few-step model: one pass at each of `times` per chunk (docs/method.md#15).

    Attributes:
        times: Times of the passes in (0, 1], falling; for "unipc" below 1.
        solver: Way of a chunk from one time to the next: "noise" mixes the estimate of the clean
            chunk with new noise, "unipc" follows the probability flow and takes no new noise.
        first_times: Times for the first chunk of a stream; `times` unless given.
        refresh: Time of one more pass, over the clean chunk, whose keys and values stay in the
            cache; None if those of the last pass stay.
        guidance: w of v = v_negative + w (v_prompt - v_negative); 1 for none. With guidance every
            pass is over twice the batch, with the prompt and with `negative_prompt`.
        rolling: True if each pass is over one chunk per time, the oldest at the last time, and
            finishes the oldest.
        picture_in_chunk: True if a picture is the first frame of the first chunk, at time 0 in
            each of its passes; else a picture comes before the first chunk.
    """

    times: tuple[float, ...]
    first_times: tuple[float, ...] | None = None
    refresh: float | None = 0.0
    kind: Literal["few-step"] = "few-step"
    solver: Literal["noise", "unipc"] = "noise"
    guidance: float = 1.0
    negative_prompt: str = ""
    picture_in_chunk: bool = False
    rolling: bool = False

    def __post_init__(self):
        if self.kind != "few-step":
            raise ValueError(f"kind: expected 'few-step', got {self.kind!r}")
        if not self.guidance >= 0:
            raise ValueError(f"guidance: expected 0 or more, got {self.guidance}")
        if self.solver not in ("noise", "unipc"):
            raise ValueError(f"solver: expected 'noise' or 'unipc', got {self.solver!r}")
        for name in ("times", "first_times"):
            times = getattr(self, name)
            if name == "first_times" and times is None:
                continue
            falling = list(times) == sorted(set(times), reverse=True)
            if not times or not falling or times[0] > 1 or not times[-1] > 0:
                raise ValueError(f"{name}: expected falling times in (0, 1], got {times}")
            if self.solver == "unipc" and times[0] == 1:
                raise ValueError(f"{name}: expected times below 1 for 'unipc', got {times}")
        if self.refresh is not None and not 0 <= self.refresh <= 1:
            raise ValueError(f"refresh: expected a time in [0, 1] or None, got {self.refresh}")
        others = (self.first_times, self.solver, self.guidance, self.picture_in_chunk)
        if self.rolling and others != (None, "noise", 1, False):
            raise ValueError(
                "rolling: expected False with first_times, 'unipc', guidance or picture_in_chunk, "
                "got True"
            )
        if self.rolling and (self.refresh is None or len(self.times) < 2):
            raise ValueError(
                f"rolling: expected two times or more and a refresh, got times {self.times} and "
                f"refresh {self.refresh}"
            )

    @property
    def opening_times(self) -> tuple[float, ...]:
        """Times for the first chunk."""
        return self.times if self.first_times is None else self.first_times

    def takes_picture(self, config: ModelConfig) -> bool:
        """Returns True if a stream of such a model may begin with a picture."""
        return self.picture_in_chunk or (config.opening_frames == 1 and not self.rolling)

    def draws(self, opening: bool) -> int:
        """Returns the number of draws of noise for a chunk: one for each time, or one in all for
        "unipc" and for a later rolling chunk. opening: True for the first chunk."""
        if self.solver == "unipc" or (self.rolling and not opening):
            return 1
        return len(self.opening_times if opening else self.times)

    def noise_frames(self, frames: int) -> int:
        """Returns the frames of a draw of noise for a chunk of `frames`."""
        return len(self.times) * frames if self.rolling else frames

    @property
    def negatives(self) -> tuple[str, ...]:
        """The prompts that follow the prompt of a clip in the batch: one with guidance."""
        return () if self.guidance == 1 else (self.negative_prompt,)

    @property
    def passes(self) -> int:
        """Forward passes (NFE) per chunk after the first."""
        if self.rolling:
            return 2
        return (1 + len(self.negatives)) * (len(self.times) + (self.refresh is not None))


def sampling_config(given: Mapping[str, Any]) -> SamplingConfig | FewStepConfig:
    """Returns the sampling of a checkpoint's configuration: its `kind` names the class, and without
    one it is a `SamplingConfig`. TypeError or ValueError for fields that do not fit."""
    return (FewStepConfig if "kind" in given else SamplingConfig)(**given)


@dataclass(frozen=True)
class CameraConfig:
    """Motion of the camera per control, and the scale of its rays (docs/method.md#10).

    `yaw_step` (radians) and `forward_step` (world units) are the motion of one *video frame* at
    full deflection. The ray channels are divided by the two deviations, which brings them to about
    unit deviation. `frames` is the time factor of the autoencoder. `rays` says what stands for a
    ray's place: its origin, or its moment (Plücker coordinates, for comparison).

    `relative_to_first` measures poses from the frame that a clip begins with, not from the frame
    before: for comparison, in clips of one segment. Such a model cannot be streamed.
    """

    field_of_view: float  # horizontal, radians
    yaw_step: float
    forward_step: float
    origin_deviation: float
    direction_deviation: float
    frames: int = 4  # video frames per latent frame
    rays: Literal["origin", "moment"] = "origin"
    relative_to_first: bool = False

    def __post_init__(self):
        if self.rays not in ("origin", "moment"):
            raise ValueError(f"rays: expected 'origin' or 'moment', got {self.rays!r}")

    @property
    def channels(self) -> int:
        return 6 * self.frames

    def asking(self, turns: float, walks: float) -> "CameraConfig":
        """The camera whose rays ask for `turns` times each turn and `walks` times each walk."""
        return replace(
            self,
            direction_deviation=self.direction_deviation / turns,
            origin_deviation=self.origin_deviation / walks,
        )
