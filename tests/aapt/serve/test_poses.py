"""Worlds of a model that follows poses: held poses, looping motions, and all that keys can do."""

import json

import numpy as np
import pytest

from aapt import Pose

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt.commands.app import main  # noqa: E402
from aapt.serve.client import Client, Refused  # noqa: E402
from aapt.serve.protocol import SAVED, SEEK, parse  # noqa: E402
from aapt.serve.server import PlayServer  # noqa: E402
from aapt.serve.settings import Settings  # noqa: E402
from aapt.streaming.actions import RedonePose, Replay, load_walk  # noqa: E402
from aapt.streaming.figure import PoseGoal, next_pose  # noqa: E402
from aapt.streaming.poses import PRESETS, load_poses  # noqa: E402

from ..streaming.test_generator import HEIGHT, WIDTH  # noqa: E402
from ..streaming.test_poses import build  # noqa: E402
from .pose_checkpoint import pose_checkpoint  # noqa: E402
from .test_play import (  # noqa: E402
    encoded,
    followed_under_another_prompt,
    get_log,
    held_for_redo,
    opened,
    redone,
    step_to,
    video,
)

STILL = load_poses("still").first.points[0]
ASPECT = WIDTH / HEIGHT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return pose_checkpoint(tmp_path_factory.mktemp("world") / "small-puppet")


@pytest.fixture(scope="module")
def generator(checkpoint):
    from aapt import StreamingGenerator

    return StreamingGenerator.from_pretrained(checkpoint)


def shares(points):
    return [(x, y) if seen else None for x, y, seen in points.tolist()]


def raised(height=0.2):
    """The still figure with its right hand up by a share of the image's height."""
    points = STILL.copy()
    points[4, 1] -= height
    return points


def poses_of(walk, branch=None):
    branch = len(walk.branches) - 1 if branch is None else branch
    return [step.pose.points for step in walk.path(branch, walk.branches[branch].end)]


def test_a_client_learns_of_the_figure(serve, talk):
    async def conversation():
        async with await Client.connect(serve().url) as client:
            await client.send("open", image="sample")
            return client.welcome, await client.text("posed")

    welcome, posed = talk(conversation())
    assert welcome["driven_by"] == "pose" and welcome["figure"]["motions"] == list(PRESETS)
    assert welcome["figure"]["points"][4] == "right wrist"
    assert len(welcome["figure"]["limbs"]) == len(welcome["figure"]["colours"]) == 13
    assert welcome["figure"]["colours"][0] == "#ff0000"
    assert (posed["branch"], posed["step"]) == (0, 0)
    assert posed["poses"] == [[list(point) for point in shares(STILL)]]


def test_a_pose_is_reached_smoothly_told_and_replayed_bit_for_bit(serve, talk, generator):
    target = raised()

    async def conversation():
        async with await Client.connect(serve().url) as client:
            await opened(client)
            sequence = await client.pose(shares(target))
            made = await step_to(client, 40)
            told = [text for text in client.texts if text["type"] == "posed"]
            return sequence, made, told, await get_log(client)

    sequence, made, told, walk = talk(conversation())
    assert {frames.header.input for frames in made.values()} == {sequence}
    assert np.array_equal(walk.pose.points[0], STILL)
    found, before = poses_of(walk), STILL
    for number, points in enumerate(found, start=1):
        goal = PoseGoal(Pose(target[None]))
        expected = next_pose(before, goal, number, 4, generator.fps, ASPECT)
        assert np.array_equal(points, expected.points)
        before = points[-1]
    assert np.abs(found[-1] - target).max() < 1e-4
    steps = np.abs(np.diff(np.concatenate([STILL[None], *found]), axis=0))
    assert 0 < steps.max() < 0.03  # no jump
    assert [pose["step"] for pose in told] == list(range(len(found) + 1))
    for number, points in enumerate(found, start=1):
        frames = told[number]["poses"]
        assert frames == [[list(point) for point in shares(frame)] for frame in points]
    alone = video(generator, walk)  # compares the CRC of every step
    for step, frames in made.items():
        assert frames.images == encoded(alone[step])


def test_a_pose_that_is_told_outside_the_image_can_be_held(serve, talk):
    """A figure whose feet are below the image."""
    low = STILL.copy()
    low[:, 1] += 0.4

    async def conversation():
        async with await Client.connect(serve().url) as client:
            await opened(client, pose=shares(low))
            told = next(text for text in client.texts if text["type"] == "posed")
            await client.pose(told["poses"][-1])
            await step_to(client, 2)
            return told, await get_log(client)

    told, walk = talk(conversation())
    assert max(y for _, y in told["poses"][-1]) > 1.2
    assert np.allclose(poses_of(walk)[-1], low, atol=1e-4)


