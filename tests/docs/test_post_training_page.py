"""docs/post-training.md: every command in its order, on random weights and small videos."""

import contextlib
import json
import re
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from aapt.checkpoint import load_config, read_tensors, save_config
from aapt.commands.app import main
from aapt.model import umt5
from aapt.runs.plan import plan
from aapt.training import recipes
from aapt.training.recipe_file import changed
from aapt.vae import CausalVAE, VAEConfig
from aapt.vae.folder import LIGHT, save_vaes

from ..aapt.convert.plain_native import random_weights
from ..aapt.data.videos.test_trajectories import trajectory, yawed
from ..aapt.data.videos.videos import video
from .test_pages import ROOT, blocks

PAGE = ROOT / "docs" / "post-training.md"
SIZE, CHANNELS, SPACE_FACTOR = "48x32", 4, 4
WIDTH = 24  # of UMT5's embeddings
SHAPE = {"width": 128, "heads": 1, "depth": 3, "mlp_width": 48, "text_width": WIDTH}
NAMES = ("wan-1.3b", "wan-1.3b-matched", "wan-1.3b-camera", "wan-1.3b-one-step", "wan-5b")
# What a small run writes in place of the page's words.
IN_SMALL = {
    "832x480": SIZE,
    "1280x704": SIZE,
    "--seconds 5 ": "--seconds 1.5 ",
    "--seconds 20": "--seconds 1.5",
    "--device cuda": "--device cpu",
    "--context 2": "--context 1",
    "--gpus 8": "--gpus 2",
    "steps = 800": "steps = 1",
    "steps=200": "steps=1",
    "bench stream": "bench stream --steps 2",
}
DOWNLOADS = ("pip install", "hf download")


def in_small(text: str) -> str:
    for words, fewer in IN_SMALL.items():
        text = text.replace(words, fewer)
    return text


def commands() -> list[list[str]]:
    """The words of the page's commands, and for `torchrun` those of one process."""
    lines = "\n".join(blocks(PAGE, {""})).replace("\\\n", " ").splitlines()
    lines = [line for line in lines if line and not line.startswith(DOWNLOADS)]
    return [shlex.split(re.sub(r"^torchrun \S+ \d+ -m ", "", in_small(line))) for line in lines]


def small(make):
    """The recipe with few updates of few clips of 6 latent frames after the first."""
    recipe, stages = make(), {}
    for name, stage in recipe.stages.items():
        if hasattr(stage, "curriculum"):
            sources = [{"clips": SIZE, "frames": 6}]
            stages[name] = {
                "curriculum": {"phases": [{"steps": 1, "batch": 2, "sources": sources}]}
            }
        else:
            stages[name] = {"clips": SIZE, "steps": 1, "batch": 2, "segment_frames": 6}
            if getattr(stage, "segments", 1) > 1:
                stages[name] |= {"segment_frames": 5, "overlap_frames": 2}
    model = {**SHAPE, "latent_channels": CHANNELS}
    table = {"model": model, "stages": stages, "space_factor": SPACE_FACTOR}
    return lambda: changed(recipe, table)


