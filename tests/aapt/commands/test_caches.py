"""The option --cache of every command that streams."""

import json

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from aapt.commands.app import app, main
from aapt.commands.info import _cache_bytes
from aapt.commands.shared import CACHE_OPTION, InputError
from aapt.model.caches import CACHES, CacheError
from aapt.streaming.generator import StreamingGenerator
from aapt.streaming.stream import Stream

from .test_replay import played, read, replay  # noqa: F401

COMMANDS = ["generate", "serve", "info", "compare", "vbench", "eval", "stream", "methods"]


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_every_command_that_streams_has_the_option():
    group = typer.main.get_command(app)
    found = dict(group.commands) | dict(group.commands["bench"].commands)
    options = {name: {option.name for option in found[name].params} for name in found}
    assert {name for name, names in options.items() if "cache" in names} == set(COMMANDS)
    assert all(name in CACHE_OPTION.help for name in CACHES)


@pytest.fixture
def folder(played):  # noqa: F811
    return played[0]


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_generate(folder, picture, tmp_path):
    given = ["--model", folder, "--image", picture, "--seconds", 0.7]
    videos = {}
    for name in CACHES:
        assert run("generate", *given, "--cache", name, "--out", tmp_path / name) == 0
        videos[name] = read(tmp_path / name)
    assert run("generate", *given, "--out", tmp_path / "unsaid") == 0
    assert np.array_equal(read(tmp_path / "unsaid"), videos["model"])
    assert np.array_equal(videos["float8-past"][:9], videos["model"][:9])  # two steps
    assert not np.array_equal(videos["float8-past"], videos["model"])
    assert not np.array_equal(videos["float8"][:9], videos["model"][:9])


def test_a_replay_takes_the_cache_of_the_log(played, tmp_path, capfd):  # noqa: F811
    folder, log, _ = played
    assert replay(played, tmp_path / "out", "--cache", "float8") == 2
    said = "aapt: replay: expected cache model, got float8; leave --cache away"
    assert capfd.readouterr().err.splitlines() == [said]
    assert not (tmp_path / "out").exists()
    assert replay(played, tmp_path / "out", "--cache", "model") == 0
    lines = log.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"cache": "float8"})
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(lines))
    capfd.readouterr()
    assert replay((folder, other, None), tmp_path / "again") == 0
    assert "step 1 differs from what was played" in capfd.readouterr().err


def test_what_a_model_loses_is_one_line(folder, picture, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("aapt.model.caches.VALUE_SIZE", 4e6)  # values are cut
    given = ["--model", folder, "--image", picture, "--seconds", 0.7, "--out", tmp_path / "a"]
    for name in ("float8", "float8-past"):
        assert run("generate", *given, "--cache", name) == 2
        (said,) = capfd.readouterr().err.splitlines()
        assert said.startswith("aapt: cache: this model loses too much in float8; choose the cache")


def test_a_loss_in_the_middle_says_what_was_written(folder, picture, tmp_path, capfd, monkeypatch):
    def step(self, control):
        if self.steps:
            raise CacheError("cache: lost")
        return made(self, control)

    made = Stream.step
    monkeypatch.setattr(Stream, "step", step)
    given = ["--model", folder, "--image", picture, "--seconds", 0.7, "--out", tmp_path / "a"]
    assert run("generate", *given, "--cache", "float8") == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said == f"aapt: cache: lost: {tmp_path / 'a'} holds 5 of 17 frames"
    assert len(read(tmp_path / "a")) == 5


def test_info_shows_the_bytes_by_name(folder, capfd):
    assert run("info", "--model", folder, "--json") == 0
    found = json.loads(capfd.readouterr().out)["cache_bytes"]
    assert list(found) == list(CACHES)
    assert found["model"] > found["float8-past"] > found["float8"]
    half = run("info", "--model", folder, "--dtype", "bfloat16", "--cache", "model", "--json")
    half = json.loads(capfd.readouterr().out)["cache_bytes"]
    assert list(half) == ["model"] and 0.5 * found["model"] <= half["model"] < 0.51 * found["model"]
    assert run("info", "--model", folder, "--cache", "float8") == 0
    assert "\ncache  " in capfd.readouterr().out


def test_info_shows_what_the_device_can_have(folder, monkeypatch):
    generator = StreamingGenerator.from_pretrained(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 6))
    assert list(_cache_bytes(generator, None, "cuda", torch.bfloat16)) == ["model"]
    with pytest.raises(InputError, match="^cache: expected model on cuda, which is sm_86 and has"):
        _cache_bytes(generator, "float8", "cuda", torch.bfloat16)


def test_bench(folder, capfd, monkeypatch):
    monkeypatch.setattr("aapt.evaluate.speed.WARMUP_STEPS", 1)
    small = ["--model", "aapt-small", "--size", "32x32"]
    for name in CACHES:
        assert run("bench", "stream", *small, "--steps", 1, "--cache", name, "--json") == 0
        assert json.loads(capfd.readouterr().out)["cache"] == name
    assert run("bench", "stream", *small, "--steps", 1, "--cache", "float8", "--breakdown") == 0
    table = capfd.readouterr().out
    assert "float32 on cpu, cache float8\n" in table and "attention" in table
    assert run("bench", "methods", *small, "--rounds", 1, "--cache", "float8", "--json") == 0
    assert json.loads(capfd.readouterr().out)["cache"] == "float8"
    for command in (["stream"], ["methods"]):
        assert run("bench", *command, "--predict", "h100", "--cache", "float8") == 2
        assert "cache: expected none with --predict" in capfd.readouterr().err
    assert run("bench", "methods", *small, "--cache", "float8-past") == 2
    assert "for methods of several frames per pass, got float8-past" in capfd.readouterr().err


def test_evaluation_and_vbench_get_the_cache(folder, tmp_path, monkeypatch, capfd):
    given = {}

    def evaluate(checkpoints, out, *seeds, **settings):
        given[out.name] = settings["cache"]
        raise ValueError("settings: seen")

    monkeypatch.setattr("aapt.evaluate.evaluate", evaluate)
    monkeypatch.setattr("aapt.evaluate.compare.compare", evaluate)
    for name in CACHES:
        assert run("eval", folder, "--cache", name, "--out", tmp_path / name) == 2
        assert run("compare", folder, folder, "--cache", name, "--out", tmp_path / f"{name}2") == 2
    assert given == {f"{name}{more}": name for name in CACHES for more in ("", "2")}
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (48, 32), (9, 90, 30)).save(images / "a.png")
    out = ["--images", images, "--samples", 1, "--frames", 9, "--out", tmp_path / "videos"]
    capfd.readouterr()
    assert run("vbench", folder, *out, "--cache", "float8") == 0
    assert json.loads((tmp_path / "videos" / "seeds.json").read_text())["cache"] == "float8"
    assert run("vbench", folder, *out) == 2
    assert "cache: expected float8, as for the videos in" in capfd.readouterr().err
