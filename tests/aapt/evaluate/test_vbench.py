"""The videos for VBench: their names, numbers and frames, from a generator that counts."""

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

from aapt.commands.app import main
from aapt.evaluate.vbench import Case, read_cases, write_videos
from aapt.lock import FolderInUse, folder_lock

HEIGHT, WIDTH = 32, 48
FACTS = {"model": "a", "size": "48x32", "dtype": "float32"}


class Counting:
    """A model whose video frame n is grey at 2 n + seed; the first is its image."""

    height, width, fps = HEIGHT, WIDTH, 24
    cache = "model"

    def __init__(self, dtype=torch.float32):
        self.opened = []
        self.model = torch.nn.Linear(1, 1, dtype=dtype)

    def still(self):
        return "still"

    def open(self, first_frame, prompt, seed):
        self.opened.append((prompt, seed))
        return CountingStream(first_frame, seed)


class CountingStream:
    """A stream of `Counting`."""

    def __init__(self, first_frame, seed):
        self.first_frame, self.seed, self.made = first_frame[None], seed, 1

    def step(self, control):
        assert control == "still"
        values = 2 * np.arange(self.made, self.made + 4) + self.seed
        self.made += 4
        return np.broadcast_to(values[:, None, None, None], (4, HEIGHT, WIDTH, 3)).astype(np.uint8)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.made = None


def grey_image(path, value=100):
    Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), (value, value, value)).save(path)
    return path


def greys(path) -> list[float]:
    """The mean grey of every video frame."""
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24").mean() for frame in video.decode(video=0)]


def test_every_length_is_the_beginning_of_one_stream(tmp_path):
    generator, out = Counting(), tmp_path / "out"
    cases = [
        Case("a boat", grey_image(tmp_path / "boat.png")),
        Case("a hut.", tmp_path / "boat.png"),
    ]
    write_videos(
        generator, cases, out, model="a", lengths=(6, 13), samples=2, seed=30, log=lambda line: None
    )
    names = {
        f"{length}/{prompt}-{i}.mp4"
        for length in (6, 13)
        for prompt in ("a boat", "a hut.")
        for i in (0, 1)
    }
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == names | {"seeds.json"}
    assert json.loads((out / "seeds.json").read_text()) == {"0": 30, "1": 31} | FACTS
    assert generator.opened == [(p, s) for p in ("a boat", "a hut.") for s in (30, 31)]
    for length in (6, 13):
        found = greys(out / str(length) / "a boat-1.mp4")
        expected = [100, *(2 * n + 31 for n in range(1, length))]
        assert found == pytest.approx(expected, abs=2)


def test_what_is_there_is_not_made_again(tmp_path):
    cases, out = [Case("a", grey_image(tmp_path / "a.png"))], tmp_path / "out"
    first, second = Counting(), Counting()
    write_videos(first, cases, out, model="a", lengths=(5,), samples=2, log=lambda line: None)
    kept = (out / "5" / "a-0.mp4").read_bytes()
    (out / "5" / "a-1.mp4").unlink()
    lines = []
    write_videos(second, cases, out, model="a", lengths=(5,), samples=2, log=lines.append)
    assert second.opened == [("a", 1)] and lines == ["a-1"]
    assert (out / "5" / "a-0.mp4").read_bytes() == kept


def test_seeds_are_those_of_the_videos(tmp_path):
    cases, out = [Case("a", grey_image(tmp_path / "a.png"))], tmp_path / "out"
    given = {"model": "a", "lengths": (1,), "log": print}
    for samples in (2, 1):
        write_videos(Counting(), cases, out, samples=samples, seed=4, **given)
        assert json.loads((out / "seeds.json").read_text()) == {"0": 4, "1": 5} | FACTS
    words = "^seed: expected 4, as for the videos in .*, got 7; pass another folder as --out"
    with pytest.raises(ValueError, match=words):
        write_videos(Counting(), cases, out, samples=2, seed=7, **given)
    assert json.loads((out / "seeds.json").read_text()) == {"0": 4, "1": 5} | FACTS


def test_videos_are_those_of_one_checkpoint(tmp_path):
    cases, out = [Case("a", grey_image(tmp_path / "a.png"))], tmp_path / "out"
    given = {"lengths": (1,), "samples": 1, "log": lambda line: None}
    write_videos(Counting(), cases, out, model="a", **given)
    words = "^checkpoint: expected a, as for the videos in .*, got b; pass another folder as --out"
    with pytest.raises(ValueError, match=words):
        write_videos(Counting(), cases, out, model="b", **given)
    (out / "seeds.json").write_text('{"0": 0}')  # of an older version
    write_videos(Counting(), cases, out, model="b", **given)
    assert json.loads((out / "seeds.json").read_text()) == {"0": 0} | FACTS | {"model": "b"}