def save_weights(path, entry=None, seed=0):
    torch.manual_seed(seed)
    sizes = {"width": SHAPE["width"], "depth": SHAPE["depth"], "hidden": SHAPE["mlp_width"]}
    made = random_weights(**sizes, text=WIDTH, channels=CHANNELS)
    weights = {name: tensor.float() for name, tensor in made.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({entry: weights}, path) if entry else save_file(weights, path)


def save_videos(folder, count):
    noise = np.random.default_rng(count).integers(0, 255, (count, 4, 6, 3), dtype=np.uint8)
    cameras = trajectory([yawed(0.02 * n, (0.0, 0.0, 0.03 * n)) for n in range(28)], fps=14)
    folder.mkdir()
    for number, still in enumerate(noise):
        frames = [np.roll(still, n // 2, axis=1).repeat(8, 0).repeat(8, 1) for n in range(28)]
        (folder / f"{number}.mkv").write_bytes(video(frames, rate=14))
        (folder / f"{number}.txt").write_text("a fox in snow" if number % 2 else "the sea at noon")
        (folder / f"{number}.camera.txt").write_text(cameras)


class PlainUMT5(torch.nn.Module):
    """Stands for UMT5, which tests/aapt/model/test_umt5.py compares: a table of words."""

    def __init__(self):
        super().__init__()
        table = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
        self.table = torch.nn.Parameter(table)

    def forward(self, ids):
        return SimpleNamespace(last_hidden_state=self.table[ids])


def read_plain(path, kind, *arguments, **options):
    def tokenize(prompt, **options):
        ids = [2 + sum(map(ord, word)) % 62 for word in prompt.split()] + [1]
        return SimpleNamespace(input_ids=torch.tensor([ids]))

    return tokenize if kind == "AutoTokenizer" else PlainUMT5()


@contextlib.contextmanager
def in_place(place):
    """Makes the page's downloads, random and small, in a folder, which becomes the current one; its
    recipes are small, and its text encoder is a table."""
    for model in ("Wan2.1", "Wan2.2"):
        save_weights(place / model / "transformer/diffusion_pytorch_model.safetensors")
        for part in ("text_encoder", "tokenizer"):
            (place / model / part).mkdir()
    save_weights(place / "cf/causal-forcing++/framewise-1step.pt", "generator_ema", seed=1)
    save_weights(place / "cf/framewise/ar_diffusion.pt", "generator_ema", seed=2)
    torch.manual_seed(0)
    ones = (1, 1, 1)
    vae = CausalVAE(VAEConfig((8, 8, 8), (8, 8, 8), ones, ones, ((2, 2), (2, 2)), CHANNELS))
    for model in ("Wan2.1", "Wan2.2"):
        save_config(place / model / "vae", save_vaes(place / model / "vae", {LIGHT: vae}))
    for name, count in (("videos", 3), ("others", 16), ("realestate", 3)):
        save_videos(place / name, count)
    (recipe,) = blocks(PAGE, {"toml"})
    (place / "foxes.toml").write_text(in_small(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(umt5, "_reading", read_plain)
        patch.setattr(umt5, "clean_prompt", str.strip)  # without ftfy
        for name in NAMES:
            patch.setitem(recipes.RECIPES, name, small(recipes.RECIPES[name]))
        yield


def run(lines):
    for words in lines:
        assert words[0] == "aapt"
        assert main(words[1:]) == 0, words


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder where all commands of the page have run, in order."""
    place = tmp_path_factory.mktemp("page")
    with in_place(place):
        run(commands())
    return place


def test_all_roads_make_a_model_of_one_pass(place):
    for name in (*NAMES, "foxes"):
        folder = place / "runs" / name / name
        config = load_config(folder)
        large = name == "wan-5b"
        assert (config["fps"], config["width"], config["height"]) == (24 if large else 16, 48, 32)
        assert config["text"] == str((place / ("Wan2.2" if large else "Wan2.1")).resolve())
        assert config["converted"]["licence"] == "Apache-2.0" and config["sampling"] is None
        assert bool(config["camera"]) == name.endswith("camera")


def test_stages_run_in_the_order_of_the_page(place):
    page = PAGE.read_text()
    (listed,) = re.findall(r"\| `wan-1.3b` \|[^|]*\|([^|]*)\|", page)
    stages = re.findall(r"([a-z]+) (\d+)", listed)
    known = recipes.wan_1_3b().stages
    updates = {n: getattr(s, "curriculum", s).steps for n, s in known.items()}
    assert [(name, str(count)) for name, count in updates.items()] == stages
    assert {path.name for path in (place / "runs/wan-1.3b").iterdir() if path.is_dir()} == {
        *known,
        "wan-1.3b",
    }


def test_hours_are_those_of_the_plan():
    page = PAGE.read_text()
    for name in NAMES:
        (hours,) = re.findall(rf"\| `{name}` \|.*\| (\d+) \|\n", page)
        recipe, seconds = recipes.RECIPES[name](), 0.0
        for planned in plan(recipe, 8):
            stage = recipe.stages[planned.workload.stage]
            updates = getattr(stage, "curriculum", stage).steps
            seconds += updates * getattr(stage, "critic_updates", 1) * planned.seconds()
        assert int(hours) == pytest.approx(seconds / 3600, rel=0.05), name


def test_the_short_cut_starts_both_networks_from_their_weights(place):
    record = json.loads((place / "runs/wan-1.3b-one-step/inputs.json").read_text())
    for name, folder in (("weights", "cf-1step"), ("discriminator_weights", "cf-diffusion")):
        assert record[name]["file"] == f"{folder}/model.safetensors"
    name = "transformer.blocks.0.cross.q.weight"
    diffusion = read_tensors(place / "cf-diffusion/model.safetensors")[name]
    generator = read_tensors(place / "cf-1step/model.safetensors")[name]
    trained = read_tensors(place / "runs/wan-1.3b-one-step/adversarial/discriminator.safetensors")[
        f"world.{name}"
    ]
    assert (trained - diffusion).norm() < 0.1 * (trained - generator).norm()


def test_a_file_leaves_a_stage_out_and_adds_one(place):
    recorded = json.loads((place / "runs/foxes/recipe.json").read_text())
    assert list(recorded["stages"])[-2:] == ["adversarial", "second"]
    judged = [recorded["stages"][name]["judgement"] for name in ("adversarial", "second")]
    assert judged == ["clip", "both"]
    assert load_config(place / "runs/foxes/foxes")["stage"] == "second"


def test_the_report_compares_both(place):
    report = json.loads((place / "compared/report.json").read_text())
    assert list(report["windows"]) == ["0-1.3 s"]
    assert len(report["checkpoints"]) == 2
    assert (place / "fox.mp4").stat().st_size > 0
