"""Walks: trees of steps, their JSON lines, and replays."""

import json

import numpy as np
import pytest

from aapt import Control, StreamingGenerator
from aapt.streaming.actions import (
    Redone,
    Replay,
    Step,
    Walk,
    frames_crc,
    load_walk,
    make,
    read_walk,
)

from .test_generator import HEIGHT, WIDTH, build


@pytest.fixture(scope="module")
def generator():
    model, vae = build()
    return StreamingGenerator(model, vae, height=HEIGHT, width=WIDTH, prompts=["ab"])


@pytest.fixture
def walk():
    """Branch 1 leaves branch 0 after step 3, branch 2 leaves branch 1 after step 5, and branch 3
    leaves branch 2 in the past that it shares with branch 0."""
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    walk = Walk("small", "5e0c", picture, "ab", seed=3)
    for number in range(8):
        walk.append(0, number, Step(number / 10, 1.0, "ab" if number < 2 else "cd"))
    for branch, start in ((0, 3), (1, 5), (2, 2)):
        prompt = "ef" if branch else "cd"
        for number in range(start, start + 4):
            branch = walk.append(branch, number, Step(-number / 10, 0.5, prompt))
    return walk


def yaws(walk, branch):
    return [step.yaw for step in walk.path(branch, walk.branches[branch].end)]


def test_a_path_is_that_of_the_parents_up_to_the_branch(walk):
    assert [(b.parent, b.start, b.end) for b in walk.branches] == [
        (None, 0, 8),
        (0, 3, 7),
        (1, 5, 9),
        (0, 2, 6),
    ]
    assert yaws(walk, 0) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert yaws(walk, 1) == [0.0, 0.1, 0.2, -0.3, -0.4, -0.5, -0.6]
    assert yaws(walk, 2) == [0.0, 0.1, 0.2, -0.3, -0.4, -0.5, -0.6, -0.7, -0.8]
    assert yaws(walk, 3) == [0.0, 0.1, -0.2, -0.3, -0.4, -0.5]
    for branch in range(4):
        whole = walk.path(branch, walk.branches[branch].end)
        for step in range(len(whole) + 1):
            assert walk.path(branch, step) == whole[:step]
            assert walk.prompt_at(branch, step) == (whole[step - 1].prompt if step else "ab")
    assert walk.steps == 8 + 3 * 4


def test_lines_hold_the_whole_walk(walk, tmp_path):
    walk.branches[3].steps[1] = Step(0.5, 1.0, "gh", 17, (Redone(0.0, 1.0, 2),), together=3)
    file = tmp_path / "walk.jsonl"
    file.write_text("\n".join(walk.lines("0.1.0")))
    again = read_walk(file)
    assert np.array_equal(again.first_frame, walk.first_frame)
    assert again.branches == walk.branches
    assert (again.model, again.digest, again.prompt, again.seed) == ("small", "5e0c", "ab", 3)
    # A prompt is written where it changes, on the path and not in the file
    lines = [json.loads(line) for line in walk.lines("0.1.0")]
    assert [line["prompt"] for line in lines if "prompt" in line] == [
        "ab",
        "cd",
        "ef",
        "ef",
        "gh",
        "ef",
    ]


def test_a_copy_is_a_walk_of_its_own(walk):
    copy = walk.copy()
    copy.append(0, 8, Step(0.0, 0.0, "ab"))
    assert (walk.branches[0].end, copy.branches[0].end) == (8, 9)


def play(generator, walk):
    """Plays the walk's controls and notes the CRC-32 of every step."""
    stream = generator.open(walk.first_frame, walk.prompt, walk.seed)
    start, frames = stream.snapshot(), {}
    for number, branch in enumerate(walk.branches):
        stream.restore(start)
        for step in walk.path(number, branch.start):
            make(stream, step)
        for index, step in enumerate(branch.steps):
            made = make(stream, step)
            branch.steps[index] = step._replace(crc=frames_crc(made))
            frames[number, branch.start + index + 1] = made
    return frames


def test_a_replay_makes_the_same_bits(generator, walk):
    frames = play(generator, walk)
    again = load_walk(walk.lines("0.1.0"))
    for branch in range(4):
        stream = Replay(generator, again)
        for number, step in enumerate(again.path(branch, again.branches[branch].end), start=1):
            made = stream.step(step)
            if number > again.branches[branch].start:
                assert np.array_equal(made, frames[branch, number])
        assert stream.differing == []
        stream.close()


