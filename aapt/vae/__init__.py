"""The causal video autoencoder: configurations, the network, what a frame costs."""

from .config import VAEConfig, light, original, tiny, wan
from .cost import Work, decoder_work, flops_per_latent_frame, total
from .model import CausalVAE, DecoderState, to_bytes
from .stream import DecoderStream
from .wan_weights import load_wan

__all__ = [
    "CausalVAE",
    "DecoderState",
    "DecoderStream",
    "VAEConfig",
    "Work",
    "decoder_work",
    "flops_per_latent_frame",
    "light",
    "load_wan",
    "original",
    "tiny",
    "to_bytes",
    "total",
    "wan",
]
