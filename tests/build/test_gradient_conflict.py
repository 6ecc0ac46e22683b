"""The split of gradients by the frame that asks, against autograd with keys and values detached."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from aapt.checkpoint import BUNDLED, save_module
from aapt.model.discriminator import Discriminator
from aapt.model.world_model import WorldModel
from aapt.streaming.generator import StreamingGenerator
from aapt.training.losses import generator_loss

ROOT = Path(__file__).parents[2]
FRAMES = 5  # more than the window of the small model


@pytest.fixture
def conflict(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.gradient_conflict")


@pytest.fixture
def helpers(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("tests.aapt.helpers")


def inputs(helpers, model, batch):
    """The arguments of a pass over FRAMES frames, and what a loss asks of its result."""
    noise, recycled, asked = (helpers.latents(FRAMES, batch) for _ in range(3))
    conditions = model.conditions(
        helpers.controls(FRAMES, batch), helpers.PROMPTS[:batch], helpers.SIZE
    )
    time = noise.new_ones(batch)
    return (noise, recycled, *(c.detach() for c in conditions), time), asked


def own_frame_alone(attend, count):
    """Attention in which gradient reaches a frame's keys and values from that frame alone."""

    def attention(q, k, v, layout, **options):
        text, tokens = layout.text_tokens, layout.tokens_per_frame
        whole = attend(q, k, v, layout, **options)
        rows = [whole[:, :text]]
        for frame in range(count):
            here = slice(text + frame * tokens, text + (frame + 1) * tokens)
            seen = []
            for part in (k, v):
                alone = part.detach().clone()
                alone[:, here] = part[:, here]
                seen.append(alone)
            rows.append(attend(q, *seen, layout, **options)[:, here])
        return torch.cat(rows, dim=1)

    return attention


@pytest.mark.parametrize("changes", [{}, {"window_frames": FRAMES}, {"sink_distance": "absolute"}])
def test_parts_are_those_of_autograd(conflict, helpers, monkeypatch, changes):
    """Detached keys and values of other frames leave the own part; the rest is the later part."""
    from aapt.model import layers

    model = helpers.tiny_model(**changes)
    given, asked = inputs(helpers, model, batch=2)
    weights = [
        getattr(block.video, name).weight
        for block in model.transformer.blocks
        for name in conflict.LAYERS
    ]
    whole = torch.autograd.grad((model.transformer(*given) * asked).sum(), weights)
    with monkeypatch.context() as patched:
        alone = own_frame_alone(layers.block_causal_attention, FRAMES)
        patched.setattr(layers, "block_causal_attention", alone)
        own = torch.autograd.grad((model.transformer(*given) * asked).sum(), weights)

    recorded = [layer for block in conflict.record(model) for layer in block.values()]
    found = conflict.split_gradients(recorded, model.transformer(*given), asked)
    last_block = len(weights) - len(conflict.LAYERS)
    for place, (parts, total, alone) in enumerate(zip(found, whole, own, strict=True)):
        torch.testing.assert_close(parts.own, alone.flatten(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(parts.own + parts.later, total.flatten(), rtol=1e-9, atol=1e-12)
        # After the last block's keys and values no later frame reads anything.
        reaches_later = place <= last_block  # qkv comes first
        assert bool(parts.later.abs().max() > 1e-6) == reaches_later


def test_families_join_the_rows_of_one_block(conflict):
    """Keys and values are the last two thirds of qkv; attention is qkv and out."""
    parts = {
        name: conflict.Parts(torch.arange(6.0) + 10 * place, torch.ones(6))
        for place, name in enumerate(conflict.LAYERS)
    }
    joined = conflict.families(parts)
    assert joined["keys and values"].own.tolist() == [2, 3, 4, 5]
    assert joined["attention"].own.tolist() == [*range(6), *range(10, 16)]
    assert joined["MLP"].own.tolist() == [*range(20, 26), *range(30, 36)]


def test_conflict_over_clips(conflict):
    """Two clips at 60 and 180 degrees, and what one update of both sees."""
    half, root = 0.5, 3**0.5 / 2
    one = conflict.Parts(torch.tensor([1.0, 0.0]), torch.tensor([2 * half, 2 * root]))
    other = conflict.Parts(torch.tensor([0.0, 1.0]), torch.tensor([0.0, -3.0]))
    found = conflict.Conflict.of([one, other])
    assert found.cosine == pytest.approx((0.5 - 1) / 2)
    assert found.negative == 1
    # Own parts add to (1, 1), later ones to (1, sqrt(3) - 3).
    later = 3**0.5 - 3
    assert found.together == pytest.approx((1 + later) / (2 * (1 + later**2)) ** 0.5)
    assert found.ratio == pytest.approx(((1 + later**2) / 2) ** 0.5)


def test_nothing_asked_is_no_cosine(conflict):
    """Weights that later frames ask nothing of have neither a cosine nor a conflict."""
    found = conflict.Conflict.of([conflict.Parts(torch.ones(3), torch.zeros(3))])
    assert found == conflict.Conflict(cosine=None, negative=0, together=None, ratio=0.0)


def test_command_measures_the_bundled_model(conflict, monkeypatch, capsys):
    """A short walk of the bundled model prints a line per block and one of all."""
    command = ["gradient_conflict", "tiny-world", "--clips", "1", "--frames", "3"]
    monkeypatch.setattr("sys.argv", command)
    conflict.main()
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "tiny-world: 1 clips of 3 latent frames, squared error"
    assert [line.split()[0] for line in lines[3:]] == [*"123456", "all"]
    assert lines[8].split()[-4:] == ["-"] * 4  # nothing reads the MLP of the last block


def test_a_judge_asks_by_its_logits(conflict, tmp_path):
    """The gradient of the adversarial loss, against a step along it."""
    generator = StreamingGenerator.from_pretrained(BUNDLED / "tiny-world", "cpu", torch.float32)
    generator.model.requires_grad_(True)
    torch.manual_seed(0)
    file = tmp_path / "discriminator.safetensors"
    save_module(file, Discriminator(WorldModel(generator.model.config, generator.model.camera)))
    judge = conflict.load_judge(file, generator.model)
    start = conflict.held_out_starts(1, 3, 0)[0]
    frames, asked = conflict.student_forced(generator, generator.model, start, 0, 0, judge)
    _, by_error = conflict.student_forced(generator, generator.model, start, 0, 0)
    assert asked.shape == frames.shape == by_error.shape and asked.norm() > 1e-2
    losses = []
    for step in (-0.05, 0.05):
        moved = frames.detach() + step * asked / asked.norm()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conflict, "parallel_pass", lambda *_, x=moved: x.requires_grad_())
            patch.setattr(conflict, "generator_loss", kept(losses))
            conflict.student_forced(generator, generator.model, start, 0, 0, judge)
    slope = (losses[1] - losses[0]) / 0.1
    assert slope == pytest.approx(float(asked.norm()), rel=0.02)


def kept(losses):
    """The loss of the generator, which is noted in `losses` too."""

    def loss(*arguments):
        made = generator_loss(*arguments)
        losses.append(float(made.detach()))
        return made

    return loss


def test_frames_of_one_step_have_no_order(conflict, helpers):
    """Frames that are made together ask of one another both ways."""
    model = helpers.tiny_model(window_frames=4, chunk=2, block="wan", recycle=False)
    with pytest.raises(ValueError, match="chunk: expected a model of one frame per step, got 2"):
        conflict.record(model)
