"""The command `aapt`, as its user meets it.

Most tests put a generator of moving blocks in the model's place; the last use the bundled model.
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from aapt.checkpoint import BUNDLED
from aapt.commands.app import main
from aapt.commands.train import folders_by_set
from aapt.media.video import WholeFile
from aapt.runs.inputs import Inputs
from aapt.streaming.generator import StreamingGenerator
from aapt.training.recipes import paper_8b

from ...progress import finish, wait_until
from .fake_generator import HEIGHT, WIDTH, FakeGenerator, script


@pytest.fixture
def generator(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    fake = FakeGenerator(tmp_path / "model")
    monkeypatch.setattr(StreamingGenerator, "from_pretrained", fake.load)
    monkeypatch.chdir(tmp_path)
    return fake


def decode(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_out_is_enough(generator, capsys):
    assert run("generate", "--out", "walk.mp4") == 0
    frames = decode("walk.mp4")
    assert len(frames) == 241 and frames[0].shape == (320, 512, 3)
    (stream,) = generator.streams
    assert (stream.prompt, stream.seed) == ("a meadow of blocks", 0)
    assert stream.first_frame.shape == (1, HEIGHT, WIDTH, 3)
    assert len(stream.controls) == 60 and stream.controls[0] == (0.0, 1.0)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("walk.mp4: 241 frames, 10.0 s at 24 fps, 512 x 320; made at ")
    assert output.err.count("\n") == 1


def test_all_options_reach_the_stream(generator, capsys):
    Image.new("RGB", (400, 160), (1, 2, 3)).save("photo.jpg")
    Path("path.txt").write_text("0.5 a\n0.5 s\n")
    options = ["--image", "photo.jpg", "--prompt", "a desert", "--controls", "path.txt"]
    options += ["--seconds", 1, "--seed", 7, "--scale", 1, "--model", "other", "--out", "a.mp4"]
    assert run("generate", *options) == 0
    (stream,) = generator.streams
    assert (stream.prompt, stream.seed) == ("a desert", 7)
    assert stream.controls == [(-1, 0)] * 3 + [(0, -0.4)] * 3
    nothing = {"device": None, "dtype": None, "size": None, "text_device": None}
    assert generator.options == nothing | {"cache": "model"}
    assert np.abs(stream.first_frame.astype(int) - (1, 2, 3)).max() <= 2
    assert decode("a.mp4")[0].shape == (80, 128, 3)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == ("photo.jpg: 400 x 160 image cropped to 256 x 160 and resized to 128 x 80")


@pytest.mark.parametrize(
    "command", [["generate", "--out", "a.gif", "--seconds", 0.1], ["bench", "stream"], ["serve"]]
)
def test_device_precision_and_size_reach_the_model(generator, monkeypatch, command):
    """The bench and the server need more than the stand-in has, and end after loading it."""
    if command[0] == "serve":
        pytest.importorskip("fastapi", reason="needs the extra serve")

    def load(name, **options):
        loaded.append((name, options))
        if command[0] == "generate":
            return generator
        raise ValueError("loaded")

    loaded = []
    monkeypatch.setattr(StreamingGenerator, "from_pretrained", load)
    options = ["--device", "cuda:1", "--dtype", "float16", "--size", "736x416"]
    assert run(*command, *options) == (0 if command[0] == "generate" else 2)
    placed = {"device": "cuda:1", "dtype": torch.float16, "size": (416, 736)}
    ((name, given),) = loaded
    assert name == "tiny-world" and placed.items() <= given.items()


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--out", "a.mp4"],
        ["bench", "stream"],
        ["info"],
        ["eval", "tiny-world", "--out", "out"],
    ],
)
def test_a_place_that_a_model_cannot_have_is_one_line(tiny_world, tmp_path, capsys, command):
    for options, message in [
        (["--device", "disk"], "device: expected cpu, cuda or cuda:N, got disk"),
        (["--dtype", "int8"], "dtype: expected one of float32, bfloat16, float16, got int8"),
        (["--size", "736"], "size: expected WIDTHxHEIGHT such as 128x80, got 736"),
        (["--size", "0x80"], "size: expected WIDTHxHEIGHT such as 128x80, got 0x80"),
        (["--cache", "fp8"], "cache: expected one of model, float8, float8-past, got 'fp8'"),
        (["--size", "130x80"], "expected multiples of 16, got 80 x 130; 80 x 128 is near"),
    ]:
        assert run(*command, *options) == 2, options
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said


def test_a_machine_without_cuda_says_what_to_do(tiny_world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert run("generate", "--device", "cuda", "--out", tmp_path / "a.mp4") == 2
    said = capsys.readouterr().err
    assert said.startswith("aapt: device: cannot use cuda: PyTorch ") and said.count("\n") == 1
    assert said.endswith(" is built without CUDA; install a build with CUDA, or take cpu\n")


def test_a_video_of_another_size_and_precision(tiny_world, tmp_path):
    options = ["--seconds", 0.2, "--size", "160x96", "--dtype", "bfloat16"]
    assert run("generate", *options, "--out", tmp_path / "a") == 0
    (first, *others) = sorted((tmp_path / "a").iterdir())
    assert len(others) == 4 and Image.open(first).size == (160, 96)


@pytest.mark.parametrize("seconds, frames", [(0.01, 5), (0.5, 13), (1, 25), (1.24, 29), (2, 49)])
def test_length(generator, seconds, frames):
    assert run("generate", "--seconds", seconds, "--out", "a.gif") == 0
    with Image.open("a.gif") as gif:
        assert gif.n_frames == frames


def test_png_folder(generator):
    assert run("generate", "--seconds", 0.5, "--out", "frames/") == 0
    paths = sorted(Path("frames").iterdir())
    assert len(paths) == 13 and Image.open(paths[-1]).size == (128, 80)


def test_raw_frames_go_to_a_pipe(tmp_path):
    process = script("generate", "--seconds", 0.5, "--out", "-", stdout=subprocess.PIPE)
    raw, said = finish(process)
    assert process.returncode == 0
    frames = np.frombuffer(raw, np.uint8).reshape(13, HEIGHT, WIDTH, 3)
    assert (frames[0] == (90, 120, 30)).all()
    assert np.array_equal(np.roll(frames[1], 1, axis=1), frames[2])
    assert said.startswith(b"standard output: 13 frames")


def test_a_reader_that_leaves_is_no_error():
    process = script(
        "generate", "--seconds", 60, "--out", "-", step_seconds=0.01, stdout=subprocess.PIPE
    )
    assert len(process.stdout.read(1000)) == 1000
    process.stdout.close()
    assert process.stderr.read() == b""
    finish(process)
    assert process.returncode == 0


def test_ctrl_c_leaves_a_video_that_plays(tmp_path):
    out = tmp_path / "a.mp4"
    process = script("generate", "--seconds", 600, "--out", out, step_seconds=0.01)
    wait_until(lambda: out.exists() and out.stat().st_size >= 100_000, process)
    process.send_signal(signal.SIGINT)
    said = finish(process)[1].decode()
    assert process.returncode == 130
    frames = len(decode(out))
    assert frames % 4 == 1 and frames > 4
    assert said == f"aapt: interrupted: {out} holds {frames} of 14401 frames\n"


def test_full_disk_leaves_a_video_that_plays(tmp_path):
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    out = tmp_path / "a.mp4"
    process = script("generate", "--seconds", 60, "--out", out, preexec_fn=small_disk)
    said = finish(process)[1].decode()
    assert process.returncode == 1
    frames = len(decode(out))
    assert frames > 0
    assert said == f"aapt: {out}: File too large: {out} holds {frames} of 1441 frames\n"


def test_full_pipe_is_said_in_one_line():
    with open("/dev/full", "wb") as full:
        process = script("generate", "--out", "-", stdout=full)
        said = finish(process)[1].decode()
    assert process.returncode == 1
    assert said == (
        "aapt: standard output: No space left on device: nothing was kept of standard output\n"
    )


def test_full_disk_while_closing(generator, monkeypatch, capsys):
    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(WholeFile, "_write_some", full)
    assert run("generate", "--seconds", 0.1, "--out", "a.mp4") == 1
    said = capsys.readouterr().err
    assert said == "aapt: a.mp4: No space left on device: nothing was kept of a.mp4\n"
    assert not Path("a.mp4").exists()


BAD = [
    (["--image", "none.png"], "image: expected a PNG or JPEG file, got none.png: no such file"),
    (["--image", "text.png"], "image: expected a PNG or JPEG file, got text.png: not an image"),
    (["--image", "."], "image: cannot read .: Is a directory"),
    (["--seconds", "0"], "seconds: expected a finite number above 0, got 0"),
    (["--seconds", "-1"], "seconds: expected a finite number above 0, got -1"),
    (["--seconds", "nan"], "seconds: expected a finite number above 0, got nan"),
    (["--seconds", "inf"], "seconds: expected a finite number above 0, got inf"),
    (["--seconds", "1e308"], "seconds: expected at most 1e+07, got 1e+308"),
    (["--seconds", "ten"], "Invalid value for '--seconds'"),
    (["--image", 300 * "a"], "aaa: File name too long"),
    (["--image", "pipe"], "image: expected a PNG or JPEG file, got pipe: a pipe or a device"),
    (["--controls", "pipe"], "controls: expected a text file, got pipe: a pipe or a device"),
    (["--controls", 300 * "a"], "aaa: File name too long"),
    (["--out", 300 * "a" + ".mp4"], "aaa.mp4: File name too long"),
    (["--controls", "wlak"], "got 'wlak'; did you mean walk?"),
    (["--controls", "text.png"], "text.png: line 1: expected '<seconds> <keys>'"),
    (["--controls", "."], "controls: cannot read .: Is a directory"),
    (["--out", "none/a.mp4"], "out: expected a path in a folder that exists, got none/a.mp4"),
    (["--out", "a.avi"], "out: expected a .mp4 or .gif file"),
    (["--seed", "-1"], "Invalid value for '--seed'"),
    (["--seed", str(2**63)], "Invalid value for '--seed'"),
    (["--scale", "0"], "Invalid value for '--scale'"),
    (["--sceds", "1"], "No such option"),
    (["stray"], "unexpected extra argument"),
]


@pytest.mark.parametrize("options, message", BAD)
def test_bad_input_ends_in_one_line_and_2(generator, capsys, options, message):
    Path("text.png").write_text("hello\n")
    os.mkfifo("pipe")
    out = [] if "--out" in options else ["--out", "a.mp4"]
    assert run("generate", *out, *options) == 2
    output = capsys.readouterr()
    assert output.err.startswith("aapt: ") and message in output.err and output.out == ""
    assert output.err.count("\n") == 1 and not Path("a.mp4").exists()


def test_unknown_model_names_the_known_ones(tmp_path, capsys):
    assert run("generate", "--model", "huge-world", "--out", tmp_path / "a.mp4") == 2
    said = capsys.readouterr().err
    assert said.startswith("aapt: huge-world: expected a checkpoint folder or one of ")
    assert said.count("\n") == 1


def test_paths_that_the_system_refuses_end_in_one_line_and_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    long = 300 * "a"
    for arguments in [
        ["generate", "--out", "a.mp4", "--model", long],
        ["info", "--model", long],
        ["bench", "stream", "--model", long],
        ["encode", long, "--out", "o"],
        ["encode", ".", "--out", long],
        ["encode", ".", "--out", "o", "--model", long],
        ["train", "paper-8b", "--latents", long],
        ["train", "paper-8b", "--weights", long],
        ["train", "tiny-world", "--out", long],
        ["train", "vae-light", "--vae", long],
        ["train", "wan-light", "--videos", long],
        ["train", "vae-light", "--perceptual", long],
        ["eval-vae", long],
        ["eval-vae", "tiny-world", "--videos", long],
        ["plot", long, "--out", "a.png"],
        ["plot", ".", "--out", f"{long}/a.png"],
    ]:
        assert run(*arguments) == 2, arguments
        said = capsys.readouterr().err
        assert said.startswith("aapt: ") and said.count("\n") == 1, arguments
        assert "File name too long" in said, said
    assert list(tmp_path.iterdir()) == []


def test_a_locked_folder_is_named(tmp_path, monkeypatch, capsys):
    """The system's answer is put in its place, because root may enter every folder."""
    real = os.stat

    def stat(path, *rest, **options):
        if "locked" in os.fspath(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "stat", stat)
    for arguments in [
        ["info", "--model", tmp_path / "locked" / "m"],
        ["encode", tmp_path / "locked" / "v", "--out", tmp_path / "o"],
        ["encode", tmp_path, "--out", tmp_path / "locked" / "o"],
        ["generate", "--controls", tmp_path / "locked" / "c.txt", "--out", tmp_path / "a.mp4"],
        ["generate", "--out", tmp_path / "locked" / "a.mp4"],
    ]:
        assert run(*arguments) == 2, arguments
        said = capsys.readouterr().err
        assert "locked" in said and "Permission denied" in said and said.count("\n") == 1


