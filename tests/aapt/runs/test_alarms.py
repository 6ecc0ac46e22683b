"""Alarms on metrics and samples as runs that failed had them, and none on those that went well."""

import math
import re

import pytest
import torch

from aapt.runs.alarms import WINDOW, Alarms
from aapt.runs.monitor import Monitor
from aapt.runs.samples import LatentStatistics, measures

GOOD = {
    "discriminator": 0.5,
    "r1": 0.2,
    "r2": 0.1,
    "accuracy": 0.85,
    "generator": 0.9,
    "discriminator_gradient": 2.0,
    "generator_gradient": 10.0,
}
AT_CHANCE = GOOD | {"accuracy": 0.45, "discriminator": 0.694}
FLAT = GOOD | {"accuracy": 0.35, "r1": 1e-4, "r2": 1e-4}
SAMPLES = {"motion": 1.0, "late_motion": 0.9, "late_deviation": 0.86, "colour_shift": 0.07}


def said(*phases: dict) -> list[str]:
    """Alarms of a run whose phases last as long as a window each."""
    alarms = Alarms()
    return [text for phase in phases for _ in range(WINDOW) for text in alarms.update(phase)]


@pytest.mark.parametrize(
    "bad, signs",
    [
        (AT_CHANCE, ["the discriminator is at chance: accuracy 0.4. and loss 0.6.*warmup = 60"]),
        (FLAT, [r"logits are flat: penalty \S+ at accuracy 0.3.*discriminator_start = an adv"]),
        (GOOD | {"generator_gradient": 0.5}, ["gradient has collapsed: 0.97 over 20.*10 at first"]),
        (AT_CHANCE | {"r1": 0.0, "r2": 0.0}, ["at chance", "are flat"]),
        (GOOD | {"discriminator": 0.69}, []),
        (GOOD | {"r1": 0.0, "r2": 0.0}, []),
        (GOOD | {"generator_gradient": 2.0}, []),
    ],
)
def test_a_dead_discriminator_is_named_once(bad, signs):
    texts = said(GOOD, bad, bad)
    assert len(texts) == len(signs)
    for text, sign in zip(texts, signs):
        assert re.search(sign, text)


def test_other_losses_have_other_signs():
    """The non-saturating loss is twice as large at chance, and penalties can be off."""
    off = {name: x for name, x in AT_CHANCE.items() if name not in ("r1", "r2")}
    (text,) = said(off | {"discriminator": 2 * math.log(2)})
    assert "at chance: accuracy 0.45 and loss 1.386" in text
    assert said(off | {"discriminator": 1.0}) == []


def test_updates_with_and_without_errors_are_watched_together():
    """Only updates without a lead compare the rollout with its clip."""
    alarms = Alarms()
    compared = AT_CHANCE | {"error": 1.0}
    updates = [AT_CHANCE if step % 3 else compared for step in range(2 * WINDOW)]
    (text,) = [text for update in updates for text in alarms.update(update)]
    assert "at chance" in text


def test_a_sign_that_comes_back_is_said_again():
    assert said(GOOD, GOOD) == []
    assert len(said(AT_CHANCE, GOOD, AT_CHANCE)) == 2


def test_a_discriminator_alone_rings_no_alarm():
    """A warm-up begins at chance, and other stages have no discriminator."""
    warming = {name: x for name, x in AT_CHANCE.items() if not name.startswith("generator")}
    assert said(warming, warming, {"loss": math.log(2), "gradient": 0.0}) == []


@pytest.mark.parametrize(
    "bad, sign",
    [
        ({"motion": 0.1}, "hardly move: 0.10 of the real motion; try regression with fewer"),
        ({"late_motion": 0.2}, "hardly move: 0.20"),
        ({"late_deviation": 0.1}, "fade: late latents have 0.10"),
        ({"late_deviation": 7.9}, "blow up: late latents have 7.9 times.*output_clamp = 8"),
        ({"colour_shift": 0.61}, "drift: late mean colours are off by 0.61.*more segments"),
    ],
)
def test_bad_samples_are_named_once(bad, sign):
    alarms = Alarms()
    assert alarms.sheet(SAMPLES) == []
    (text,) = alarms.sheet(SAMPLES | bad)
    assert re.search(sign, text)
    assert alarms.sheet(SAMPLES | bad) == alarms.sheet(SAMPLES) == []


