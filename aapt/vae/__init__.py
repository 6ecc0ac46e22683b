"""The causal video autoencoder: configurations, the network, what a frame costs."""

from .autoencoder import CausalVAE, DecoderState, EncoderState
from .config import (
    VAEConfig,
    light,
    lighter,
    original,
    taehv,
    tiny,
    tiny_fine,
    tiny_light,
    wan,
    wan22,
)
from .cost import Work, decoder_work, flops_per_latent_frame, total
from .pixels import to_bytes
from .stream import DecoderStream
from .taehv_weights import load_taehv
from .wan_weights import load_wan

__all__ = [
    "CausalVAE",
    "DecoderState",
    "DecoderStream",
    "EncoderState",
    "VAEConfig",
    "Work",
    "decoder_work",
    "flops_per_latent_frame",
    "light",
    "lighter",
    "load_taehv",
    "load_wan",
    "original",
    "taehv",
    "tiny",
    "tiny_fine",
    "tiny_light",
    "to_bytes",
    "total",
    "wan",
    "wan22",
]
