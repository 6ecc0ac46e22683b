"""Causal video autoencoder: 1 + 4n video frames <-> 1 + n latent frames (docs/method.md#1 and #9).

Encoding or decoding a clip in chunks equals doing it whole: a stream is only the states of the
convolutions (`layers.py`).
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import shortcuts
from .config import VAEConfig
from .layers import (
    CausalConv3d,
    DecoderState,
    Downsample,
    EncoderState,
    ResidualBlock,
    SeparateDownsample,
    SeparateUpsample,
    States,
    Upsample,
    active,
    fold_pixels,
    frames_needed,
    last_frames,
    middle,
    norm_of,
    unfold_channels,
)
from .memory import MemoryDecoder
from .pixels import to_bytes

VIDEO_CHANNELS = 3
LAPPED_KERNEL = (2, 3, 3)  # a latent frame and the one before, 3 x 3 latent pixels of each
LAST = torch.channels_last_3d


class Encoder(nn.Module):
    """Video to latent, a whole clip or any chunk of it.

    Wan's strided convolutions pad an image at its right and lower edges only. Mirrored, with
    mirrored weights, they pad as ours do, so a "separate" encoder mirrors its video.

    On an sm_90 device Triton runs the strided convolutions and the first, which reads three
    channels; the hand-written kernel runs the others, in bfloat16.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, padding = config.encoder_channels, config.padding
        self.patch_size = config.patch_size
        self.mirrored = config.upsample == "separate"
        pixels = VIDEO_CHANNELS * config.patch_size**2
        self.conv_in = CausalConv3d(
            pixels, channels[0], (config.time_kernels[1], 3, 3), padding=padding
        )
        scales = shortcuts.encoder_scales if config.shortcuts else _encoder_scales
        self.layers = nn.ModuleList(scales(config) + middle(channels[-1], config))
        self.conv_out = CausalConv3d(
            channels[-1], config.latent_channels, (3, 3, 3), **active(config)
        )

    def forward(
        self,
        video: Tensor,
        state: EncoderState | None = None,
        state_out: EncoderState | None = None,
    ) -> tuple[Tensor, EncoderState]:
        """Encodes a chunk (B, 3, F, H, W), see `CausalVAE.encode_frames`."""
        stream = States(state, state_out)
        if self.mirrored:
            video = video.flip(3, 4)
        x = fold_pixels(video, self.patch_size).contiguous(memory_format=LAST)
        x = self.conv_in(x, stream)
        for layer in self.layers:
            x = layer(x, stream)
        latent = self.conv_out(x, stream)
        return latent.flip(3, 4) if self.mirrored else latent, tuple(stream.new_states)


