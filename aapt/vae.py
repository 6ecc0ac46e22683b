"""Causal video autoencoder: 1 + 4n video frames <-> 1 + n latent frames (SPEC 1 and 9).

Everything that looks back in time is a `causal_conv3d`, whose state is the last frames it has
read; norms and attention act within one frame. So decoding a stream in chunks of any length is
decoding the whole clip, and a stream is nothing but a tuple of those states.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_kernels import causal_conv3d

VIDEO_CHANNELS = 3

# What a decoder remembers between chunks: one tensor per convolution, in the order they run.
DecoderState = tuple[Tensor, ...]


@dataclass(frozen=True)
class VAEConfig:
    """Shape of a `CausalVAE`. Per-scale tuples are listed from the finest scale (SPEC 9).

    With `linear_skip`, empty encoder tuples leave the linear map as the whole encoder.
    """

    encoder_channels: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    encoder_blocks: tuple[int, ...]  # residual blocks per scale
    decoder_blocks: tuple[int, ...]
    strides: tuple[tuple[int, int], ...]  # (time, space) of each step from a scale to the coarser
    latent_channels: int = 16
    patch_size: int = 1  # square of pixels folded into channels at the finest scale
    time_kernels: tuple[int, int] = (3, 3)  # of a residual block; the second also in/upsampling
    upsample: str = "nearest"  # "nearest": repeat, then convolve; "shuffle": convolve, then unfold
    mid_attention: bool = False  # attention within each frame at the coarsest scale
    padding: str = "zeros"  # of convolutions, in space and before the first frame
    linear_skip: bool = False  # a linear autoencoder beside the network (see `LinearSkip`)

    def __post_init__(self):
        scales = len(self.strides) + 1
        for name in ("encoder_channels", "decoder_channels", "encoder_blocks", "decoder_blocks"):
            value = getattr(self, name)
            if self.linear_skip and name.startswith("encoder") and value == ():
                continue
            if len(value) != scales:
                raise ValueError(
                    f"{name}: expected {scales} scales for {scales - 1} strides, got {value}"
                )
        if self.upsample not in ("nearest", "shuffle"):
            raise ValueError(f"upsample: expected 'nearest' or 'shuffle', got {self.upsample!r}")

    @property
    def time_factor(self) -> int:
        """Video frames per latent frame after the first."""
        factor = 1
        for time, _ in self.strides:
            factor *= time
        return factor

    @property
    def space_factor(self) -> int:
        """Video pixels per latent pixel, per axis."""
        factor = self.patch_size
        for _, space in self.strides:
            factor *= space
        return factor


def original() -> VAEConfig:
    """The paper's full decoder: three residual blocks per scale (SPEC 9)."""
    return VAEConfig(
        encoder_channels=(128, 256, 512, 512),
        decoder_channels=(128, 256, 512, 512),
        encoder_blocks=(2, 2, 2, 2),
        decoder_blocks=(3, 3, 3, 3),
        strides=((2, 2), (2, 2), (1, 2)),
        mid_attention=True,
    )


def light() -> VAEConfig:
    """The paper's light decoder behind the original encoder (SPEC 9)."""
    return VAEConfig(
        encoder_channels=(128, 256, 512, 512),
        decoder_channels=(64, 128, 256, 512),
        encoder_blocks=(2, 2, 2, 2),
        decoder_blocks=(2, 2, 2, 2),
        strides=((2, 2), (2, 2), (1, 2)),
        mid_attention=True,
    )


def tiny() -> VAEConfig:
    """The bundled world's autoencoder: real time on two CPU cores at 128x80.

    Its encoder is linear, the principal components of the world's patches; the decoder's network
    adds what neighbours and the past tell.
    """
    return VAEConfig(
        encoder_channels=(),
        decoder_channels=(48, 64, 96),
        encoder_blocks=(),
        decoder_blocks=(1, 2, 1),
        strides=((2, 2), (2, 1)),
        patch_size=4,
        time_kernels=(3, 1),
        upsample="shuffle",
        linear_skip=True,
    )