def test_a_replay_names_the_steps_that_differ(generator, walk):
    play(generator, walk)
    walk.branches[0].steps[4] = walk.branches[0].steps[4]._replace(yaw=-1.0)
    stream = Replay(generator, walk)
    for step in walk.path(0, 8):
        stream.step(step)
    assert stream.differing == [5, 6, 7, 8]


def test_a_replay_compares_up_to_the_first_shared_pass(generator, walk):
    play(generator, walk)
    steps = walk.branches[0].steps
    steps[1] = steps[1]._replace(crc=1)
    steps[4] = steps[4]._replace(crc=1, together=2)
    steps[6] = steps[6]._replace(crc=1)
    stream = Replay(generator, load_walk(walk.lines("0.1.0")))
    for step in walk.path(0, 8):
        stream.step(step)
    assert (stream.differing, stream.shared) == ([2], 5)


def test_a_step_made_again_is_replayed_as_it_was_shown(generator, walk):
    stream = generator.open(walk.first_frame, "ab", seed=3)
    before = stream.snapshot()
    passes = []
    for control in (Control(1.0, 0.0), Control(-1.0, 0.0), Control(0.0, 1.0)):
        stream.restore(before)
        passes.append(stream.step(control))
    following = stream.step(Control())
    redone = (Redone(1.0, 0.0, 1), Redone(-1.0, 0.0, 3))
    replay = Replay(generator, walk)
    shown = replay.step(Step(0.0, 1.0, "ab", frames_crc(passes[2]), redone))
    expected = np.concatenate([passes[0][:1], passes[1][1:3], passes[2][3:]])
    assert np.array_equal(shown, expected) and replay.differing == []
    assert np.array_equal(replay.step(Step(0.0, 0.0, "ab")), following)


def broken(walk, number, changes):
    lines = list(walk.lines("0.1.0"))
    line = json.loads(lines[number]) | changes
    lines[number] = json.dumps({name: value for name, value in line.items() if value is not None})
    return lines


@pytest.mark.parametrize(
    "number, changes, words",
    [
        (0, {"walk": 2}, "line 1: walk: expected 1, got 2"),
        (0, {"seed": -1}, "line 1: seed: expected an integer from 0 to"),
        (0, {"seed": True}, "line 1: seed: expected int, got True"),
        (0, {"size": [48]}, r"line 1: size: expected \[height, width\], got \[48\]"),
        (0, {"size": [48, 0]}, r"line 1: size: expected \[height, width\], got \[48, 0\]"),
        (0, {"size": "64x48"}, "line 1: size: expected .* got '64x48'"),
        (0, {"prompt": 5}, "line 1: prompt: expected str, got 5"),
        (0, {"first_frame": "AAAA"}, "line 1: first_frame: expected a PNG in base64"),
        (0, {"first_frame": "?"}, "line 1: first_frame: expected a PNG in base64"),
        (2, {"step": 7}, "line 3: step: expected 2, got 7"),
        (2, {"yaw": 2.0}, r"line 3: yaw: expected a number in \[-1, 1\], got 2.0"),
        (2, {"forward": None}, r"line 3: forward: expected a number in"),
        (2, {"crc": "x"}, "line 3: crc: expected int, got 'x'"),
        (2, {"redone": [[0.0]]}, r"line 3: redone: expected \[yaw, forward, frames\]"),
        (2, {"redone": 3}, "line 3: redone: expected list, got 3"),
        (2, {"together": 0}, "line 3: together: expected at least 1, got 0"),
        (9, {"branch": 4}, "line 10: branch: expected 1, got 4"),
        (9, {"parent": 1}, "line 10: branch: expected a number below 1, got 1"),
        (9, {"from": 9}, "line 10: step: expected at most 8 in branch 0, got 9"),
        (14, {"from": 1}, "line 15: from: expected at least 3 in branch 1, got 1"),
    ],
)
def test_broken_lines_are_refused_by_name(walk, number, changes, words):
    with pytest.raises(ValueError, match=f"walk: {words}"):
        load_walk(broken(walk, number, changes))


@pytest.mark.parametrize(
    "lines, words",
    [
        ([], "walk: expected JSON lines of an action log, got none"),
        (["no"], "walk: line 1: expected JSON, got 'no': Expecting value"),
        (["[1]"], r"walk: line 1: expected an object, got '\[1\]'"),
        (["[" * 100_000], "walk: line 1: "),
        (["{}"], "walk: line 1: walk: expected 1, got None"),
    ],
)
def test_other_files_are_refused_by_name(lines, words):
    with pytest.raises(ValueError, match=words):
        load_walk(lines)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="walk: cannot read .*: No such file"):
        read_walk(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="walk: expected a text file, got .*: not UTF-8"):
        read_walk(tmp_path / "bytes")
