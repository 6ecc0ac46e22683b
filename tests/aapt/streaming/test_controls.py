"""Control scripts: presets and files, and what a step sees of them."""

import itertools
import json

import pytest

from aapt.model.conditioning import Control
from aapt.streaming.controls import FORWARD_RANGE, PRESETS, YAW_RANGE, load_controls


def steps(script, count):
    return [(c.yaw, c.forward) for c in itertools.islice(script, count)]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_stay_inside_the_trained_range_and_start_over(name):
    script = load_controls(name)
    period = round(script.seconds / script.step_seconds)
    assert period * script.step_seconds == pytest.approx(script.seconds)
    first = steps(script, 2 * period)
    assert first[:period] == first[period:]
    for yaw, forward in first:
        assert YAW_RANGE[0] <= yaw <= YAW_RANGE[1]
        assert FORWARD_RANGE[0] <= forward <= FORWARD_RANGE[1]


def test_presets_do_what_they_are_called():
    assert set(steps(load_controls("still"), 9)) == {(0.0, 0.0)}
    assert set(steps(load_controls("forward"), 9)) == {(0.0, 1.0)}
    (left,) = set(steps(load_controls("turn-left"), 9))
    (right,) = set(steps(load_controls("turn-right"), 9))
    assert left[0] < 0 < right[0] and left[1] == right[1] == 0
    looked = steps(load_controls("look-around"), 45)
    assert sum(yaw for yaw, _ in looked) == pytest.approx(0) and min(looked) < (0, 0) < max(looked)


def test_text_file_gives_one_control_per_step(tmp_path):
    file = tmp_path / "walk.txt"
    file.write_text("\ufeff# a comment\n0.5 w  # ahead\n\n0.5 WD\n 0.5 -\n0.5 s\n")
    script = load_controls(file)
    assert script.seconds == 2
    expected = [(0, 1)] * 3 + [(1, 1)] * 3 + [(0, 0)] * 3 + [(0, -0.4)] * 3
    assert steps(script, 14) == expected + [(0, 1)] * 2
    assert isinstance(next(iter(script)), Control)


def test_pieces_keep_time_whatever_the_step(tmp_path):
    file = tmp_path / "walk.txt"
    file.write_text("0.7 a\n0.9 d\n")
    seen = steps(load_controls(file, step_seconds=0.1), 32)
    assert [yaw for yaw, _ in seen] == ([-1] * 7 + [1] * 9) * 2


def test_json_file_says_what_a_text_file_says(tmp_path):
    file = tmp_path / "walk.json"
    file.write_text(json.dumps([{"seconds": 1, "yaw": -0.25, "forward": 0.5}, {"seconds": 0.5}]))
    assert steps(load_controls(file), 10) == [(-0.25, 0.5)] * 6 + [(0, 0)] * 3 + [(-0.25, 0.5)]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", "1 w\ntwo w\n", "line 2: seconds: expected a number, got 'two'"),
        ("a.txt", "0 w\n", "line 1: seconds: expected a finite number above 0, got 0.0"),
        ("a.txt", "nan w\n", "line 1: seconds: expected a finite number above 0, got nan"),
        ("a.txt", "inf w\n", "line 1: seconds: expected a finite number above 0, got inf"),
        (
            "a.txt",
            "1 x\n",
            "line 1: keys: expected - or any of w a s d, each once and no opposites",
        ),
        ("a.txt", "1 ws\n", "no opposites, got 'ws'"),
        ("a.txt", "1 w-\n", "no opposites, got 'w-'"),
        ("a.txt", "1 w d\n", "line 1: expected '<seconds> <keys>' such as '2.0 wd', got '1 w d'"),
        ("a.txt", "w\n", "line 1: expected '<seconds> <keys>'"),
        ("a.txt", "# nothing\n", "expected at least one piece such as '2.0 w', got none"),
        ("a.json", "[\n{]", "line 2: expected JSON"),
        ("a.json", "{}", "expected a list of pieces, got dict"),
        ("a.json", "[]", "expected at least one piece"),
        ("a.json", "[" * 100_000, "expected a flat list of pieces, got deep nesting"),
        ("a.json", '[{"yaw": 1}]', "piece 1: expected an object of seconds and, where not 0, yaw"),
        ("a.json", '[{"seconds": 1, "pitch": 1}]', 'got {"seconds": 1, "pitch": 1}'),
        (
            "a.json",
            '[{"seconds": "1"}]',
            "piece 1: seconds: expected a finite number above 0, got '1'",
        ),
        (
            "a.json",
            '[{"seconds": 1, "yaw": 2}]',
            "piece 1: yaw: expected a number in [-1, 1], got 2",
        ),
        (
            "a.json",
            '[{"seconds": 1, "forward": -1}]',
            "forward: expected a number in [-0.4, 1], got -1",
        ),
        ("a.json", '[{"seconds": 1, "yaw": NaN}]', "yaw: expected a number in [-1, 1], got nan"),
        ("a.json", '[{"seconds": true}]', "seconds: expected a finite number above 0, got True"),
    ],
)
def test_errors_name_the_file_the_place_and_what_was_there(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        load_controls(file)
    assert message in str(error.value) and str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_and_unreadable_scripts(tmp_path):
    with pytest.raises(ValueError, match="got 'wlak'; did you mean walk?"):
        load_controls("wlak")
    with pytest.raises(ValueError, match="expected a file or one of walk, still, .*got 'qqqq'$"):
        load_controls("qqqq")
    with pytest.raises(ValueError, match="cannot read .*: Is a directory"):
        load_controls(tmp_path)
    (tmp_path / "binary").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="expected a text file, got .*binary: not UTF-8"):
        load_controls(tmp_path / "binary")