def test_a_motion_loops_in_the_phase_of_the_stream(serve, talk, generator):
    async def conversation():
        async with await Client.connect(serve().url) as client:
            await opened(client, pose=shares(raised()))
            await client.pose(motion="dance")
            await step_to(client, 120)
            return await get_log(client)

    walk = talk(conversation())
    assert np.allclose(walk.pose.points[0], raised())
    script, found = load_poses("dance"), np.concatenate(poses_of(walk))
    expected = np.stack([script.at((1 + n) / generator.fps) for n in range(len(found))])
    late = np.abs(found - expected).max(axis=(1, 2)) > 1e-4
    assert late[0] and not late[generator.fps :].any()
    video(generator, walk)


def test_the_log_of_the_page_is_replayed_by_the_command(serve, talk, checkpoint, tmp_path, capfd):
    async def conversation():
        async with await Client.connect(serve().url) as client:
            await opened(client)
            await client.pose(motion="wave")
            await step_to(client, 6)
            await client.send("log")
            return (await client.text("log"))["lines"]

    log = tmp_path / "walk.jsonl"
    log.write_text("\n".join(talk(conversation())))
    out = ["--out", str(tmp_path / "frames")]
    assert main(["generate", "--model", str(checkpoint), "--replay", str(log), *out]) == 0
    assert "each bit for bit as it was played" in capfd.readouterr().err


def test_a_rewind_goes_on_from_the_pose_of_the_past(serve, talk, generator):
    async def conversation():
        async with await Client.connect(serve(snapshot_seconds=0.1).url) as client:
            first = await opened(client)
            await client.pose(motion="jump")
            made = await step_to(client, 30)
            for step in (17, 4, 0):
                await client.send("seek", branch=0, step=step)
                await client.text("sought")
                posed = await client.text("posed")
                frames = await client.frames()
                assert frames.header.flags == SEEK and frames.header.step == posed["step"] == step
                assert frames.images == {0: first, **made}.get(step, frames).images
            await client.send("seek", branch=0, step=9)
            await client.text("sought")
            await client.pose(shares(raised()))
            await step_to(client, 14)
            return await get_log(client)

    walk = talk(conversation())
    old, new = poses_of(walk, 0), poses_of(walk, 1)
    assert (walk.branches[1].parent, walk.branches[1].start) == (0, 9)
    assert np.array_equal(old[:9], new[:9])
    goal = PoseGoal(Pose(raised()[None]))
    expected = next_pose(old[8][-1], goal, 10, 4, generator.fps, ASPECT)
    assert np.array_equal(new[9], expected.points)
    for branch in (0, 1):
        video(generator, walk, branch)


def test_recorded_poses_are_played_under_another_prompt(serve, talk, generator):
    async def conversation():
        async with await Client.connect(serve().url) as client:
            await opened(client)
            await client.pose(motion="walk")
            await step_to(client, 8)
            await client.pose(motion="still")
            return await followed_under_another_prompt(client)

    walk = talk(conversation())
    assert np.array_equal(poses_of(walk, 0), poses_of(walk, 1))
    assert walk.path(1, walk.branches[1].end)[-1].prompt == "cd"
    video(generator, walk, 1)


def test_a_split_plays_two_motions_from_one_past(serve, talk, generator):
    async def conversation():
        async with await Client.connect(serve().url) as client:
            await opened(client)
            await client.pose(motion="walk")
            await step_to(client, 5)
            await client.send("split", branch=0, step=4, controls=[None, {"motion": "wave"}])
            await client.text("split")
            past = [await client.frames(), await client.frames()]
            assert past[0].images == past[1].images
            reached = max(await step_to(client, 40, lane=1))
            await client.pose(shares(STILL), lane=1)
            await step_to(client, reached + 30, lane=1)
            return await get_log(client)

    walk = talk(conversation())
    one, other = poses_of(walk, 1), poses_of(walk, 2)
    assert np.array_equal(one[:4], other[:4])
    script = load_poses("walk")
    assert np.allclose(one[30][0], script.at(121 / generator.fps), atol=1e-4)
    assert not np.allclose(other[38], one[38]) and np.allclose(other[-1], STILL, atol=1e-4)
    for branch in (1, 2):
        video(generator, walk, branch)


