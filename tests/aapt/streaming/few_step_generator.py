"""Small few-step generators, their forms, and a walk in one."""

import dataclasses

import torch

from aapt import StreamingGenerator
from aapt.model.config import FewStepConfig
from aapt.model.world_model import WorldModel
from aapt.vae import CausalVAE

from ..helpers import WAN, wan_transformer
from .test_generator import HEIGHT, VAE, WIDTH

SAMPLING = FewStepConfig((1.0, 0.5), first_times=(1.0, 0.75, 0.5))
# chunk, first chunk, sink, window
FORMS = [(1, None, 1, 3), (3, None, 3, 5), (3, 1, 2, 4)]


def build(chunk, first, sink, window, sampling=SAMPLING, **changes) -> StreamingGenerator:
    sizes = dict(chunk=chunk, first_chunk=first, sink_frames=sink, window_frames=window)
    torch.manual_seed(0)
    model = WorldModel(dataclasses.replace(WAN, **sizes, **changes), None)
    model.transformer = wan_transformer(**sizes, **changes)
    model, vae = model.float(), CausalVAE(VAE)
    return StreamingGenerator(
        model, vae, height=HEIGHT, width=WIDTH, fps=16, prompts=["ab"], sampling=sampling
    )
