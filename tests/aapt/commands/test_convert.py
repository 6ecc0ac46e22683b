"""`aapt convert`, as its user meets it."""

import errno
import json
from pathlib import Path

import pytest
import torch

from aapt.commands.app import main
from aapt.convert import job
from aapt.convert.kinds import KINDS

from ..convert.plain_native import random_weights


def run(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"generator": random_weights()}, "w.pt")
    return "w.pt"


def test_the_table_ends_with_the_licence(source, capsys):
    assert run(source, "--kind", "causal-forcing-framewise-1step", "--out", "one") == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        "checkpoint              one",
        "kind                    causal-forcing-framewise-1step: zhuhz22/Causal-Forcing "
        "causal-forcing++/framewise-1step.pt",
        "settings                github.com/thu-ml/Causal-Forcing at 1fc7bbc, "
        "configs/causal_forcing_dmd_framewise_1step.yaml",
        "model                   2 blocks of width 256, 2 heads, 4 latent channels",
        "chunk                   1 latent frame",
        "past                    20 latent frames before the newest",
        "sampling                a pass at 1, and one at 0; 4 in the first chunk",
        "autoencoder             none; pass --vae to make video",
        "text encoder            none; pass --text to make video",
        "licence of the weights  Apache-2.0",
    ]
    assert output.err == ""
    assert run(source, "--kind", "longlive-1.3b", "--out", "two") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[4:7] == [
        "chunk                   3 latent frames",
        "past                    the first 3 latent frames, and 8 before the newest",
        "sampling                passes at 1, 0.9375, 0.8333, 0.625, and one at 0",
    ]
    for kind, words in (
        ("longlive-2-5b", "passes of UniPC at 0.9998, 0.9373, 0.8331, 0.6247, and one at 0"),
        (
            "causal-forcing-chunkwise-diffusion",
            "50 passes of UniPC at 0.9998 to 0.09251, and one at 0; guidance 3",
        ),
        (
            "causal-forcing-longvideo",
            "passes at 1, 0.9375, 0.8333, 0.625, and one at 0; several chunks in a pass",
        ),
    ):
        assert run(source, "--kind", kind, "--out", kind) == 0
        assert f"sampling                {words}" in capsys.readouterr().out
    assert run(source, "--kind", "self-forcing", "--out", "three") == 0
    words = "CC-BY-NC-SA-4.0: no commercial use, and what is made from them stays so"
    assert capsys.readouterr().out.splitlines()[-1] == f"licence of the weights  {words}"


def test_starts_of_training(source, capsys):
    assert run(source, "--kind", "wan2.1-t2v", "--out", "plain") == 0
    assert "sampling                diffusion in 50 steps, to start training from" in (
        capsys.readouterr().out
    )
    Path("videos").mkdir()
    for command in (["generate"], ["encode", "videos"]):
        assert main([*command, "--model", "plain", "--out", "made"]) == 2
        assert capsys.readouterr().err == (
            "aapt: plain: expected a checkpoint with an autoencoder, got one without; convert the "
            "weights again with --vae\n"
        )
    assert run(source, "--kind", "wan2.1-t2v", "--recycle", "zero", "--out", "start") == 0
    said = capsys.readouterr().out
    assert "sampling                none before training: one pass a frame, recycled" in said


def test_json_is_the_configuration(source, capsys):
    assert run(source, "--kind", "causvid", "--out", "out", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads(open("out/config.json").read())
    assert written == {"format_version": 1, **printed}
    assert printed["converted"] == {
        "kind": "causvid",
        "weights": KINDS["causvid"].weights,
        "settings": KINDS["causvid"].source,
        "file": "w.pt",
        "licence": KINDS["causvid"].licence,
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["none.pt"], "none.pt: expected a file of weights or a folder with one, which is missing"),
        (["w.pt", "--kind", "wan"], f"kind: expected one of {', '.join(KINDS)}, got 'wan'"),
        (["w.pt", "--out", "w.pt"], "out: expected a folder that can be written, got w.pt: "),
        (
            ["w.pt", "--vae", "none"],
            "none: expected a checkpoint folder or one of sharp-world, tiny-puppet, tiny-world",
        ),
        (["w.pt", "--vae", "tiny-world"], "vae: expected 4 latent channels, as the model has, got"),
    ],
)
def test_bad_input_ends_in_one_line_and_2(source, capsys, options, words):
    given = {"--kind": "one-forcing", "--out": "out"}
    for name in list(given):
        if name in options:
            del given[name]
    assert run(*options, *(word for pair in given.items() for word in pair)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"aapt: {words}") and said.count("\n") == 1


def test_a_full_disk_ends_in_one_line_and_1(source, capsys, monkeypatch, tmp_path):
    def full(path, tensors):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(job, "write_pending", full)
    assert run(source, "--kind", "one-forcing", "--out", "out") == 1
    assert capsys.readouterr().err == ("aapt: out/model.safetensors: No space left on device\n")
    assert not (tmp_path / "out" / "config.json").exists()


def test_help_names_every_kind(capsys):
    assert run("--help") == 0
    said = capsys.readouterr().out.split()
    assert [name for name in KINDS if name not in said] == []