def test_a_redo_makes_the_last_step_again_under_the_new_pose(serve, talk, generator):
    running = serve()

    async def conversation():
        async with await Client.connect(running.url) as client:
            made, _ = await held_for_redo(client, running)
            last = max(made)
            await client.pose(shares(raised()), shown={"step": last, "frames": 2})
            again = await redone(client, last)
            await client.send("pause")
            return made, again, last, await get_log(client)

    made, again, last, walk = talk(conversation())
    step = walk.path(0, last)[-1]
    earlier = Pose(np.repeat(STILL[None], 4, axis=0))
    assert step.redone == (RedonePose(earlier, 2),) and step.pose != earlier
    stream = Replay(generator, walk)
    shown = [stream.step(step) for step in walk.path(0, last)][-1]
    assert stream.differing == []
    assert encoded(shown) == made[last].images[:2] + again.images[2:]


def test_a_lost_world_is_resumed_and_a_saved_one_goes_on_elsewhere(serve, talk, generator):
    async def conversation():
        running = serve(snapshot_seconds=0.2)
        async with await Client.connect(running.url) as client:
            await opened(client)
            await client.pose(motion="dance")
            made = await step_to(client, 30)
            await client.send("save")
            saved = await client.file(SAVED)
            lines = "\n".join((await get_log(client)).lines("0"))
            client.socket.transport.abort()
        async with await Client.connect(running.url, resume=client.welcome["token"]) as client:
            assert client.welcome["resumed"]
            last = (await client.text("opened"))["step"]
            assert (await client.frames()).images == made[last].images
            await client.pose(motion="dance")
            await step_to(client, last + 4)
            resumed = await get_log(client)
        async with await Client.connect(serve().url) as client:
            log = await client.upload(lines.encode())
            upload = await client.upload(saved.images[0])
            await client.send("open", log=log, saved=upload)
            await client.text("opened")
            assert (await client.frames()).images == made[last].images
            assert not any(text["type"] == "error" for text in client.texts)
            await client.pose(motion="dance")
            await step_to(client, last + 4)
            elsewhere = await get_log(client)
        return last, resumed, elsewhere

    last, resumed, elsewhere = talk(conversation())
    assert 0 < last
    for walk in (resumed, elsewhere):
        video(generator, walk)
    shared = last + 4
    assert resumed.path(0, shared) == elsewhere.path(0, shared)


def test_two_visitors_drive_their_own_figures(serve, talk, generator):
    """One by one, and in shared passes."""

    async def conversation(batch):
        running = serve(batch=batch)
        async with (
            await Client.connect(running.url) as one,
            await Client.connect(running.url) as other,
        ):
            await opened(one)
            await opened(other)
            await one.pose(motion="jump")
            await other.pose(shares(raised()))
            for client in (one, other):
                await client.send("play")
            for client in (one, other):
                await client.frames(lambda header: header.step >= 30)
            return [await get_log(client) for client in (one, other)]

    for batch in (False, True):
        one, other = talk(conversation(batch))
        script = load_poses("jump")
        assert np.allclose(poses_of(one)[24][0], script.at(97 / generator.fps), atol=1e-4)
        assert np.allclose(poses_of(other)[29], raised(), atol=1e-4)
        if not batch:
            video(generator, one)
            video(generator, other)


def test_other_condition_channels_are_refused(checkpoint):
    with pytest.raises(ValueError, match="model: expected one that a camera, poses or its prompt"):
        PlayServer(build(poses=False), str(checkpoint), Settings())


def test_bench_play_measures_motions(serve, capfd):
    assert main(["bench", "play", "--seconds", "1", "--url", serve().url, "--json"]) == 0
    plain, redo = json.loads(capfd.readouterr().out)["play"]
    assert plain["fps"] > 0 and (plain["redo"], redo["redo"]) == (False, True)


POINTS = [(0.5, 0.5)] * 14


def pose(**fields):
    return json.dumps({"type": "pose", "sequence": 1, "time": 0.0, **fields})


def split(control):
    return json.dumps({"type": "split", "controls": [None, control]})


