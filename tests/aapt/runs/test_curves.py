"""Curves of training metrics, and the command that draws them."""

import builtins
import json
import math

import numpy as np
import pytest
from PIL import Image

from aapt.commands.app import main
from aapt.media.figures import path_labels
from aapt.runs.curves import metric_panels, plot_metrics, read_runs, running_mean


def lines(count=40, **metrics):
    """Rows whose metrics are functions of the step."""
    return [
        {"step": step, "seconds": step / 2} | {name: f(step) for name, f in metrics.items()}
        for step in range(count)
    ]


def write(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def adversarial():
    rows = lines(discriminator=lambda s: 1.0, r1=lambda s: 0.1, discriminator_gradient=lambda s: s)
    for row in rows[10:]:  # after the warm-up
        row |= {"generator": 2.0, "accuracy": 0.5, "generator_gradient": 3.0}
    return rows


def test_losses_and_norms_share_a_panel():
    assert metric_panels({"a": adversarial()}) == {
        "losses": ["discriminator", "generator"],
        "gradient norms": ["discriminator_gradient", "generator_gradient"],
        "penalties": ["r1"],
        "accuracy": ["accuracy"],
    }
    assert metric_panels({"a": lines(loss=abs, psnr=abs)}) == {"losses": ["loss"], "psnr": ["psnr"]}


def test_the_running_mean_against_a_loop():
    values = np.random.default_rng(0).normal(size=300)
    values[[20, 21, 299]] = math.nan, math.inf, -math.inf
    half = 6  # 4 % of 300 points
    expected = []
    for place in range(300):
        near = values[max(0, place - half) : place + half + 1]
        expected.append(near[np.isfinite(near)].mean())
    np.testing.assert_allclose(running_mean(values), expected, atol=1e-12)
    assert np.isnan(running_mean(np.full(3, math.nan))).all()
    assert running_mean(np.array([2.0])).tolist() == [2.0]


def test_each_metric_is_drawn_raw_and_smoothed():
    figure = plot_metrics({"a": adversarial()})
    losses, norms, penalties, accuracy = figure.axes
    assert [axis.get_yscale() for axis in figure.axes] == ["linear", "log", "log", "linear"]
    raw, mean, late, _ = losses.get_lines()
    assert raw.get_xdata()[-1] == 39 and late.get_xdata()[0] == 10
    assert raw.get_color() == mean.get_color() != late.get_color()
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [
        "discriminator",
        "generator",
    ]
    assert accuracy.get_legend() is None and figure.get_suptitle() == "a"


def test_runs_differ_in_colour_and_their_metrics_in_line():
    figure = plot_metrics({"a": adversarial(), "b": lines(discriminator=float, extra=float)})
    losses = [line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")]
    assert [line.get_label() for line in losses] == [
        "a: discriminator",
        "a: generator",
        "b: discriminator",
    ]
    assert losses[0].get_color() == losses[1].get_color() != losses[2].get_color()
    assert losses[0].get_linestyle() == losses[2].get_linestyle() != losses[1].get_linestyle()


def test_runs_are_named_by_the_ends_of_their_paths(tmp_path):
    for name in ("first/diffusion", "second/diffusion", "second/adversarial"):
        write(tmp_path / name, lines(3, loss=float))
    one = read_runs([tmp_path / "first" / "diffusion"])
    assert list(one) == ["diffusion"] and len(one["diffusion"]) == 3
    assert list(read_runs([tmp_path / "second"])) == ["adversarial", "diffusion"]
    write(tmp_path / "second" / "regression", [])  # its first update is under way
    assert list(read_runs([tmp_path / "second"])) == ["adversarial", "diffusion"]
    file = tmp_path / "second" / "diffusion" / "metrics.jsonl"
    assert list(read_runs([tmp_path / "first", file])) == ["first/diffusion", "second/diffusion"]
    with pytest.raises(ValueError, match="expected different paths, got .*first/diff"):
        read_runs([tmp_path / "first", tmp_path / "first" / "diffusion"])
    assert path_labels(["runs/truth", "./b/"], taken=["truth"]) == ["runs/truth", "b"]


def test_the_command_draws_a_picture(tmp_path, capsys):
    run = write(tmp_path / "run", adversarial())
    out = tmp_path / "plot.png"
    assert main(["plot", str(run), "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.width > 1000 and np.asarray(picture.convert("L")).std() > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "run"]
    assert capsys.readouterr().err == ""


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys, monkeypatch):
    empty = write(tmp_path / "empty", [])
    run = write(tmp_path / "run", adversarial())
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("hello\n")
    for arguments, code, message in [
        ([tmp_path / "none", "--out", "a.png"], 2, "none: expected a folder or file of metrics"),
        ([foreign, "--out", "a.png"], 2, "line 1: expected a JSON object"),
        ([empty, "--out", "a.png"], 2, "expected at least one line of metrics, got none in ['em"),
        ([run, "--out", "a.jpg"], 2, "out: expected a .png file, got a.jpg"),
        ([run, "--out", tmp_path / "none" / "a.png"], 1, "No such file or directory"),
    ]:
        assert main(["plot", *map(str, arguments)]) == code
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1

    real_import = builtins.__import__

    def without_matplotlib(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert main(["plot", str(run), "--out", str(tmp_path / "a.png")]) == 1
    assert "matplotlib: expected to be installed" in (said := capsys.readouterr().err)
    assert "pip install 'aapt[train]'" in said and said.count("\n") == 1