def test_videos_are_those_of_one_cache(tmp_path):
    cases, out = [Case("a", grey_image(tmp_path / "a.png"))], tmp_path / "out"
    given = {"model": "a", "lengths": (1,), "samples": 1, "log": lambda line: None}
    other = Counting()
    other.cache = "float8"
    for first, second, folder in ((Counting(), other, "one"), (other, Counting(), "two")):
        write_videos(first, cases, out / folder, **given)
        words = f"^cache: expected {first.cache}, as for the videos in .*, got {second.cache}; pass"
        with pytest.raises(ValueError, match=words):
            write_videos(second, cases, out / folder, **given)
        write_videos(first, cases, out / folder, **given)
    assert json.loads((out / "two" / "seeds.json").read_text())["cache"] == "float8"


def test_videos_are_of_one_size_and_precision(tmp_path):
    """An interrupted call at another size would leave VBench a mixture to score."""
    cases, out = [Case("a", grey_image(tmp_path / "a.png"))], tmp_path / "out"
    given = {"model": "a", "lengths": (1,), "log": lambda line: None}
    write_videos(Counting(), cases, out, samples=1, **given)
    wide = Counting()
    wide.width = 2 * WIDTH
    for name, other, words in (
        ("size", wide, "expected 48x32, as for the videos in .*, got 96x32"),
        ("dtype", Counting(torch.bfloat16), "expected float32, as for .*, got bfloat16"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {words}; pass another folder as --out"):
            write_videos(other, cases, out, samples=2, **given)
    assert {path.name for path in (out / "1").iterdir()} == {"a-0.mp4"}


def test_two_calls_never_write_into_one_folder(tmp_path):
    cases, out = [Case("a", grey_image(tmp_path / "a.png"))], tmp_path / "out"
    out.mkdir()
    with folder_lock(out), pytest.raises(FolderInUse):
        write_videos(Counting(), cases, out, model="a", log=print)
    assert not list(out.iterdir())


def test_a_stream_that_fails_leaves_no_video(tmp_path, monkeypatch):
    def fail(self, control):
        raise RuntimeError("broken")

    monkeypatch.setattr(CountingStream, "step", fail)
    cases = [Case("a", grey_image(tmp_path / "a.png"))]
    with pytest.raises(RuntimeError, match="broken"):
        write_videos(
            Counting(), cases, tmp_path / "out", model="a", lengths=(1, 5), log=lambda line: None
        )
    assert not list((tmp_path / "out").rglob("*.mp4*"))


def test_images_are_named_by_their_prompts_or_by_a_list(tmp_path):
    boat, hut = grey_image(tmp_path / "a boat.jpg"), grey_image(tmp_path / "a hut.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert read_cases(tmp_path) == [Case("a boat", boat), Case("a hut", hut)]
    info = tmp_path / "info.json"
    entries = [
        {"prompt_en": "a boat, camera pans left", "image_name": "a boat.jpg", "dimension": ["x"]},
        {"prompt_en": "a boat", "image_name": "a boat.jpg"},
        {"prompt_en": "a boat", "image_name": "a boat.jpg", "dimension": ["y"]},
    ]
    info.write_text(json.dumps(entries))
    expected = [Case("a boat, camera pans left", boat), Case("a boat", boat)]
    assert read_cases(tmp_path, info) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "info: expected a JSON list with prompt_en and image_name per entry"),
        ("{", "info: expected a JSON list with prompt_en and image_name per entry"),
        ('[{"prompt_en": "a", "image_name": "none.png"}]', "images: expected none.png in .*none"),
        ('[{"prompt_en": 5, "image_name": "a.png"}]', "info: expected prompts that can name.*5"),
        ('[{"prompt_en": "a", "image_name": 5}]', "info: expected a JSON list with prompt_en"),
        ('[{"prompt_en": "a/b", "image_name": "a.png"}]', "info: expected prompts that can name"),
        (
            '[{"prompt_en": "a", "image_name": "a.png"}, '
            '{"prompt_en": "a", "image_name": "b.png"}]',
            "info: expected one image per prompt, got two for 'a'",
        ),
    ],
)
def test_lists_that_do_not_fit(tmp_path, content, message):
    grey_image(tmp_path / "a.png"), grey_image(tmp_path / "b.png")
    (tmp_path / "info.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_cases(tmp_path, tmp_path / "info.json")


def test_the_command(tmp_path, capsys, monkeypatch):
    made = Counting()
    monkeypatch.setattr(
        "aapt.streaming.generator.StreamingGenerator.from_pretrained", lambda *_, **__: made
    )
    folder, images = tmp_path / "any", tmp_path / "images"
    folder.mkdir(), images.mkdir()
    for name in ("config.json", "model.safetensors", "vae.safetensors"):
        (folder / name).write_text("{}")
    arguments = ["vbench", str(folder), "--images", str(images), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "aapt: images: expected images named by their prompts" in capsys.readouterr().err
    grey_image(images / "a boat.png")
    assert main([*arguments, "--frames", "5", "--samples", "1"]) == 0
    assert capsys.readouterr().err == "a boat-0\n"
    assert len(greys(tmp_path / "out" / "5" / "a boat-0.mp4")) == 5
    (folder / "model.safetensors").write_text("other weights")
    assert main([*arguments, "--frames", "5", "--samples", "1"]) == 2
    assert "aapt: checkpoint: expected" in capsys.readouterr().err