@pytest.mark.parametrize(
    "text, words",
    [
        (pose(), "pose: Value error, expected either points or motion"),
        (pose(points=POINTS, motion="walk"), "pose: Value error, expected either points or m"),
        (pose(points=POINTS[1:]), "pose.points: List should have at least 14 items"),
        (pose(points=[*POINTS, None]), "pose.points: List should have at most 14 items"),
        (pose(points=[(0.5,), *POINTS[1:]]), "pose.points.0.1: Field required"),
        (pose(points=[(0.5, 0.5, 1), *POINTS[1:]]), "pose.points.0: Tuple should have at most 2"),
        (pose(points=[(0.5, 2.01), *POINTS[1:]]), "pose.points.0.1: Input should be less than or"),
        (pose(points=[(-1.1, 0), *POINTS[1:]]), "pose.points.0.0: Input should be greater than"),
        (pose(points=[("0", 0), *POINTS[1:]]), "pose.points.0.0: Input should be a valid number"),
        (pose(points=[(float("nan"), 0), *POINTS[1:]]), "pose.points.0.0: Input should be"),
        (pose(motion="wavy"), "pose.motion: Input should be 'show', 'still', 'walk'"),
        (pose(motion="walk", lane=2), "pose.lane: Input should be less than or equal to 1"),
        (pose(motion="walk", yaw=0), "pose.yaw: Extra inputs are not permitted"),
        (split({"motion": "wavy"}), "split.controls.1.figure.motion: Input should be 'show'"),
        (split({"points": POINTS[1:]}), "split.controls.1.figure.points: List should have at"),
        (split({"yaw": 2}), "split.controls.1.camera.yaw: Input should be less than or equal to 1"),
    ],
)
def test_a_bad_pose_ends_its_connection_with_one_line(serve, talk, text, words):
    async def conversation():
        running = serve()
        async with await Client.connect(running.url) as good:
            await opened(good)
            bad = await Client.connect(running.url)
            await opened(bad)
            await bad.socket.send(text)
            with pytest.raises(Refused) as error:
                while True:
                    await bad.receive()
            await step_to(good, 2)
            return str(error.value)

    said = talk(conversation())
    assert said.startswith(words) and "\n" not in said and len(said) < 400


def test_a_hidden_point_is_read():
    read = parse(pose(points=[None, *POINTS[1:]]))
    assert read.points[0] is None and read.points[1] == (0.5, 0.5)
    split = parse(json.dumps({"type": "split", "controls": [{"motion": "walk"}, {"yaw": 1}]}))
    assert split.controls[0].motion == "walk" and split.controls[1].yaw == 1


def test_controls_of_another_kind_are_refused_and_change_nothing(serve, talk):
    async def conversation():
        async with await Client.connect(serve().url) as client:
            await opened(client)
            await client.input(forward=1.0)
            errors = [await client.text("error")]
            await client.send("split", controls=[None, {"yaw": 1.0}])
            errors.append(await client.text("error"))
            await step_to(client, 3)
            return errors, await get_log(client)

    errors, walk = talk(conversation())
    assert [error["message"].partition(":")[0] for error in errors] == ["input", "split"]
    for error in errors:
        assert "expected points or a motion, because this model is" in error["message"]
        assert not error["fatal"]
    assert np.array_equal(poses_of(walk)[-1], np.repeat(STILL[None], 4, axis=0))


def test_a_camera_takes_no_pose(serve, talk):
    async def conversation():
        async with await Client.connect(serve(model="tiny-world").url) as client:
            await opened(client)
            await client.pose(motion="walk")
            error = await client.text("error")
            await client.send("open", image="sample", pose=POINTS)
            return error, await client.text("error")

    pose_error, open_error = talk(conversation())
    assert pose_error["message"] == (
        "pose: expected yaw and forward, because this model is driven by camera"
    )
    assert open_error["message"].startswith("pose: expected None, this model follows no poses")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"pose": None}, "walk: branch 0, step 2: control: expected a Pose or condition channels"),
        ({"pose": [[[0.5, 0.5, 1]] * 14]}, "step 2: pose: expected 4 video frames, got 1"),
    ],
)
def test_a_log_whose_poses_do_not_fit_is_refused(serve, talk, change, words):
    async def conversation():
        async with await Client.connect(serve().url) as client:
            await opened(client)
            await client.pose(motion="walk")
            await step_to(client, 2)
            lines = list((await get_log(client)).lines("0"))
            line = json.loads(lines[2]) | change
            lines[2] = json.dumps({name: value for name, value in line.items() if value})
            load_walk(lines)  # it is a walk
            with pytest.raises(ValueError) as error:
                await client.upload("\n".join(lines).encode())
            return str(error.value)

    assert words in talk(conversation())
