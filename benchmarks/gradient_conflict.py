"""Do later frames ask of shared weights the opposite of what a frame asks for itself?

SGF+ (arXiv 2610.10429, section 3.2) splits the gradient of a weight by the role of its tokens,
writing context or denoising, and finds a negative cosine between the parts. In AAPT one token has
both roles: its output is a frame, and its keys and values are what later frames read. So the
gradient is split by the frame that asks. The "own" part reaches a token from its own frame, the
"later" part from frames after it, through keys and values alone. Together they are the gradient.

    python -m benchmarks.gradient_conflict tiny-world random --clips 24 --frames 30

prints, per block, the mean cosine over clips, the number of clips in which it is negative, the
cosine of the gradients of all clips together, and the norm of the later part over that of the own
one. The loss is the squared error of student-forced rollouts against held-out walks, or with
`--judge FILE` the adversarial loss of the discriminator in FILE, which an adversarial stage of
`aapt train` leaves beside its weights. `random` is a model like the first one, with weights that
training starts from.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt.checkpoint import load_module
from aapt.environment import environment
from aapt.evaluate.world_scenes import Start, held_out_starts, render_truth
from aapt.model.discriminator import Discriminator
from aapt.model.world_model import WorldModel
from aapt.streaming.generator import StreamingGenerator
from aapt.streaming.student import StudentRollout
from aapt.training.forcing import parallel_pass
from aapt.training.losses import generator_loss
from aapt.vae.pixels import to_video

RANDOM = "random"
LAYERS = ("qkv", "out", "mlp_up", "mlp_down")
FAMILIES = ("keys and values", "attention", "MLP")


class Recorded(nn.Linear):
    """A linear layer that takes over the parameters of `layer` and keeps its last input and output.

    Attributes:
        tokens: (B, L, in).
        products: (B, L, out), before the bias is added.
    """

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) + self.bias

    def product(self, x: Tensor) -> Tensor:
        self.tokens, self.products = x.detach(), F.linear(x, self.weight)
        return self.products


@dataclass(frozen=True)
class Parts:
    """The two parts of a weight's gradient, or of several weights': flat vectors of one length."""

    own: Tensor
    later: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Parts"]) -> "Parts":
        return cls(torch.cat([p.own for p in parts]), torch.cat([p.later for p in parts]))

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the parts; None if one of them is zero."""
        norms = self.own.norm() * self.later.norm()
        return (self.own @ self.later / norms).item() if norms else None

    @property
    def ratio(self) -> float | None:
        """Norm of the later part over that of the own one; None if the own one is zero."""
        own = self.own.norm()
        return (self.later.norm() / own).item() if own else None


@dataclass(frozen=True)
class Conflict:
    """How the parts of some weights' gradients lie to each other, over clips.

    Attributes:
        cosine: Mean of the clips' cosines; None if later frames ask nothing of these weights.
        negative: Number of clips with a negative cosine.
        together: Cosine of the parts summed over the clips, as one update sees them.
        ratio: Norm of the later part over that of the own one, both summed over the clips.
    """

    cosine: float | None
    negative: int
    together: float | None
    ratio: float | None

    @classmethod
    def of(cls, clips: Sequence[Parts]) -> "Conflict":
        cosines = [cosine for parts in clips if (cosine := parts.cosine) is not None]
        own, later = (sum(getattr(parts, name) for parts in clips) for name in ("own", "later"))
        together = Parts(own, later)
        return cls(
            cosine=sum(cosines) / len(cosines) if cosines else None,
            negative=sum(cosine < 0 for cosine in cosines),
            together=together.cosine,
            ratio=together.ratio,
        )


def record(model: WorldModel) -> list[dict[str, Recorded]]:
    """Replace the linear layers that video tokens pass in each block by recorded ones.

    Returns them by name, block by block. Weights then have gradients. ValueError for a model that
    makes several frames per step, because these ask of one another.
    """
    if model.config.chunk != 1:
        raise ValueError(f"chunk: expected a model of one frame per step, got {model.config.chunk}")
    model.requires_grad_(True)
    blocks = []
    for block in model.transformer.blocks:
        recorded = {name: Recorded(getattr(block.video, name)) for name in LAYERS}
        for name, layer in recorded.items():
            setattr(block.video, name, layer)
        blocks.append(recorded)
    return blocks


