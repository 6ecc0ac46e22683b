"""Two-pass student forcing against back-propagation through the cached rollout, docs/method.md#8.

`python benchmarks/student_forcing.py [--json]` measures one generator update by time and by peak
memory, with and without activation checkpointing. All ways use one model and one set of clips. Each
way runs in a process of its own, because memory that a process once held cannot be told from memory
it needs. The time is the best of several updates.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aapt.environment import environment
from aapt.model.layers import Residual, StreamWeights
from aapt.model.mmdit import MMDiT
from aapt.model.rope import Rotation
from aapt.model.transformer import VideoTransformer, clean
from aapt.streaming.student import StudentRollout
from aapt.training.forcing import parallel_pass
from aapt.training.recipes import tiny_world
from aapt_kernels import qk_norm_rope

WAYS = ("recurrent", "recurrent, checkpointed", "two-pass", "two-pass, checkpointed")
SIZE = (10, 16)  # latent height and width
REPEATS = 3


def attend(
    stream: StreamWeights, video: Tensor, modulation: Tensor, rotation: Rotation, *past: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One block on one frame: past is keys, then values, of what the frame sees before itself."""
    shared = stream.modulation(modulation)
    _, normed = Residual(video).norm(*shared[:2])
    q, k, v = stream.project(normed).unbind(2)
    q, k = qk_norm_rope(q, k, stream.q_norm, stream.k_norm, rotation.cos, rotation.sin, eps=1e-6)
    count = len(past) // 2
    keys, values = torch.cat([*past[:count], k], 1), torch.cat([*past[count:], v], 1)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values)))
    return stream.mix(video, out.transpose(1, 2), shared).sum(), k, v


def recurrent_pass(
    model: VideoTransformer, noise: Tensor, first: Tensor, condition: Tensor, text: Tensor
) -> Tensor:
    """The rollout itself with gradient: every frame attends to keys and values that carry it."""
    t = noise.new_ones(len(noise))
    words = model.encode_text(text, torch.full((len(text),), text.shape[1]), t)
    past = [([k], [v]) for k, v in words]
    embedded, modulation, _ = model.modulations(t)
    latent, outputs = first, []
    for index in range(noise.shape[2]):
        frame = torch.tensor([index])
        rotation = model.positions(frame, model.config.token_grid(*SIZE))
        x, driven = noise[:, :, [index]], condition[:, :, [index]]
        video = model.patchify(x, latent, driven, frame)
        for block, (keys, values) in zip(model.blocks, past, strict=True):
            inputs = (block.video, video, modulation, rotation, *keys, *values)
            if model.checkpoint_blocks:
                video, k, v = checkpoint(attend, *inputs, use_reentrant=False)
            else:
                video, k, v = attend(*inputs)
            keys.append(k)
            values.append(v)
            if index > model.config.window_frames:  # text and the first frame stay
                del keys[2], values[2]
        modulation = model.output_modulation(embedded)
        output = model.unpatchify(Residual(video), modulation, (1, *SIZE))
        outputs.append(clean(model.config, output, x, latent, t))
        latent = outputs[-1].detach()
    return torch.cat(outputs, dim=2)


def two_passes(
    model: VideoTransformer, noise: Tensor, first: Tensor, condition: Tensor, text: Tensor
) -> Tensor:
    text_lens = torch.full((len(text),), text.shape[1])
    rollout = StudentRollout(model, text, text_lens, first)
    return parallel_pass(model, rollout.roll(noise, condition), text, text_lens)


def measure(way: str, batch: int, frames: int) -> dict[str, float]:
    """Seconds and peak bytes of one update, and the norm of its gradient."""
    torch.manual_seed(0)
    # An absolute distance leaves one query per token to the recurrent way, which is then SDPA.
    config = replace(tiny_world().model, sink_distance="absolute")
    model = MMDiT(config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model.checkpoint_blocks = way.endswith("checkpointed")
    forward = recurrent_pass if way.startswith("recurrent") else two_passes
    noise = torch.randn(batch, config.latent_channels, frames, *SIZE)
    condition = torch.randn(batch, config.condition_channels, frames, *SIZE)
    text = torch.randn(batch, config.text_tokens, config.text_width)
    seconds = []
    peaks = []
    for _ in range(REPEATS):
        model.zero_grad()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        forward(model, noise, noise[:, :, :1], condition, text).square().mean().backward()
        seconds.append(time.perf_counter() - start)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt()
    return {"seconds": min(seconds), "bytes": 1024 * peaks[0], "gradient": norm.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given.batch, given.frames)))
        return
    results = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way]
        command += ["--batch", str(given.batch), "--frames", str(given.frames)]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        results[way] = json.loads(run.stdout)
    if given.json:
        shape = {"batch": given.batch, "frames": given.frames}
        print(json.dumps({**shape, "results": results, **environment()}, indent=2))
        return
    for way, result in results.items():
        pair = results[WAYS[0] if way in WAYS[::2] else WAYS[1]]
        print(
            f"{way:26} {result['seconds']:6.2f} s ({result['seconds'] / pair['seconds']:.2f}x)  "
            f"{result['bytes'] / 2**20:6.0f} MiB ({result['bytes'] / pair['bytes']:.2f}x)  "
            f"gradient {result['gradient']:.5f}"
        )


if __name__ == "__main__":
    main()
