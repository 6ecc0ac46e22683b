"""`aapt generate --replay`: the video of an action log, bit for bit, or what differs."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from aapt import StreamingGenerator
from aapt.checkpoint import find_checkpoint, save_config, save_module
from aapt.commands.app import main
from aapt.streaming.actions import Redone, Step, Walk, frames_crc, make, model_digest
from aapt.vae import CausalVAE

from ..helpers import CAMERA
from ..streaming.test_generator import HEIGHT, VAE, WIDTH, build

STEPS = [Step(0.0, 1.0, "ab"), Step(0.5, 1.0, "ab"), Step(-1.0, 0.0, "cd")]


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A checkpoint, the log of a walk in it with a branch, and the video frames by branch."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, vae = build()
    save_module(folder / "model.safetensors", model)
    save_module(folder / "vae.safetensors", vae)
    parts = {"model": model.config, "camera": CAMERA, "vae": VAE, "original_vae": VAE}
    parts = {name: dataclasses.asdict(part) for name, part in parts.items()}
    facts = {"height": HEIGHT, "width": WIDTH, "fps": 24, "prompts": ["ab"]}
    save_config(folder, facts | parts)
    other = CausalVAE(VAE)
    other.encoder.load_state_dict(vae.encoder.state_dict())
    save_module(folder / "original_vae.safetensors", other)

    generator = StreamingGenerator.from_pretrained(folder)
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    walk = Walk("small", model_digest(folder), picture, "ab", 5)
    videos = []
    for branch, steps in enumerate((STEPS, STEPS[:1] + STEPS[::-1])):
        stream = generator.open(picture, "ab", 5)
        frames = [stream.first_frame]
        for number, step in enumerate(steps):
            frames.append(make(stream, step))
            if number or not branch:
                walk.append(
                    branch and min(branch, number - 1),
                    number,
                    step._replace(crc=frames_crc(frames[-1])),
                )
        videos.append(np.concatenate(frames))
    log = folder / "walk.jsonl"
    log.write_text("\n".join(walk.lines("0")))
    return folder, log, videos


def read(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def replay(played, out, *options):
    folder, log, _ = played
    return main(
        ["generate", "--replay", str(log), "--model", str(folder), "--out", str(out), *options]
    )


@pytest.mark.parametrize("options, branch", [((), 1), (("--branch", "0"), 0)])
def test_a_replay_is_the_video_that_was_played(played, tmp_path, capfd, options, branch):
    assert replay(played, tmp_path / "out", *options) == 0
    assert np.array_equal(read(tmp_path / "out"), played[2][branch])
    steps = (len(played[2][branch]) - 1) // 4
    assert f"{steps} steps, each bit for bit as it was played" in capfd.readouterr().err


def test_a_replay_names_the_first_step_that_differs(played, tmp_path, capfd):
    folder, log, videos = played
    lines = log.read_text().splitlines()
    line = json.loads(lines[2])
    lines[2] = json.dumps(line | {"yaw": -0.5})
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join(lines))
    assert replay((folder, changed, videos), tmp_path / "out", "--branch", "0") == 0
    assert (
        "step 2 differs from what was played, the first of 2: it was made with"
        in capfd.readouterr().err
    )


@pytest.mark.parametrize("first", [1, 2])
def test_a_replay_does_not_compare_shared_passes(played, tmp_path, capfd, first):
    folder, log, videos = played
    lines = log.read_text().splitlines()
    lines[first] = json.dumps(json.loads(lines[first]) | {"crc": 1, "together": 2})
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join(lines))
    assert replay((folder, changed, videos), tmp_path / "out", "--branch", "0") == 0
    said = capfd.readouterr().err
    assert f"steps {first} to 3 are near what was played and not compared" in said
    assert ("1 steps, each bit for bit" in said) == (first == 2)
    assert "differs" not in said


def test_a_log_with_a_step_of_another_model_keeps_what_was_made_before(played, tmp_path, capfd):
    folder, log, videos = played
    lines = log.read_text().splitlines()
    step = json.loads(lines[2])
    lines[2] = json.dumps({key: step[key] for key in step if key not in ("yaw", "forward")})
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join(lines))
    assert replay((folder, changed, videos), tmp_path / "out", "--branch", "0") == 2
    said = capfd.readouterr().err
    assert "control: expected a Control, got None" in said and "Traceback" not in said
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_the_original_decoder_shows_the_same_walk(played, tmp_path, capfd):
    assert replay(played, tmp_path / "out", "--original") == 0
    video = read(tmp_path / "out")
    assert video.shape == played[2][1].shape and not np.array_equal(video, played[2][1])
    assert "bit for bit" not in capfd.readouterr().err


def test_a_model_of_one_decoder_has_no_original(tmp_path, capfd):
    picture = np.zeros((80, 128, 3), np.uint8)
    walk = Walk("sharp-world", model_digest(find_checkpoint("sharp-world")), picture, "ab", 5)
    log = tmp_path / "walk.jsonl"
    log.write_text("\n".join(walk.lines("0")))
    out = tmp_path / "out"
    assert main(["generate", "--replay", str(log), "--out", str(out)]) == 2
    assert "; pass --model sharp-world, or its folder" in capfd.readouterr().err
    model = ["--model", "sharp-world", "--original"]
    assert main(["generate", "--replay", str(log), *model, "--out", str(out)]) == 2
    words = "aapt: original: expected a model with two decoders, sharp-world has one"
    assert words in capfd.readouterr().err and not out.exists()


def test_a_redo_is_shown_as_it_was(played, tmp_path):
    folder, log, videos = played
    lines = log.read_text().splitlines()
    line = json.loads(lines[1])
    lines[1] = json.dumps(line | {"redone": [list(Redone(-1.0, 0.0, 3))]})
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join(lines))
    assert replay((folder, changed, videos), tmp_path / "out", "--branch", "0") == 0
    video = read(tmp_path / "out")
    same = [np.array_equal(*frames) for frames in zip(video, videos[0], strict=True)]
    assert same == [True] + [False] * 3 + [True] * 9


@pytest.mark.parametrize(
    "options, words",
    [
        (("--branch", "9"), "branch: expected a number below 2, got 9"),
        (("--prompt", "x"), "prompt: expected none with --replay, the action log has its own"),
        (("--controls", "walk"), "controls: expected none with --replay"),
        (("--seconds", "10"), "seconds: expected none with --replay"),
        (("--seed", "0"), "seed: expected none with --replay"),
        (("--model", "tiny-world"), "replay: expected a walk of tiny-world "),
    ],
)
def test_what_does_not_fit_is_refused_by_name(played, tmp_path, capfd, options, words):
    assert replay(played, tmp_path / "out", *options) == 2
    assert f"aapt: {words}" in capfd.readouterr().err


def test_a_branch_without_a_log(tmp_path, capfd):
    assert main(["generate", "--branch", "1", "--out", str(tmp_path / "x.mp4")]) == 2
    assert "replay: expected an action log, got none; pass --replay" in capfd.readouterr().err