def split_gradients(layers: Sequence[Recorded], frames: Tensor, asked: Tensor) -> list[Parts]:
    """Split the gradient of every layer's weight by the frame that asks.

    Args:
        layers: Layers that the pass has just gone through, with one run of L / T tokens per frame.
        frames: The result of the pass, (B, C, T, H, W), with its graph.
        asked: Gradient of the loss with respect to `frames`.

    One backward pass per frame. Returns per layer the parts (out * in).
    """
    count = frames.shape[2]
    products = [layer.products for layer in layers]
    own, later = ([torch.zeros_like(layer.weight) for layer in layers] for _ in range(2))
    for frame in range(count):
        score = (frames[:, :, frame] * asked[:, :, frame]).sum()
        errors = torch.autograd.grad(score, products, retain_graph=frame + 1 < count)
        for place, (layer, error) in enumerate(zip(layers, errors, strict=True)):
            run = error.shape[1] // count
            here, before = slice(frame * run, (frame + 1) * run), slice(0, frame * run)
            for total, rows in ((own, here), (later, before)):
                total[place] += torch.einsum("blo,bli->oi", error[:, rows], layer.tokens[:, rows])
    return [Parts(a.flatten(), b.flatten()) for a, b in zip(own, later, strict=True)]


def families(parts: Mapping[str, Parts]) -> dict[str, Parts]:
    """Join the parts of one block's layers, by name, to those of each of FAMILIES."""
    qkv = parts["qkv"]
    third = len(qkv.own) // 3  # queries are the first rows
    written = Parts(qkv.own[third:], qkv.later[third:])
    members = (
        [written],
        [qkv, parts["out"]],
        [parts["mlp_up"], parts["mlp_down"]],
    )
    return {name: Parts.joined(each) for name, each in zip(FAMILIES, members, strict=True)}


def measure(
    generator: StreamingGenerator,
    model: WorldModel,
    starts: Sequence[Start],
    seed: int,
    judge: Discriminator | None = None,
) -> dict[str, dict[str, Conflict]]:
    """Measure a model on walks, one at a time: conflicts by family, then by block and "all".

    The generator gives the autoencoder and the size.
    """
    blocks = record(model)
    names = [str(number + 1) for number in range(len(blocks))]
    found: dict[str, dict[str, list[Parts]]] = {
        family: {name: [] for name in (*names, "all")} for family in FAMILIES
    }
    layers = [layer for block in blocks for layer in block.values()]
    for number, start in enumerate(starts):
        frames, asked = student_forced(generator, model, start, seed, number, judge)
        split = split_gradients(layers, frames, asked)
        groups = [split[at : at + len(LAYERS)] for at in range(0, len(split), len(LAYERS))]
        joined = [families(dict(zip(LAYERS, group, strict=True))) for group in groups]
        for family in FAMILIES:
            parts = [block[family] for block in joined]
            for name, each in zip((*names, "all"), (*parts, Parts.joined(parts)), strict=True):
                found[family][name].append(each)
    return {
        family: {name: Conflict.of(clips) for name, clips in rows.items()}
        for family, rows in found.items()
    }