class Stream:
    """The states of one pass through the convolutions: read and replaced in running order."""

    def __init__(self, states: DecoderState | None):
        self.states = states
        self.new_states: list[Tensor] = []

    @property
    def starts(self) -> bool:
        """Whether this pass holds the first frame."""
        return self.states is None

    def pop(self) -> Tensor | None:
        return None if self.states is None else self.states[len(self.new_states)]

    def push(self, state: Tensor) -> None:
        self.new_states.append(state)


class CausalConv3d(nn.Module):
    """`causal_conv3d` with its parameters; `norm` puts an RMS norm and SiLU in front."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        *,
        stride: tuple[int, int, int] = (1, 1, 1),
        norm: bool = False,
        silu: bool = False,
        padding: str = "zeros",
    ):
        super().__init__()
        fan_in = in_channels * kernel[0] * kernel[1] * kernel[2]
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel))
        nn.init.normal_(self.weight, std=fan_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.norm_weight = nn.Parameter(torch.ones(in_channels)) if norm else None
        self.silu, self.stride, self.padding = silu, stride, padding

    def forward(self, x: Tensor, stream: Stream, residual: Tensor | None = None) -> Tensor:
        out, state = causal_conv3d(
            x,
            self.weight,
            self.bias,
            state=stream.pop(),
            norm_weight=self.norm_weight,
            silu=self.silu,
            residual=residual,
            stride=self.stride,
            padding=self.padding,
        )
        stream.push(state)
        return out

    def flops(self, pixels: int) -> int:
        """Multiplications and additions for `pixels` output positions."""
        return 2 * self.weight.numel() * pixels


class ResidualBlock(nn.Module):
    """(norm, SiLU, convolution) twice, added to the input."""

    def __init__(self, in_channels: int, out_channels: int, config: VAEConfig):
        super().__init__()
        first, second = config.time_kernels
        active = dict(norm=True, silu=True, padding=config.padding)
        self.conv1 = CausalConv3d(in_channels, out_channels, (first, 3, 3), **active)
        self.conv2 = CausalConv3d(out_channels, out_channels, (second, 3, 3), **active)
        nn.init.zeros_(self.conv2.weight)  # every block starts as the identity
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x, stream)
        return self.conv2(self.conv1(x, stream), stream, residual)

    def flops(self, frames: int, height: int, width: int) -> int:
        convs = [c for c in (self.conv1, self.conv2, self.shortcut) if c is not None]
        return sum(conv.flops(frames * height * width) for conv in convs)


class FrameAttention(nn.Module):
    """Single-head self-attention within each frame, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.qkv = CausalConv3d(channels, 3 * channels, (1, 1, 1), norm=True)
        self.proj = CausalConv3d(channels, channels, (1, 1, 1))
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        qkv = self.qkv(x, stream).permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, H*W, 3C)
        out = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        out = out.unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)
        return self.proj(out, stream, residual=x)

    def flops(self, frames: int, height: int, width: int) -> int:
        pixels = height * width
        scores = 4 * self.proj.weight.shape[0] * pixels**2
        return frames * (self.qkv.flops(pixels) + self.proj.flops(pixels) + scores)


