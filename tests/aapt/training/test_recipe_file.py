"""Recipes of users: files and settings, and what they are told of a mistake."""

import dataclasses

import pytest

from aapt.commands.app import main
from aapt.training.curriculum import Phase, Source
from aapt.training.recipe_file import load_recipe
from aapt.training.recipes import paper_8b, tiny_world, vae_light, wan_1_3b

FOXES = """
base = "wan-1.3b"
seed = 3
new_channels = "random"

[model]
window_frames = 11

[stages]
extension = "none"

[stages.consistency]
max_norm = "none"

[stages.adversarial]
steps = 800
judgement = "clip"
average = "none"
penalty = 100
generator_schedule = {learning_rate = 1e-6}
corruption = {offset = 1.5}

[stages.second]
like = "adversarial"
start = "adversarial"
batch = 32

[[stages.diffusion.curriculum.phases]]
steps = 10
batch = 8
sources = [{clips = "832x480", frames = 20}, {clips = "480x832", frames = 20, shortest = 8}]
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def written(text: str) -> str:
        (tmp_path / "foxes.toml").write_text(text)
        return "foxes.toml"

    return written


def test_names_give_the_recipes():
    assert load_recipe("paper-8b") == paper_8b()
    assert load_recipe("vae-light") == vae_light()


def test_a_file_changes_what_it_names_and_nothing_else(write):
    made, base = load_recipe(write(FOXES)), wan_1_3b()
    assert (made.name, made.seed, made.new_channels) == ("foxes", 3, "random")
    assert made.model == dataclasses.replace(base.model, window_frames=11)
    before, after = base.stages, made.stages
    assert list(after) == ["diffusion", "consistency", "regression", "adversarial", "second"]
    assert after["regression"] == before["regression"]
    assert after["consistency"] == dataclasses.replace(before["consistency"], max_norm=None)
    sources = Source("832x480", 20), Source("480x832", 20, shortest=8)
    assert after["diffusion"].curriculum.phases == (Phase(10, 8, sources),)
    adversarial = after["adversarial"]
    assert (adversarial.steps, adversarial.judgement, adversarial.average) == (800, "clip", None)
    assert type(adversarial.penalty) is float and adversarial.penalty == 100
    rate = dataclasses.replace(before["adversarial"].generator_schedule, learning_rate=1e-6)
    assert adversarial.generator_schedule == rate
    assert adversarial.corruption.offset == 1.5
    assert after["second"] == dataclasses.replace(adversarial, start="adversarial", batch=32)


def test_settings_that_need_each_other_change_at_once():
    """The length of a segment stands beside a set, and in sources where there are several."""
    place = "stages.adversarial"
    set_ = f"{place}.clips=640x352", f"{place}.segment_frames=30", f"{place}.segment_frames=60"
    stage = load_recipe("paper-8b", set_).stages["adversarial"]
    assert (stage.clips, stage.segment_frames) == ("640x352", 60)
    with pytest.raises(ValueError, match="segment_frames: expected frames per segment beside"):
        load_recipe("paper-8b", set_[:1])
    back = [f'{place}.clips=[{{clips="736x416", frames=30}}]']
    assert load_recipe("paper-8b", back).stages["adversarial"].sources == (Source("736x416", 30),)


def test_settings_come_after_the_file(write):
    settings = ["stages.second.batch=16", "name=cubs", "stages.adversarial.judgement=frame"]
    source = '{clips="832x480", frames=20}'
    phase = f"{{steps=1, batch=2, sources=[{source}]}}"
    settings.append(f"stages.diffusion.curriculum.phases=[{phase}]")
    made = load_recipe(write(FOXES), settings)
    assert made.name == "cubs" and made.stages["second"].batch == 16
    assert made.stages["adversarial"].judgement == "frame"
    assert made.stages["diffusion"].curriculum.phases == (Phase(1, 2, (Source("832x480", 20),)),)
    named = load_recipe("tiny-world", ["vae=none", "camera.yaw_step=0.5", "data.clips.clips=7"])
    assert named.vae is None and named.camera.yaw_step == 0.5 and named.data["clips"].clips == 7
    assert named.stages == tiny_world().stages
    without = ["stages.regression=none", "stages.adversarial.start=consistency"]  # one needs both
    assert "regression" not in load_recipe("wan-1.3b", without).stages
    light = load_recipe("vae-light", ["decoder.steps=3"])
    assert light.decoder.steps == 3 and light.data == vae_light().data


STAGES = "diffusion, consistency, regression, adversarial, extension"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base = 1", r"base: expected one of tiny-world, .*, got 1$"),
        ("seed = 1", r"base: expected one of tiny-world, .*, got None$"),
        ("base = ", r"expected TOML, got an error: Invalid value"),
        ("size = 1", r"size: expected one of name, seed, .*, got 'size'$"),
        ("[model]\nwide = 1", r"model\.wide: expected one of width, heads, .*, got 'wide'$"),
        ("[model]\nwidth = 1.5", r"model\.width: expected an integer, got 1\.5$"),
        ("[model]\nwidth = true", r"model\.width: expected an integer, got True$"),
        ("[model]\nwidth = 1537", r"model\.width: expected heads \* head_dim = 1536, got 1537$"),
        ("model = 3", r"model: expected a table, got 3$"),
        ("[model]\nrope_axes = [1, 2]", r"model\.rope_axes: expected 3 values, got 2$"),
        ("[model]\nrope_axes = 7", r"model\.rope_axes: expected a list, got 7$"),
        ("[stages.x]\nsteps = 1", rf"stages\.x: expected one of {STAGES}, or a new one that copi"),
        (
            "[stages]\nx = 1",
            rf"stages\.x: expected one of {STAGES}, or .*; give like = one of them",
        ),
        ("[stages]\nregression = 1", r'stages\.regression: expected a table or "none", got 1$'),
        (
            "[stages.adversarial]\njudgement = 'all'",
            r"stages\.adversarial\.judgement: expected 'frame' or 'clip' or 'both', got 'all'$",
        ),
        (
            "[stages.adversarial]\noverlap_frames = 20",
            r"stages\.adversarial\.overlap_frames: expected 0 to less than a segment, got 20$",
        ),
        (
            "[stages.adversarial]\ndiscriminator_recycled = false",
            r"stages\.adversarial\.discriminator_recycled: expected true for Wan's block, .*false$",
        ),
        (
            "[stages.adversarial]\naverage = 'no'",
            r"stages\.adversarial\.average: expected a number or \"none\", got 'no'$",
        ),
        (
            "[[stages.diffusion.curriculum.phases]]\nsteps = 1",
            r"stages\.diffusion\.curriculum\.phases\[0\]: expected batch, sources as well, got "
            r"{'steps': 1}$",
        ),
        (
            "[stages]\nregression = 'none'",
            r"stages\.adversarial\.start: expected a stage before it \(diffusion, consistency\), "
            r"got 'regression'$",
        ),
        (
            "[stages.adversarial]\nmixed_with = 'second'",
            r"stages\.adversarial\.mixed_with: expected a stage before it \(diffusion, .*"
            r"got 'second'$",
        ),
        (
            "[stages.second]\nlike = 'adversarial'\ndiscriminator_start = 'third'",
            r"stages\.second\.discriminator_start: expected a stage before it \(diffusion, .*"
            r"extension\), got 'third'$",
        ),
    ],
)
def test_mistakes_are_named(write, text, words):
    text = text if text.startswith(("base", "seed")) else 'base = "wan-1.3b"\n' + text
    with pytest.raises(ValueError, match=f"^(foxes.toml: )?{words}"):
        load_recipe(write(text))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("steps", "set: expected KEY=VALUE, got 'steps'"),
        ("=1", "set: expected KEY=VALUE, got '=1'"),
        (
            "stages.adversarial.steps=1.5",
            r"stages.adversarial.steps: expected an integer, got 1\.5",
        ),
        ("name.x=1", r"name: expected a text, got {'x': 1}"),
        (
            "name=../x",
            r"name: expected the name of a folder beside those of stages .*'\.\./x'; give",
        ),
        ("name=", r"name: expected the name of a folder beside .*, got ''; give another name$"),
        ("name=diffusion", r"name: expected the name of a folder beside .*, got 'diffusion'"),
        ("stages.a/b.like=diffusion", r"stages\.a/b: expected the name of a folder beside .*'a/b'"),
        ("seed=-1", r"seed: expected an integer from 0 to 2\*\*63 - 1, got -1$"),
        (
            "stages.adversarial.steps=0",
            r"stages\.adversarial: expected steps of 1 or more, got 0; leave a stage out with",
        ),
        ("stages.regression.batch=0", r"stages\.regression: expected batch of 1 or more, got 0;"),
        ("stages.adversarial.segments=0", r"stages\.adversarial: expected segments of 1 or more"),
        ("stages.regression.segment_frames=0", r"stages\.regression: expected frames of 1 or more"),
        (
            "stages.diffusion.curriculum.phases=[]",
            r"stages\.diffusion: expected a phase with sources, got none$",
        ),
        (
            "stages.adversarial.generator_schedule.learning_rate=nan",
            r"stages\.adversarial\.generator_schedule\.learning_rate: expected a number, got nan$",
        ),
        (
            "stages.adversarial.penalty=1" + 400 * "0",
            r"stages\.adversarial\.penalty: expected a number, got 10+$",
        ),
        (
            "stages.diffusion=none",
            r"stages\.consistency\.start: .* before it \(none is\), got 'diff",
        ),
        (
            "stages.adversarial.judgement=both",
            r"stages\.extension\.judgement: expected 'both' as in adversarial, whose discriminator "
            r"it starts from, got 'frame'; change both, or stages\.extension\.discriminator_start$",
        ),
        ("stages.extension.pooling=average", r"stages\.extension\.pooling: expected 'query' as in"),
    ],
)
def test_settings_that_are_wrong(setting, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        load_recipe("wan-1.3b", [setting])


def test_the_command_says_it_in_one_line(write, capsys, tmp_path):
    assert main(["train", "none.toml"]) == 2
    assert capsys.readouterr().err == (
        "aapt: none.toml: cannot be read: No such file or directory\n"
    )
    assert main(["train", write('base = "vae-light"\n'), "--stage", "adversarial"]) == 2
    assert capsys.readouterr().err == (
        "aapt: stage: expected none for the recipe foxes, got ['adversarial']\n"
    )
    assert main(["train", "foxes.toml", "--set", "decoder.steps=no"]) == 2
    assert capsys.readouterr().err == "aapt: decoder.steps: expected an integer, got 'no'\n"
    assert not (tmp_path / "runs").exists()


def test_the_plan_prints_commands_for_the_file(write, capsys):
    small = 'base = "tiny-world"\n[stages]\nfurther-adversarial = "none"\nfinal = "none"\n'
    setting = "stages.adversarial.steps=3 # less"
    assert main(["train", write(small), "--plan", "--gpus", "1", "--set", setting]) == 0
    said = capsys.readouterr().out
    assert f"-m aapt train foxes.toml '--set={setting}'" in said
    assert "further-adversarial" not in said