def rolled(frames: torch.Tensor) -> LatentStatistics:
    made = LatentStatistics()
    assert torch.equal(torch.cat(list(made.gathering(frames.split(1, dim=2))), dim=2), frames)
    return made


def test_measures_are_those_of_whole_tensors():
    torch.manual_seed(0)
    real, made = torch.randn(2, 3, 9, 4, 5), 0.5 * torch.randn(2, 3, 20, 4, 5) + 0.3

    def change(x):
        return x.diff(dim=2).square().mean(dim=(0, 1, 3, 4)).sqrt().mean()

    def deviation(x):
        return x.var(dim=(3, 4), correction=0).mean(dim=(0, 1)).sqrt().mean()

    expected = {
        "motion": change(made[:, :, :9]) / change(real),
        "late_motion": change(made[:, :, -7:]) / change(real),
        "late_deviation": deviation(made[:, :, -6:]) / deviation(real),
        "colour_shift": (made[:, :, -6:].mean(dim=(2, 3, 4)) - real.mean(dim=(2, 3, 4)))
        .square()
        .mean()
        .sqrt(),
    }
    found = measures(rolled(made), real)
    assert found == {name: pytest.approx(x.item(), rel=1e-4) for name, x in expected.items()}
    still = measures(rolled(real[:, :, :1].expand(-1, -1, 9, -1, -1)), real)
    assert still["motion"] == still["late_motion"] == 0


def test_a_resumed_run_is_compared_with_its_beginning(tmp_path, capsys):
    """A gradient that fell before the interruption has fallen."""

    def metrics(gradient):
        return {"accuracy": 0.8, "discriminator": 0.4, "generator_gradient": gradient}

    with Monitor(tmp_path, "adversarial", steps=2 * WINDOW) as monitor:
        for step in range(WINDOW):
            monitor.update(step, metrics(1.0))
    with Monitor(tmp_path, "adversarial", steps=2 * WINDOW, start_step=WINDOW) as monitor:
        for step in range(WINDOW, 2 * WINDOW):
            monitor.update(step, metrics(0.01))
    assert "gradient" in (tmp_path / "alarms.txt").read_text()


def test_alarms_are_printed_and_kept(tmp_path, capsys):
    with Monitor(tmp_path, "adversarial", steps=2 * WINDOW) as monitor:
        for step in range(2 * WINDOW):
            monitor.update(step, GOOD if step < WINDOW else AT_CHANCE)
        monitor.sheet(step, SAMPLES | {"motion": 0.0})
    chance, still = (tmp_path / "alarms.txt").read_text().splitlines()
    assert re.match(r"adversarial 3\d: alarm: the discriminator is at chance", chance)
    assert still.startswith("adversarial 40: alarm: the samples hardly move: 0.00")
    error = capsys.readouterr().err
    assert chance in error and still in error


def test_alarms_of_updates_that_are_made_again_are_cut_off(tmp_path, capsys):
    """A state holds 30 updates of a run that was killed as it said another alarm."""
    file = tmp_path / "alarms.txt"
    with Monitor(tmp_path, "adversarial", steps=60) as monitor:
        for step in range(30):
            monitor.update(step, AT_CHANCE)
        monitor.sheet(29, SAMPLES | {"motion": 0.0})
        kept = file.read_text()
        assert kept.count("alarm") == 2 and "adversarial 30:" in kept
        monitor.sheet(39, SAMPLES | {"late_deviation": 0.0})
    later = file.read_text()
    assert later.startswith(kept) and later != kept
    with file.open("a") as lines:
        lines.write("adversarial 40: al")
    with Monitor(tmp_path, "adversarial", steps=60, start_step=30):
        assert file.read_text() == kept
    with Monitor(tmp_path, "adversarial", steps=60):
        assert file.read_text() == ""