class Downsample(nn.Module):
    """Strided convolution. Frame 0 stays on its own: 1 + s*n frames become 1 + n."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int], padding: str):
        super().__init__()
        time, space = stride
        self.conv = CausalConv3d(
            in_channels, out_channels, (3, 3, 3), stride=(time, space, space), padding=padding
        )

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.conv(x, stream)


class Upsample(nn.Module):
    """Inverse of `Downsample` in shape: 1 + n frames become 1 + s*n.

    "nearest" repeats, then convolves at the high rate; "shuffle" convolves at the low rate into
    the channels of every new pixel. Either way the first frame of a stream yields one frame: the
    last of its copies.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: tuple[int, int], config: VAEConfig
    ):
        super().__init__()
        self.time, self.space = stride
        self.shuffle = config.upsample == "shuffle"
        copies = self.time * self.space**2 if self.shuffle else 1
        kernel = (config.time_kernels[1], 3, 3)
        self.conv = CausalConv3d(in_channels, out_channels * copies, kernel, padding=config.padding)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.shuffle:
            x = unfold_channels(self.conv(x, stream), self.time, self.space)
            return x[:, :, self.time - 1 :] if stream.starts else x
        x = x.repeat_interleave(self.time, dim=2)
        x = x[:, :, self.time - 1 :] if stream.starts else x
        x = x.repeat_interleave(self.space, dim=3).repeat_interleave(self.space, dim=4)
        return self.conv(x, stream)

    def flops(self, frames: int, height: int, width: int) -> int:
        """For `frames` x `height` x `width` on the coarse side, past the first frame."""
        copies = 1 if self.shuffle else self.time * self.space**2
        return self.conv.flops(frames * height * width * copies)


def unfold_channels(x: Tensor, time: int, space: int) -> Tensor:
    """(B, time*space*space*C, T, H, W) -> (B, C, time*T, space*H, space*W)."""
    batch, channels, frames, height, width = x.shape
    x = x.unflatten(1, (time, space, space, channels // (time * space * space)))
    x = x.permute(0, 4, 5, 1, 6, 2, 7, 3)  # (B, C, T, time, H, space, W, space)
    return x.reshape(batch, -1, frames * time, height * space, width * space)


def fold_pixels(x: Tensor, space: int) -> Tensor:
    """(B, C, T, space*H, space*W) -> (B, space*space*C, T, H, W): undoes `unfold_channels`."""
    x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space))  # (B, C, T, H, space, W, space)
    return x.permute(0, 4, 6, 1, 2, 3, 5).flatten(1, 3)


def middle(channels: int, config: VAEConfig) -> list[nn.Module]:
    """Layers at the coarsest scale on both sides of the latent."""
    if not config.mid_attention:
        return []
    return [
        ResidualBlock(channels, channels, config),
        FrameAttention(channels),
        ResidualBlock(channels, channels, config),
    ]