def test_numbers_too_large_end_in_one_line_and_2(tmp_path, capsys):
    for arguments, message in [
        (["encode", tmp_path, "--out", "o", "--seconds", "1e308"], "seconds: expected at most"),
        (["encode", tmp_path, "--out", "o", "--stride", "1e308"], "stride: expected at most"),
        (["encode", tmp_path, "--out", "o", "--workers", 10**30], "Invalid value for '--workers'"),
        (["eval-vae", "tiny-world", "--seconds", "1e308"], "seconds: expected at most"),
        (["eval-vae", "tiny-world", "--threads", 10**30], "Invalid value for '--threads'"),
        (["eval-vae", "tiny-world", "--clips", 10**30], "Invalid value for '--clips'"),
        (["bench", "stream", "--threads", 10**30], "Invalid value for '--threads'"),
        (["train", "paper-8b", "--plan", "--gpus", 10**30], "Invalid value for '--gpus'"),
        (["train", "paper-8b", "--plan", "--context", 10**30], "Invalid value for '--context'"),
    ]:
        assert run(*arguments) == 2, arguments
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tiny-world", "--plan", "--stage", "final"], "stage: expected none with --plan"),
        (["train", "tiny-world", "--plan", "--weights", "x"], "weights: expected none with --plan"),
        (["train", "vae-light", "--checkpoint-blocks"], "checkpoint_blocks: expected none for"),
        (["generate", "--text-device", "cpu", "--out", "a.mp4"], "text_device: expected none for"),
        (
            ["encode", ".", "--text-device", "cpu", "--out", "o"],
            "text_device: expected with --text",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_is_cut_is_said(generator, capsys):
    prompt = "a calm cinematic wide shot of snowy peaks"
    assert run("generate", "--seconds", 0.2, "--prompt", prompt, "--out", "a.mp4") == 0
    assert capsys.readouterr().err.splitlines()[0] == (
        "aapt: prompt: expected at most 24 bytes, got 41; only 'a calm cinematic wide sh' is read"
    )
    assert generator.streams[0].prompt == prompt


def test_latents_are_sorted_by_the_names_of_sets():
    """A name ends at the first "=", if it is a set's; all else is a path."""
    given = ["736x416=/lr=1e-4/a", "736x416=b", "/lr=1e-4/c", "x=y", "plain"]
    sorted_ = folders_by_set(given, paper_8b().stages.values())
    found = {name: list(map(str, paths)) for name, paths in sorted_.items()}
    assert found == {"736x416": ["/lr=1e-4/a", "b"], "": ["/lr=1e-4/c", "x=y", "plain"]}


def test_missing_option_points_to_help(capsys):
    assert run("generate") == 2
    assert "Missing option" in (said := capsys.readouterr().err)
    assert said.endswith("(see aapt generate --help)\n") and said.count("\n") == 1
    assert run("bench") == 2
    assert capsys.readouterr().err == "aapt: Missing command. (see aapt bench --help)\n"


def test_help_is_quick_and_has_examples(capsys):
    assert run() == 0
    assert "generate" in capsys.readouterr().out
    names = ("generate", "serve", "info", "train", "encode", "convert", "quantise", "plot")
    names += ("compare", "eval", "eval-vae", "vbench")
    parts = ("stream", "methods", "play")
    for command in [*([name] for name in names), *(["bench", part] for part in parts)]:
        assert run(*command, "--help") == 0
        said = capsys.readouterr().out
        assert f"Examples:\n    aapt {' '.join(command)}" in said
        examples = said.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
        for line, after in zip(examples, examples[1:]):
            assert line.endswith("\\") == after.startswith(" " * 6)
            assert "  " not in line.strip()  # a continuation joined to its line
    code = (
        "import sys; from aapt.commands.app import main; main(['--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_train_runs_the_recipe(tmp_path, monkeypatch, capsys):
    calls = []

    def record(recipe, out, stages, *, workers, report, options, **others):
        calls.append((recipe.name, out, stages, workers, options.save_every))
        assert others["parallel"].main and others["inputs"] == Inputs({}, None)
        report("diffusion: 1.0 min")
        return out / recipe.name

    monkeypatch.setattr("aapt.runs.run.run", record)
    assert run("train", "tiny-world") == 0
    assert calls[0] == ("tiny-world", Path("runs/tiny-world"), None, 2, 100)
    options = ["--stage", "clips", "--stage", "diffusion", "--out", tmp_path, "--workers", 1]
    options += ["--save-every", 7]
    assert run("train", "tiny-world", *options) == 0
    assert calls[1] == ("tiny-world", tmp_path, ["clips", "diffusion"], 1, 7)
    output = capsys.readouterr()
    assert output.out == f"runs/tiny-world/tiny-world\n{tmp_path}/tiny-world\n"
    assert output.err == "diffusion: 1.0 min\n" * 2


def test_train_says_what_is_wrong_in_one_line(tmp_path, capsys):
    for arguments, code, message in [
        (
            ["huge"],
            2,
            "aapt: recipe: expected one of tiny-world, tiny-puppet, paper-8b, paper-8b-640, "
            "paper-8b-camera, paper-8b-pose, wan-1.3b, wan-1.3b-camera, wan-1.3b-one-step, "
            "wan-1.3b-matched, wan-5b, pilot-40, pilot-80, pilot-160, pilot-160-fine, sharp-world, "
            "small-world, vae-light, wan-light, vae-fine, got 'huge'; a recipe of your own is a "
            "file that ends with .toml",
        ),
        (["tiny-world", "--stage", "x"], 2, "aapt: stage: expected one of encoder, clips,"),
        (
            ["tiny-world", "--stage", "diffusion"],
            2,
            "aapt: stage diffusion: expected the result of encoder in ",
        ),
    ]:
        assert run("train", *arguments, "--out", tmp_path) == code
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_help_names_every_preset(capsys):
    from aapt.streaming.controls import PRESETS

    run("generate", "--help")
    assert ", ".join(PRESETS) in " ".join(capsys.readouterr().out.split())


@pytest.fixture
def tiny_world():
    if not (BUNDLED / "tiny-world" / "config.json").is_file():
        pytest.skip("the bundled model is not in this checkout")


def test_bundled_model_makes_the_same_video_twice(tiny_world, tmp_path):
    for name in ("a", "b"):
        assert run("generate", "--seconds", 1, "--out", tmp_path / name) == 0
    pictures = [
        np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / name).iterdir())])
        for name in ("a", "b")
    ]
    assert pictures[0].shape[0] == 25 and pictures[0].std() > 5
    assert np.array_equal(*pictures)
    assert np.abs(pictures[0][0].astype(int) - pictures[0][24]).mean() > 2  # the walk moves