class Decoder(nn.Module):
    """Latent to video, a whole clip or any chunk of it.

    With `lapped`, a linear map from windows of `LAPPED_KERNEL` latent pixels is added to the
    network's output. Windows of neighbours overlap, so the map shows fewer borders of cells than a
    linear map of single latent pixels. `CausalVAE.fit_lapped` makes it the best one in closed form.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, padding = config.decoder_channels, config.padding
        self.patch_size = config.patch_size
        self.time, self.space = config.time_factor, config.space_factor
        width, latent = channels[-1], config.latent_channels
        self.lapped = None
        if config.lapped:
            patch = VIDEO_CHANNELS * self.time * self.space**2
            self.lapped = CausalConv3d(latent, patch, LAPPED_KERNEL, padding=padding)
        self.projection = None
        if config.latent_projection:
            self.projection = CausalConv3d(latent, latent, (1, 1, 1))
        self.conv_in = CausalConv3d(latent, width, (3, 3, 3), padding=padding)
        layers = middle(width, config)
        scales = shortcuts.decoder_scales if config.shortcuts else _decoder_scales
        more, width = scales(config)
        self.layers = nn.ModuleList(layers + more)
        self.conv_out = CausalConv3d(
            width,
            VIDEO_CHANNELS * config.patch_size**2,
            (config.time_kernels[1], 3, 3),
            **active(config),
        )

    def forward(
        self,
        latent: Tensor,
        state: DecoderState | None,
        pixels: bool = False,
        state_out: DecoderState | None = None,
        last: int | None = None,
    ) -> tuple[Tensor, DecoderState]:
        """Decodes a chunk. last: video frames to return, None for all; of the others only what
        these and the next state need is computed."""
        front = [self.conv_in] if self.projection is None else [self.projection, self.conv_in]
        needs = frames_needed([*front, *self.layers, self.conv_out], last)
        stream, x = States(state, state_out), latent
        rough = None
        if self.lapped is not None:
            needed = None if last is None else self.lapped.needs(last // self.time)
            rough = self.lapped(last_frames(latent, needed), stream)
            rough = unfold_channels(rough, self.time, self.space)
            rough = rough[:, :, self.time - 1 :] if stream.starts else last_frames(rough, last)
        for conv in front:
            x = conv(last_frames(x, needs.pop()), stream)
        followers = [*self.layers[1:], self.conv_out]
        for layer, follower in zip(self.layers, followers, strict=True):
            # A norm made ahead would cover all frames
            then = norm_of(follower) if last is None else None
            x = layer(last_frames(x, needs.pop()), stream, then)
        x = self.conv_out(last_frames(x, needs.pop()), stream, pixels=pixels and rough is None)
        video = unfold_channels(last_frames(x, last), 1, self.patch_size)
        if rough is not None:
            video = to_bytes(video + rough) if pixels else video + rough
        return video, tuple(stream.new_states)


def _encoder_scales(config: VAEConfig) -> list[nn.Module]:
    """Returns the layers of an encoder without shortcuts, without its middle."""
    layers, width = [], config.encoder_channels[0]
    for scale, (channels, blocks) in enumerate(zip(config.encoder_channels, config.encoder_blocks)):
        if scale > 0:
            stride = config.strides[scale - 1]
            if config.upsample == "separate":
                layers.append(SeparateDownsample(width, stride, config.padding))
            else:
                layers.append(Downsample(width, channels, stride, config.padding))
                width = channels
        for _ in range(blocks):
            layers.append(ResidualBlock(width, channels, config))
            width = channels
    return layers


def _decoder_scales(config: VAEConfig) -> tuple[list[nn.Module], int]:
    """Returns the layers of a decoder without shortcuts, without its middle, and their channels."""
    channels, layers = config.decoder_channels, []
    width = channels[-1]
    for scale in reversed(range(len(channels))):
        for _ in range(config.decoder_blocks[scale]):
            layers.append(ResidualBlock(width, channels[scale], config))
            width = channels[scale]
        if scale > 0:
            stride = config.upscales[scale - 1]
            if config.upsample == "separate":
                layers.append(SeparateUpsample(width, width // 2, stride, config))
                width = width // 2
            else:
                # Unfolding pays per output channel, so "shuffle" narrows before, not after.
                narrow = channels[scale - 1] if config.upsample == "shuffle" else width
                layers.append(Upsample(width, narrow, stride, config))
                width = narrow
    return layers, width


class LinearSkip(nn.Module):
    """A linear map between a latent pixel and its patch of video, added to the network's output.

    `fit` makes it the best linear autoencoder of its size, so a small network starts from there and
    learns only the rest. The first frame is repeated to fill its patch in time. A lapped decoder
    has a linear map of its own, and only the way to latents is used.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.time, self.space = config.time_factor, config.space_factor
        patch = VIDEO_CHANNELS * self.time * self.space**2
        self.encode = CausalConv3d(patch, config.latent_channels, (1, 1, 1))
        self.decode = CausalConv3d(config.latent_channels, patch, (1, 1, 1))

    def patches(self, video: Tensor, starts: bool = True) -> Tensor:
        """Folds (B, 3, 1 + 4n, H, W) to (B, patch, 1 + n, H/8, W/8); later chunks, (B, 3, 4n, H, W)
        to n."""
        if starts:
            first = video[:, :, :1].expand(-1, -1, self.time - 1, -1, -1)
            video = torch.cat([first, video], dim=2)
        x = video.unflatten(2, (-1, self.time))  # (B, 3, 1 + n, 4, H, W)
        x = fold_pixels(x.transpose(2, 3).flatten(1, 2), self.space)  # (space^2 * 3 * time)
        x = x.unflatten(1, (self.space**2, VIDEO_CHANNELS, self.time))
        return x.permute(0, 3, 1, 2, 4, 5, 6).flatten(1, 3)  # in the order of `unfold_channels`

    def to_latent(self, video: Tensor, starts: bool) -> Tensor:
        """Maps video to latents. starts: the first video frame makes one latent frame."""
        return self.encode(self.patches(video, starts), States(None))

    def to_video(self, latent: Tensor, starts: bool) -> Tensor:
        """Maps latents to video. starts: the first latent frame makes one video frame."""
        patches = self.decode(latent, States(None))
        video = unfold_channels(patches, self.time, self.space)
        return video[:, :, self.time - 1 :] if starts else video

    @torch.no_grad()
    def fit(self, videos: Tensor) -> None:
        """Sets the map to the whitened principal components of patches of videos
        (B, 3, 1 + 4n, H, W)."""
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
    """Video in [-1, 1], (B, 3, 1 + 4n, H, W) <-> normalised latent, (B, C, 1 + n, H/s, W/s).

    C is `latent_channels` of the configuration, s its `space_factor`. The encoder is deterministic.
    `latent_mean` and `latent_std` bring each latent channel to about zero mean and unit variance;
    they are measured after training, and 0 and 1 until then.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config) if config.encoder_channels else None
        self.decoder = (MemoryDecoder if config.decoder == "memory" else Decoder)(config)
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
        """Returns (C,): the distance that one unit of each latent channel moves pixels through the
        linear map. ValueError without a linear map."""
        if self.linear is None:
            raise ValueError("linear_skip: expected True, there is no linear map to ask")
        columns = self.linear.decode.weight.detach().flatten(1)
        return columns.norm(dim=0) * self.latent_std.flatten()

    @property
    def encodes(self) -> bool:
        """False for a decoder alone."""
        return self.encoder is not None or self.linear is not None

    @torch.no_grad()
    def fit_lapped(
        self,
        videos: Iterable[Tensor],
        noise: float,
        target: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Sets the decoder's lapped map to the one of least squared error on `videos`, each
        (B, 3, 1 + 4n, H, W), with its network silent.

        noise: deviation of white noise on the latents, in their deviations, which the map expects.
        target: function from a video to the video of equal shape that the map shall make of its
        latents; None for the video itself.
        """
        lapped, products, targets, count = self.decoder.lapped, 0, 0, 0
        kt, kh, kw = LAPPED_KERNEL
        margins = (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0)
        for video in videos:
            latent = self.encode(video) * self.latent_std + self.latent_mean
            windows = F.pad(latent, margins, "replicate")
            for axis, size in enumerate(LAPPED_KERNEL, start=2):
                windows = windows.unfold(axis, size, 1)
            windows = windows.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(0, 3)
            windows = torch.cat([windows, windows.new_ones(len(windows), 1)], dim=1)
            wanted = video if target is None else target(video)
            patches = self.linear.patches(wanted).permute(0, 2, 3, 4, 1).flatten(0, 3)
            products = products + (windows.T @ windows).double()
            targets = targets + (windows.T @ patches).double()
            count += len(windows)
        power = (noise * self.latent_std.flatten().double()).square()
        power = power.repeat_interleave(kt * kh * kw)
        products += count * torch.cat([power, power.new_zeros(1)]).diag()
        solved = torch.linalg.solve(products, targets).T.float()
        lapped.weight.copy_(solved[:, :-1].view_as(lapped.weight))
        lapped.bias.copy_(solved[:, -1])
        nn.init.zeros_(self.decoder.conv_out.weight)
        nn.init.zeros_(self.decoder.conv_out.bias)

    def encode(self, video: Tensor) -> Tensor:
        """Encodes a whole clip; its first video frame alone makes the first latent frame."""
        return self.encode_frames(video)[0]

    def encode_frames(
        self,
        video: Tensor,
        state: EncoderState | None = None,
        *,
        state_out: EncoderState | None = None,
    ) -> tuple[Tensor, EncoderState]:
        """Encodes the next chunk of a stream: (latent, state for the next).

        Args:
            video: (B, 3, F, H, W) in [-1, 1]; F = 1 + 4n at the start of a stream, 4n after.
            state: None starts a stream. It is never written to. No gradient flows through it.
            state_out: Tensors that receive the new state; `state` itself may be given.

        ValueError for another shape, or without an encoder.
        """
        time, space = self.config.time_factor, self.config.space_factor
        if not self.encodes:
            raise ValueError(
                "encoder: expected an autoencoder, got a decoder alone; encode with the "
                "autoencoder that the decoder was made for"
            )
        starts, shape = state is None, tuple(video.shape)
        fits = len(shape) == 5 and shape[1] == VIDEO_CHANNELS and shape[2] > 0
        fits = fits and (shape[2] - starts) % time == 0
        if not fits or shape[3] % space or shape[4] % space:
            frames = f"1 + {time}n" if starts else f"{time}n"
            raise ValueError(
                f"video: expected (batch, {VIDEO_CHANNELS}, {frames}, height, width) with "
                f"height and width multiples of {space}, got {shape}"
            )
        parts, new_state = [], ()
        if self.encoder is not None:
            latent, new_state = self.encoder(video, state, state_out)
            parts.append(latent)
        if self.linear is not None:
            parts.append(self.linear.to_latent(video, starts))
        return (sum(parts) - self.latent_mean) / self.latent_std, new_state

    def decode(self, latent: Tensor) -> Tensor:
        """Decodes a whole clip: the first latent frame makes one video frame, each later one
        four."""
        return self.decode_frame(latent)[0]

    def decode_frame(
        self,
        latent: Tensor,
        state: DecoderState | None = None,
        *,
        pixels: bool = False,
        state_out: DecoderState | None = None,
        last: int | None = None,
    ) -> tuple[Tensor, DecoderState]:
        """Decodes the next chunk of a stream, one latent frame or more: (video, state for the
        next).

        Args:
            state: None starts a stream. It is never written to, so an old state can be resumed
                twice. No gradient flows through it.
            pixels: Return uint8 video: [-1, 1] becomes 0 to 255.
            state_out: Tensors that receive the new state; `state` itself may be given.
            last: Latent frames at the end whose video is returned, None for all. Of the others
                only what these and the next state need is computed. Not at the start of a stream.
        """
        channels = self.config.latent_channels
        if latent.ndim != 5 or latent.shape[1] != channels or latent.shape[2] == 0:
            raise ValueError(
                f"latent: expected (batch, {channels}, time, height, width) with at least one "
                f"frame, got {tuple(latent.shape)}"
            )
        if last is not None and (state is None or not 1 <= last <= latent.shape[2]):
            raise ValueError(
                f"last: expected 1 to {latent.shape[2]} frames after a state, got {last} "
                f"{'without' if state is None else 'after'} one"
            )
        frames = None if last is None else last * self.config.time_factor
        # Channels last from here to the video, as tensor cores and oneDNN want them
        if self.config.decoder == "residual":
            latent = latent * self.latent_std + self.latent_mean
        latent = latent.contiguous(memory_format=LAST)
        if self.linear is None or self.config.lapped:
            return self.decoder(latent, state, pixels, state_out, frames)
        video, new_state = self.decoder(latent, state, state_out=state_out, last=frames)
        video = video + self.linear.to_video(last_frames(latent, last), starts=state is None)
        return to_bytes(video) if pixels else video, new_state