class Encoder(nn.Module):
    """Video -> latent, the whole clip at once."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, padding = config.encoder_channels, config.padding
        self.patch_size = config.patch_size
        pixels = VIDEO_CHANNELS * config.patch_size**2
        self.conv_in = CausalConv3d(
            pixels, channels[0], (config.time_kernels[1], 3, 3), padding=padding
        )
        layers: list[nn.Module] = []
        for scale, blocks in enumerate(config.encoder_blocks):
            if scale > 0:
                stride = config.strides[scale - 1]
                layers.append(Downsample(channels[scale - 1], channels[scale], stride, padding))
            layers += [
                ResidualBlock(channels[scale], channels[scale], config) for _ in range(blocks)
            ]
        self.layers = nn.ModuleList(layers + middle(channels[-1], config))
        self.conv_out = CausalConv3d(
            channels[-1], config.latent_channels, (3, 3, 3), norm=True, silu=True, padding=padding
        )

    def forward(self, video: Tensor) -> Tensor:
        stream = Stream(None)
        x = self.conv_in(fold_pixels(video, self.patch_size), stream)
        for layer in self.layers:
            x = layer(x, stream)
        return self.conv_out(x, stream)


class Decoder(nn.Module):
    """Latent -> video, a whole clip or any chunk of it."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, padding = config.decoder_channels, config.padding
        self.patch_size = config.patch_size
        width = channels[-1]
        self.conv_in = CausalConv3d(config.latent_channels, width, (3, 3, 3), padding=padding)
        layers = middle(width, config)
        for scale in reversed(range(len(channels))):
            for _ in range(config.decoder_blocks[scale]):
                layers.append(ResidualBlock(width, channels[scale], config))
                width = channels[scale]
            if scale > 0:
                # Unfolding pays per output channel, so "shuffle" narrows before, not after.
                narrow = channels[scale - 1] if config.upsample == "shuffle" else width
                layers.append(Upsample(width, narrow, config.strides[scale - 1], config))
                width = narrow
        self.layers = nn.ModuleList(layers)
        self.conv_out = CausalConv3d(
            width,
            VIDEO_CHANNELS * config.patch_size**2,
            (config.time_kernels[1], 3, 3),
            norm=True,
            silu=True,
            padding=padding,
        )

    def forward(self, latent: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        stream = Stream(state)
        x = self.conv_in(latent, stream)
        for layer in self.layers:
            x = layer(x, stream)
        video = unfold_channels(self.conv_out(x, stream), 1, self.patch_size)
        return video, tuple(stream.new_states)


class LinearSkip(nn.Module):
    """A linear map between a latent pixel and its patch of video, beside the network.

    `fit` makes it the best linear autoencoder there is, so that a small network starts from there
    and only learns what is not linear. The first frame fills its patch in time by repetition.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.time, self.space = config.time_factor, config.space_factor
        patch = VIDEO_CHANNELS * self.time * self.space**2
        self.encode = CausalConv3d(patch, config.latent_channels, (1, 1, 1))
        self.decode = CausalConv3d(config.latent_channels, patch, (1, 1, 1))

    def patches(self, video: Tensor) -> Tensor:
        """(B, 3, 1 + 4n, H, W) -> (B, patch, 1 + n, H/8, W/8)."""
        first = video[:, :, :1].expand(-1, -1, self.time - 1, -1, -1)
        x = torch.cat([first, video], dim=2).unflatten(2, (-1, self.time))  # (B, 3, 1+n, 4, H, W)
        x = fold_pixels(x.transpose(2, 3).flatten(1, 2), self.space)  # (space^2 * 3 * time)
        x = x.unflatten(1, (self.space**2, VIDEO_CHANNELS, self.time))
        return x.permute(0, 3, 1, 2, 4, 5, 6).flatten(1, 3)  # in the order of `unfold_channels`

    def to_latent(self, video: Tensor) -> Tensor:
        return self.encode(self.patches(video), Stream(None))

    def to_video(self, latent: Tensor, starts: bool) -> Tensor:
        patches = self.decode(latent, Stream(None))
        video = unfold_channels(patches, self.time, self.space)
        return video[:, :, self.time - 1 :] if starts else video

    @torch.no_grad()
    def fit(self, videos: Tensor) -> None:
        """Principal components of the patches of videos (B, 3, 1 + 4n, H, W), whitened."""
        patches = self.patches(videos).transpose(0, 1).flatten(1).double()  # (patch, samples)
        mean = patches.mean(dim=1, keepdim=True)
        covariance = (patches - mean) @ (patches - mean).T / patches.shape[1]
        variance, vectors = torch.linalg.eigh(covariance)
        channels = len(self.encode.weight)
        deviation = variance[-channels:].clamp(min=1e-8).sqrt()
        vectors = vectors[:, -channels:]
        to_latent = (vectors / deviation).T
        self.encode.weight.copy_(to_latent[:, :, None, None, None])
        self.encode.bias.copy_(-(to_latent @ mean).squeeze(1))
        self.decode.weight.copy_((vectors * deviation)[:, :, None, None, None])
        self.decode.bias.copy_(mean.squeeze(1))


class CausalVAE(nn.Module):
    """Video in [-1, 1], (B, 3, 1 + 4n, H, W) <-> normalised latent, (B, 16, 1 + n, H/8, W/8).

    The encoder is deterministic. `latent_mean` and `latent_std`, measured over data once the
    network is trained, make each latent channel about zero mean and unit variance; until then
    they are 0 and 1.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config) if config.encoder_channels else None
        self.decoder = Decoder(config)
        self.linear = None
        if config.linear_skip:
            self.linear = LinearSkip(config)
            for network in (self.encoder, self.decoder):  # at first, the linear map alone
                if network is not None:
                    nn.init.zeros_(network.conv_out.weight)
        shape = (config.latent_channels, 1, 1, 1)
        self.register_buffer("latent_mean", torch.zeros(shape))
        self.register_buffer("latent_std", torch.ones(shape))

    def pixel_deviation(self) -> Tensor:
        """How far a unit of each latent channel moves its pixels through the linear map, (C,)."""
        if self.linear is None:
            raise ValueError("linear_skip: expected True, there is no linear map to ask")
        columns = self.linear.decode.weight.detach().flatten(1)
        return columns.norm(dim=0) * self.latent_std.flatten()

    def encode(self, video: Tensor) -> Tensor:
        """Whole clip; its first frame alone gives the first latent frame."""
        time, space = self.config.time_factor, self.config.space_factor
        shape = tuple(video.shape)
        fits = len(shape) == 5 and shape[1] == VIDEO_CHANNELS and shape[2] % time == 1 % time
        if not fits or shape[3] % space or shape[4] % space:
            raise ValueError(
                f"video: expected (batch, {VIDEO_CHANNELS}, 1 + {time}n, height, width) with "
                f"height and width multiples of {space}, got {shape}"
            )
        parts = []
        if self.encoder is not None:
            parts.append(self.encoder(video))
        if self.linear is not None:
            parts.append(self.linear.to_latent(video))
        return (sum(parts) - self.latent_mean) / self.latent_std

    def decode(self, latent: Tensor) -> Tensor:
        """Whole clip: the first latent frame gives one video frame, each later one four."""
        return self.decode_frame(latent)[0]

    def decode_frame(
        self, latent: Tensor, state: DecoderState | None = None
    ) -> tuple[Tensor, DecoderState]:
        """Next chunk of a stream, one latent frame or more; returns (video, state for the next).

        `state` None starts a stream. A state is never written to, so streams cannot mix and an
        old state can be resumed twice. No gradient flows through it.
        """
        channels = self.config.latent_channels
        if latent.ndim != 5 or latent.shape[1] != channels or latent.shape[2] == 0:
            raise ValueError(
                f"latent: expected (batch, {channels}, time, height, width) with at least one "
                f"frame, got {tuple(latent.shape)}"
            )
        latent = latent * self.latent_std + self.latent_mean
        video, new_state = self.decoder(latent, state)
        if self.linear is not None:
            video = video + self.linear.to_video(latent, starts=state is None)
        return video, new_state