def student_forced(
    generator: StreamingGenerator,
    model: WorldModel,
    start: Start,
    seed: int,
    number: int,
    judge: Discriminator | None = None,
) -> tuple[Tensor, Tensor]:
    """Roll a model out along a walk and compute the rollout again with gradient.

    Returns the frames (1, C, T, h, w) and the gradient of their loss: the squared error against the
    walk, or the judge's relativistic loss.
    """
    truth = render_truth([start], range(len(start.poses)), generator.height, generator.width)
    with torch.no_grad():
        latents = generator.vae.encode(to_video(truth.pixels).to(generator.vae.latent_mean))
        conditions = model.conditions(start.controls[None], [start.prompt], latents.shape[-2:])
    numbers = torch.Generator().manual_seed((seed << 20) + number)
    noise = torch.randn(latents[:, :, 1:].shape, generator=numbers)
    rollout = StudentRollout(model.transformer, *conditions[1:], latents[:, :, :1])
    segment = rollout.roll(noise, conditions.condition)
    frames = parallel_pass(model.transformer, segment, *conditions[1:])
    if judge is None:
        loss = F.mse_loss(frames, latents[:, :, 1:])
    else:
        time = torch.rand(1, generator=numbers)
        words = judge.world.text_encoder([start.prompt])
        on_real, on_fake = (
            judge(x, torch.cat([latents[:, :, :1], x[:, :, :-1]], 2), conditions[0], *words, time)
            for x in (latents[:, :, 1:], frames)
        )
        loss = generator_loss(on_real, on_fake, "relativistic")
    (asked,) = torch.autograd.grad(loss, frames, retain_graph=True)
    return frames, asked


def load_judge(file: Path, like: WorldModel) -> Discriminator:
    """Load a discriminator with one logit per frame, of a model like `like`."""
    judge = Discriminator(WorldModel(like.config, like.camera))
    load_module(file, judge)
    return judge.eval()


def first_weights(like: WorldModel, seed: int) -> WorldModel:
    """Draw a model's first weights; those that training starts at zero get a deviation of 0.02.

    Behind a weight of zero there would be no gradient.
    """
    torch.manual_seed(seed)
    model = WorldModel(like.config, like.camera)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a folder or a bundled model")
    parser.add_argument("others", nargs="*", help=f"more of them, or {RANDOM!r}")
    parser.add_argument("--clips", type=int, default=12, help="walks, each measured alone")
    parser.add_argument("--frames", type=int, default=16, help="latent frames of a walk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", type=Path, metavar="FILE", help="weights of a discriminator")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    starts = held_out_starts(given.clips, given.frames, given.seed)
    load = StreamingGenerator.from_pretrained
    first = load(given.checkpoint, "cpu", torch.float32)
    random = first_weights(first.model, given.seed)
    judge = given.judge and load_judge(given.judge, first.model)
    results = {given.checkpoint: measure(first, first.model, starts, given.seed, judge)}
    for name in given.others:
        generator = first if name == RANDOM else load(name, "cpu", torch.float32)
        model = random if name == RANDOM else generator.model
        results[name] = measure(generator, model, starts, given.seed, judge)
    if given.json:
        plain = {
            name: {
                family: {block: asdict(conflict) for block, conflict in rows.items()}
                for family, rows in found.items()
            }
            for name, found in results.items()
        }
        settings = {"clips": given.clips, "frames": given.frames, "seed": given.seed}
        settings["judge"] = given.judge and str(given.judge)
        print(json.dumps({**settings, "results": plain, **environment()}, indent=2))
        return
    for name, found in results.items():
        loss = f"adversarial loss of {given.judge}" if given.judge else "squared error"
        print(f"\n{name}: {given.clips} clips of {given.frames} latent frames, {loss}")
        print(f"{'block':6}" + "".join(f"{family:^34}" for family in FAMILIES))
        print(" " * 6 + f"{'cosine':>9}{'< 0':>7}{'together':>10}{'ratio':>8}" * len(FAMILIES))
        for block in found[FAMILIES[0]]:
            print(f"{block:6}" + "".join(_cells(found[family][block]) for family in FAMILIES))


def _cells(conflict: Conflict) -> str:
    if conflict.cosine is None:
        return f"{'-':>9}{'-':>7}{'-':>10}{'-':>8}"
    return (
        f"{conflict.cosine:9.3f}{conflict.negative:7d}{conflict.together:10.3f}"
        f"{conflict.ratio:8.2f}"
    )


if __name__ == "__main__":
    main()
