"""Shapes of the autoencoder (docs/method.md#9): the paper's two decoders, the bundled one, Wan
2.1's and 2.2's."""

import math
from dataclasses import dataclass, replace

UPSAMPLES = ("nearest", "shuffle", "separate")


@dataclass(frozen=True)
class VAEConfig:
    """Shape of a `CausalVAE`. Tuples with one entry per scale begin at the finest
    (docs/method.md#9).

    With empty encoder tuples, the linear map is the whole encoder; without `linear_skip` there is
    none, and the autoencoder only decodes.
    """

    encoder_channels: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    encoder_blocks: tuple[int, ...]  # residual blocks per scale
    decoder_blocks: tuple[int, ...]
    strides: tuple[tuple[int, int], ...]  # (time, space) from each scale to the next coarser one
    latent_channels: int = 16
    patch_size: int = 1  # square of pixels folded into channels at the finest scale
    time_kernels: tuple[int, int] = (3, 3)  # of a residual block; the second also of other layers
    upsample: str = "nearest"  # kind of upsampling, see `layers.py`
    mid_attention: bool = False  # attention within each frame at the coarsest scale
    padding: str = "zeros"  # of convolutions, in space and before the first frame
    linear_skip: bool = False  # add a linear autoencoder (`LinearSkip`)
    lapped: bool = False  # decode from overlapping windows of latents (`Decoder.lapped`)
    latent_projection: bool = False  # a 1x1x1 convolution before the decoder
    norm_eps: float = 1e-6  # added to the mean square of a pixel's channels
    shortcuts: bool = False  # around the layers of each scale (`shortcuts.py`); "separate" alone
    decoder: str = "residual"  # or "memory", for TAEHV's kind (`memory.py`)
    decoder_strides: tuple[tuple[int, int], ...] = ()  # of the decoder; those of the encoder if ()

    def __post_init__(self):
        scales = len(self.strides) + 1
        for name in ("encoder_channels", "decoder_channels", "encoder_blocks", "decoder_blocks"):
            value = getattr(self, name)
            if name.startswith("encoder") and value == ():
                continue
            if len(value) != scales:
                raise ValueError(
                    f"{name}: expected {scales} scales for {scales - 1} strides, got {value}"
                )
        if self.lapped and not self.linear_skip:
            raise ValueError("lapped: expected False without linear_skip, got True")
        if self.upsample not in UPSAMPLES:
            raise ValueError(
                f"upsample: expected one of {', '.join(UPSAMPLES)}, got {self.upsample!r}"
            )

        if self.decoder not in ("residual", "memory"):
            raise ValueError(f"decoder: expected 'residual' or 'memory', got {self.decoder!r}")
        if self.decoder_strides and _product(self.decoder_strides) != _product(self.strides):
            raise ValueError(
                f"decoder_strides: expected {_product(self.strides)} in time and space, as the "
                f"encoder's, got {_product(self.decoder_strides)}"
            )

    @property
    def upscales(self) -> tuple[tuple[int, int], ...]:
        """(time, space) from each scale of the decoder to the next coarser one."""
        return self.decoder_strides or self.strides

    def without_encoder(self) -> "VAEConfig":
        """Returns the shape of the decoder alone."""
        return replace(self, encoder_channels=(), encoder_blocks=())

    @property
    def time_factor(self) -> int:
        """Video frames per latent frame after the first."""
        return _product(self.strides)[0]

    @property
    def space_factor(self) -> int:
        """Video pixels per latent pixel, per axis."""
        return self.patch_size * _product(self.strides)[1]


def _product(strides: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Returns the factors in time and in space of all strides together."""
    return math.prod(time for time, _ in strides), math.prod(space for _, space in strides)


def original() -> VAEConfig:
    """The paper's full decoder: three residual blocks per scale (docs/method.md#9)."""
    return VAEConfig(
        encoder_channels=(128, 256, 512, 512),
        decoder_channels=(128, 256, 512, 512),
        encoder_blocks=(2, 2, 2, 2),
        decoder_blocks=(3, 3, 3, 3),
        strides=((2, 2), (2, 2), (1, 2)),
        mid_attention=True,
    )


def lighter(config: VAEConfig) -> VAEConfig:
    """A cheaper decoder as in the paper (docs/method.md#9): half the channels at every scale but
    the coarsest, and one residual block less at every scale with several."""
    *finer, coarsest = config.decoder_channels
    return replace(
        config,
        decoder_channels=(*(channels // 2 for channels in finer), coarsest),
        decoder_blocks=tuple(blocks - (blocks > 1) for blocks in config.decoder_blocks),
    )


def light() -> VAEConfig:
    """The paper's light decoder with the original encoder: [64, 128, 256, 512], two residual blocks
    per scale."""
    return lighter(original())


def wan(base: int = 96, decoder_base: int | None = None) -> VAEConfig:
    """Wan 2.1's autoencoder (arXiv 2503.20314), in the shape of its published weights (`load_wan`).

    base, decoder_base: channels at the finest scale; the decoder's are the encoder's by default.
    """
    multiples = (1, 2, 4, 4)
    return VAEConfig(
        encoder_channels=tuple(base * n for n in multiples),
        decoder_channels=tuple((decoder_base or base) * n for n in multiples),
        encoder_blocks=(2, 2, 2, 2),
        decoder_blocks=(3, 3, 3, 3),
        strides=((1, 2), (2, 2), (2, 2)),
        upsample="separate",
        mid_attention=True,
        latent_projection=True,
        norm_eps=1e-24,
    )


def wan22(base: int = 160, decoder_base: int = 256) -> VAEConfig:
    """Wan 2.2's autoencoder, in the shape of its published weights: 48 channels per 16x16 pixels.

    It is `wan` on squares of 2x2 pixels, with shortcuts around its scales.
    """
    return replace(wan(base, decoder_base), latent_channels=48, patch_size=2, shortcuts=True)


def taehv(latent_channels: int = 16, patch_size: int = 1) -> VAEConfig:
    """TAEHV's decoder alone, in the shape of its published weights (`load_taehv`): 16 channels for
    Wan 2.1, 48 on squares of 2x2 pixels for Wan 2.2."""
    return VAEConfig(
        encoder_channels=(),
        decoder_channels=(64, 64, 128, 256),
        encoder_blocks=(),
        decoder_blocks=(0, 3, 3, 3),
        strides=((2, 2), (2, 2), (1, 2)),
        latent_channels=latent_channels,
        patch_size=patch_size,
        decoder="memory",
    )


def tiny() -> VAEConfig:
    """The bundled world's autoencoder: real time on two CPU cores at 128x80.

    The encoder is linear, the principal components of the world's patches. The decoder's network
    adds what neighbouring pixels and past frames tell.
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


def tiny_light() -> VAEConfig:
    """The bundled world's decoder for streaming, with less than half the work of `tiny`.

    A linear map from overlapping windows of latents shows few cells, and a network learns the rest.
    """
    return replace(
        tiny(),
        decoder_channels=(24, 64, 96),
        decoder_blocks=(0, 1, 1),
        padding="replicate",
        lapped=True,
    )


def tiny_fine() -> VAEConfig:
    """An autoencoder for the bundled world with four times the latents of `tiny`: cells of 4x4
    pixels.

    The encoder is linear, and the decoder is lapped as that of `tiny_light`.
    """
    return replace(
        tiny_light(), decoder_channels=(32, 64), decoder_blocks=(1, 1), strides=((4, 1),)
    )