def flops_per_latent_frame(config: VAEConfig, height: int, width: int) -> tuple[int, int]:
    """Steady-state (encoder, decoder) FLOPs per latent frame of a `height` x `width` video.

    Convolutions and attention only; a multiplication and an addition count as two.
    """
    with torch.device("meta"):
        vae = CausalVAE(config)
    encoder, decoder = vae.encoder, vae.decoder
    h, w = height // config.patch_size, width // config.patch_size
    frames = config.time_factor

    encode = decode = 0
    if encoder is not None:
        strides = iter(config.strides)
        encode += encoder.conv_in.flops(frames * h * w)
        for layer in encoder.layers:
            if isinstance(layer, Downsample):
                time, space = next(strides)
                frames, h, w = frames // time, h // space, w // space
                encode += layer.conv.flops(frames * h * w)
            else:
                encode += layer.flops(frames, h, w)
        encode += encoder.conv_out.flops(frames * h * w)
    frames, h, w = 1, height // config.space_factor, width // config.space_factor
    if vae.linear is not None:
        encode += vae.linear.encode.flops(h * w)
        decode += vae.linear.decode.flops(h * w)

    decode += decoder.conv_in.flops(frames * h * w)
    for layer in decoder.layers:
        decode += layer.flops(frames, h, w)
        if isinstance(layer, Upsample):
            frames, h, w = frames * layer.time, h * layer.space, w * layer.space
    decode += decoder.conv_out.flops(frames * h * w)
    return encode, decode