def test_info(tiny_world, capsys):
    assert run("info") == 0
    table = capsys.readouterr().out
    assert "tiny-world" in table and "block_causal_attention" in table and "cpu on cpu" in table
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"]["parameters"]["model"] > 0
    assert {row["op"] for row in facts["ops"]} >= {"block_causal_attention", "qk_norm_rope"}
    assert facts["versions"]["torch"] and facts["threads"] >= 1


def test_info_of_another_device_says_what_is_missing(tiny_world, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert run("info", "--device", "cuda", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["device"]["missing"].startswith("device: cannot use cuda: PyTorch ")
    assert {row["backend"] for row in facts["ops"]} == {None}
    assert all("cuda: no CUDA device" in row["reason"] for row in facts["ops"] if row["reason"])
    assert run("info", "--device", "cuda") == 0
    table = capsys.readouterr().out
    assert "is built without CUDA; install a build with CUDA" in table
    assert "none on cuda in bfloat16  cuda: no CUDA device; triton: " in table


def test_info_asks_the_backends_for_their_reasons(tiny_world, capsys, monkeypatch):
    """An H100 in the place of no device: float32 is too much for the sm_90a kernels alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr("aapt.device.usable_device", torch.device)
    monkeypatch.setattr("aapt_kernels.backend.no_sm90", lambda device=None: None)
    monkeypatch.setattr("aapt_kernels.backend.implementation", lambda op, name: abs)
    monkeypatch.setattr("aapt.environment.environment", lambda: environment)
    environment = {"cuda": {"devices": [], "torch_built_for": "13.0"}, "versions": {}}
    environment |= {"cpu": "", "cores": 1, "threads": 1, "commit": None}
    chosen = {}
    for dtype in ("bfloat16", "float32", "float64"):
        assert run("info", "--device", "cuda", "--dtype", dtype, "--json") == (
            2 if dtype == "float64" else 0
        )
        said = capsys.readouterr().out
        rows = json.loads(said)["ops"] if said else []
        chosen[dtype] = {row["op"]: (row["backend"], row["reason"]) for row in rows}
    assert chosen["bfloat16"]["kv_append"] == ("cuda", "")
    backend, why = chosen["float32"]["kv_append"]
    assert backend == "triton" and why.startswith("cuda: it takes bfloat16 with head_dim 64 or 128")
    assert chosen["float32"]["causal_conv3d"][0] == "triton"


def test_info_shows_what_the_driver_says(tiny_world, capsys, monkeypatch):
    from aapt import cuda_driver

    facts = dict(l2_bytes=50 << 20, persisting_l2_bytes=32 << 20, clock_mhz=1980)
    facts |= dict(bytes_per_second=3_352_000_000_000)
    monkeypatch.setattr(
        "aapt.environment._device", lambda index: {"name": "H100", "capability": "9.0"}
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda_driver, "driver_version", lambda: "13.0")
    monkeypatch.setattr(cuda_driver, "device_facts", lambda index: facts)
    assert run("info") == 0
    assert (
        "driver for CUDA 13.0, 1980 MHz, 3.35 TB/s, L2 50 MiB, of which 32 MiB may persist"
        in capsys.readouterr().out
    )
    monkeypatch.undo()
    monkeypatch.setattr(
        "aapt.environment._device", lambda index: {"name": "H100", "capability": "9.0"}
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert run("info") == 0
    assert "pip install 'aapt[cuda]'" in capsys.readouterr().out


def test_bench_stream(tiny_world, capsys):
    assert run("bench", "stream", "--steps", 2) == 0
    assert "2 steps of 4 frames, decoding included" in capsys.readouterr().out
    assert run("bench", "stream", "--steps", 3, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["steps"] == 3 and facts["warmup_steps"] == 12
    assert 0 < facts["step_ms"]["p50"] <= facts["step_ms"]["p99"] <= facts["step_ms"]["max"]
    assert facts["first_frame_ms"]["warm"] > 0 and facts["peak_memory_bytes"]["process"] > 2**20
    assert facts["fps"] == pytest.approx(24 * facts["real_time"]) and facts["cpu"]


def test_bench_stream_shows_the_parts_of_a_step(tiny_world, capsys):
    assert run("bench", "stream", "--steps", 1, "--breakdown") == 0
    table = capsys.readouterr().out
    assert "parts of a step  measured on cpu\n" in table and "for each of 6 blocks" in table
    assert run("bench", "stream", "--predict", "h100", "--size", "160x96") == 0
    table = capsys.readouterr().out
    assert "tiny-world: 160 x 96, bfloat16" in table
    assert "predicted for h100: nothing was measured" in table
    assert run("bench", "stream", "--predict", "h200", "--json") == 0
    found = json.loads(capsys.readouterr().out)["breakdown"]
    assert found["how"] == "predicted for h200" and found["step"] > found["parts"]["products"]


def test_bench_stream_says_what_a_prediction_and_a_graph_need(tiny_world, tmp_path, capsys):
    for options, message in [
        (["--predict", "h300"], "predict: expected one of h100, h200, got h300"),
        (["--predict", "h100", "--device", "cuda"], "device: expected none with --predict"),
        (["--predict", "h100", "--steps", 60], "steps: expected none with --predict"),
        (["--graph", tmp_path / "step.dot"], "graph: expected a CUDA device, where a step is one"),
    ]:
        assert run("bench", "stream", *options) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said


def test_bench_stream_refuses_no_steps(capsys):
    assert run("bench", "stream", "--steps", 0) == 2
    assert "Invalid value for '--steps'" in capsys.readouterr().err
