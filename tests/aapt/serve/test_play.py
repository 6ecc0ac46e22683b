"""Worlds as a client plays them: the bits of a run alone, seeks, branches, splits, redo, resume."""

import time
from itertools import pairwise

import av
import numpy as np
import pytest
import safetensors.torch

from aapt import Control

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt.serve.client import Client, Frames  # noqa: E402
from aapt.serve.images import encode_frames  # noqa: E402
from aapt.serve.protocol import FIRST, FORMATS, RECORDING, REDO, SAVED, SEEK  # noqa: E402
from aapt.serve.server import PlayServer  # noqa: E402
from aapt.serve.session import Place  # noqa: E402
from aapt.serve.settings import Settings  # noqa: E402
from aapt.streaming.actions import Replay, load_walk  # noqa: E402
from aapt.streaming.snapshot_file import read_file  # noqa: E402

QUALITY = Settings().quality


def encoded(frames):
    return encode_frames(frames, "jpeg", QUALITY)


async def opened(client, **fields):
    """Opens a world and returns the message of its first frame."""
    await client.send("open", **{"image": "sample", "seed": 3, **fields})
    await client.text("opened")
    return await client.frames()


async def step_to(client, step, lane=0):
    """Plays up to a step or a little further and pauses; returns the frames that came, by step.

    A busy machine may drop some, but never the last.
    """
    await client.send("play")
    made, paused = {}, False
    while True:
        message = await client.receive()
        if isinstance(message, Frames) and message.header.lane == lane:
            made[message.header.step] = message
            if message.header.step >= step and not paused and not message.header.flags:
                paused = True
                await client.send("pause")
        elif paused and isinstance(message, dict) and message["type"] == "state":
            return made


async def get_log(client):
    await client.send("log")
    return load_walk((await client.text("log"))["lines"])


def video(generator, walk, branch=None):
    """The steps of a branch, made by a stream alone, as images by step."""
    branch = len(walk.branches) - 1 if branch is None else branch
    stream = Replay(generator, walk)
    steps = walk.path(branch, walk.branches[branch].end)
    frames = {number: stream.step(step) for number, step in enumerate(steps, start=1)}
    assert stream.differing == []
    stream.close()
    return frames


def test_a_world_has_the_bits_of_a_run_alone(serve, talk, generator, picture):
    async def conversation():
        async with await Client.connect(serve().url) as client:
            first = await opened(client, prompt="cd")
            assert first.header.flags == FIRST and first.header.count == 1
            await client.input(yaw=0.5, forward=1.0)
            return first, await step_to(client, 12)

    first, made = talk(conversation())
    stream = generator.open(picture, "cd", 3)
    assert first.images == encoded(stream.first_frame)
    assert max(made) >= 12
    for step in range(1, max(made) + 1):
        frames = encoded(stream.step(Control(0.5, 1.0)))
        assert step not in made or made[step].images == frames, step
    assert {frames.header.input for frames in made.values()} == {1}


def test_taps_hold_for_exactly_one_step(serve, talk, generator):
    async def conversation():
        async with await Client.connect(serve().url) as client:
            await opened(client)
            await client.input(forward=1.0)
            await client.input(forward=1.0, taps={"yaw": 1.0, "forward": 0.0})
            await client.input(forward=1.0, taps={"yaw": 0.0, "forward": -1.0})
            await step_to(client, 4)
            return await get_log(client)

    walk = talk(conversation())
    controls = [(step.yaw, step.forward) for step in walk.path(0, 4)]
    # Walking back is clamped to what the model was trained with
    assert controls == [(1.0, -0.4), (0.0, 1.0), (0.0, 1.0), (0.0, 1.0)]


def test_a_step_is_never_early(serve, talk):
    """Steps follow each other by at least EARLY of a period, however late one of them was."""
    from aapt.serve.session import EARLY

    running = serve()

    async def conversation():
        async with await Client.connect(running.url) as client:
            await opened(client)
            session = next(iter(running.play.sessions.values()))
            started = []
            begin = session.begin
            session.begin = lambda: (started.append(time.perf_counter()), begin())[1]
            await step_to(client, 20)
            return session.period, started

    period, started = talk(conversation())
    assert all(later - earlier >= EARLY * period for earlier, later in pairwise(started))


def test_a_seek_shows_the_step_and_playing_on_makes_a_branch(serve, talk, generator):
    async def conversation():
        async with await Client.connect(serve(snapshot_seconds=0.1).url) as client:
            first = await opened(client)
            await client.input(forward=1.0)
            made = await step_to(client, 14)
            for step in (9, 3, max(made), 0):
                await client.send("seek", branch=0, step=step)
                sought = await client.text("sought")
                frames = await client.frames()
                assert (sought["step"], sought["branch"]) == (step, 0)
                assert sought["replayed"] < 6  # snapshots of every sixth step
                assert frames.header.flags == SEEK and frames.header.step == step
                expected = {0: first, **made}.get(step, frames)
                assert frames.images == expected.images
            await client.send("seek", branch=0, step=9)
            await client.text("sought")
            await client.input(yaw=-1.0)
            await client.send("prompt", sequence=7, text="cd")
            branched = await step_to(client, 12)
            branched.pop(9, None)  # the answer to the seek
            header = branched[max(branched)].header
            assert header.branch == 1 and header.prompt == 7
            return made, branched, await get_log(client)

    made, branched, walk = talk(conversation())
    assert (walk.branches[1].parent, walk.branches[1].start) == (0, 9)
    for branch, shown in ((0, made), (1, branched)):
        alone = video(generator, walk, branch)
        for step, frames in shown.items():
            assert frames.images == encoded(alone[step])


def test_of_many_seeks_the_last_is_answered(serve, talk):
    async def conversation():
        async with await Client.connect(serve(history_mib=0).url) as client:
            await opened(client)
            await step_to(client, 20)
            for step in range(20, 10, -1):
                await client.send("seek", branch=0, step=step)
            while (await client.text("sought"))["step"] != 11:
                pass
            await client.send("seek", branch=0, step=20)
            replaying = await client.text("replaying")
            assert replaying["total"] == 20  # no snapshot fits into no bytes
            return (await client.text("sought"))["replayed"]

    assert talk(conversation()) == 20


def test_a_jump_that_is_refused_leaves_the_world_where_the_one_before_began(serve, talk, generator):
    async def conversation():
        async with await Client.connect(serve(history_mib=0).url) as client:
            await opened(client)
            await client.input(forward=1.0)
            last = max(await step_to(client, 40))
            await client.send("seek", branch=0, step=30)
            await client.text("replaying")  # it has begun
            await client.send("seek", branch=9, step=0)
            assert "branch: expected" in (await client.text("error"))["message"]
            sought = await client.text("sought")
            assert (sought["branch"], sought["step"]) == (0, last)
            await client.input(yaw=1.0)
            await step_to(client, last + 2)
            return last, await get_log(client)

    last, walk = talk(conversation())
    assert len(walk.branches) == 1 and walk.path(0, last + 1)[-1].yaw == 1.0
    video(generator, walk)


def test_only_as_many_lost_worlds_as_may_be_open_keep_their_snapshots(generator, checkpoint):
    play = PlayServer(generator, str(checkpoint), Settings(sessions=2))
    walk = play.walk("sample", None, None, 0)
    for token in "abca":  # "a" is lost twice
        play.keep(token, Place(walk, 0, 0, "ab", snapshot=object(), frames=object()))
    kept = {token: place for token, (_, place) in play.kept.items()}
    assert list(kept) == ["b", "c", "a"]
    assert kept["b"].snapshot is kept["b"].frames is None
    assert kept["c"].snapshot and kept["a"].snapshot


def test_errors_of_commands_leave_the_world_as_it_is(serve, talk):
    async def conversation():
        async with await Client.connect(serve().url) as client:
            await client.send("play")
            assert (await client.text("error"))["code"] == "not_open"
            await client.send("open", image="../secret")
            error = await client.text("error")
            assert error["message"] == (
                "image: expected sample, a name of the gallery or the id of an upload"
            )
            await opened(client)
            for message, words in (
                (("seek", {"branch": 5, "step": 0}), "branch: expected a number below 1, got 5"),
                (("seek", {"branch": 0, "step": 9}), "step: expected at most 0 in branch 0, got 9"),
                (("follow", {"branch": 1}), "branch: expected a number below 1, got 1"),
            ):
                await client.send(message[0], **message[1])
                error = await client.text("error")
                assert error["message"] == words and not error["fatal"]
            return await step_to(client, 3)

    assert max(talk(conversation())) >= 3


def test_a_split_plays_two_controls_from_one_past(serve, talk, generator):
    async def conversation():
        async with await Client.connect(serve().url) as client:
            await opened(client)
            await client.input(forward=1.0)
            await step_to(client, 5)
            controls = [None, {"yaw": 1.0, "forward": 0.0}]
            await client.send("split", branch=0, step=4, controls=controls)
            branches = (await client.text("split"))["branches"]
            past = [await client.frames(), await client.frames()]
            assert past[0].images == past[1].images
            reached = max(await step_to(client, 8, lane=1))
            await client.input(yaw=-1.0, lane=1)
            await step_to(client, reached + 4, lane=1)
            await client.send("split", controls=None)
            assert await client.text("split") == {
                "type": "split",
                "branches": None,
                "branch": branches[0],
            }
            return branches, reached, await get_log(client)

    branches, reached, walk = talk(conversation())
    assert branches == [1, 2] and walk.branches[2].end >= reached + 4
    for branch, before, after in ((1, (0.0, 1.0), (0.0, 1.0)), (2, (1.0, 0.0), (-1.0, 0.0))):
        path = [(s.yaw, s.forward) for s in walk.path(branch, walk.branches[branch].end)]
        assert path[:4] == [(0.0, 1.0)] * 4
        assert set(path[4:reached]) == {before} and set(path[reached:]) == {after}
        video(generator, walk, branch)  # asserts the bits of every step


async def followed_under_another_prompt(client):
    """Goes back to step 3 and plays what was recorded under "cd"; returns the walk."""
    await client.send("seek", branch=0, step=3)
    await client.text("sought")
    await client.send("prompt", sequence=1, text="cd")
    await client.send("follow", branch=0)
    while not (await client.text("state"))["following"]:
        pass
    while (await client.text("state"))["playing"]:
        pass
    return await get_log(client)


def test_another_prompt_in_the_past_replays_the_controls(serve, talk, generator):
    async def conversation():
        async with await Client.connect(serve().url) as client:
            await opened(client)
            await client.input(yaw=0.25, forward=1.0)
            await step_to(client, 8)
            await client.input()
            return await followed_under_another_prompt(client)

    walk = talk(conversation())
    end = walk.branches[0].end
    old, new = walk.path(0, end), walk.path(1, end)
    assert [s.control for s in old] == [s.control for s in new] and end >= 8
    assert [s.prompt for s in new] == ["ab"] * 3 + ["cd"] * (end - 3)
    video(generator, walk, 1)


async def held_for_redo(client, running):
    """Makes at least three steps of a world with redo and holds the next one back. Returns the
    frames by step, and the session."""
    await opened(client)
    await client.send("redo", on=True)
    made = await step_to(client, 3)
    session = next(iter(running.play.sessions.values()))
    session._seen = lambda *_: session._shown.frames  # as if no time passed since
    session._earliest = session._due = 1e9  # the next step is far away
    session._playing = True
    return made, session


async def redone(client, last):
    """Waits for the frames of step `last`, made again after two were shown, by the first input."""
    again = await client.frames()
    assert again.header.flags == REDO and again.header.step == last
    assert again.header.first_shown == 2 and again.header.input == 1
    return again


def test_a_redo_makes_the_last_step_again(serve, talk, generator, monkeypatch):
    """The control changes while frames of the last step are not shown: only those change."""
    running = serve()

    async def conversation():
        async with await Client.connect(running.url) as client:
            made, session = await held_for_redo(client, running)
            last = max(made)
            await client.input(yaw=1.0, shown={"step": last, "frames": 2})
            again = await redone(client, last)
            # All of it is shown: nothing is made again
            await client.input(yaw=-1.0, shown={"step": last, "frames": 4})
            session._due = 0.0
            running.play.scheduler.wake()
            following = await client.frames()
            assert following.header.step == last + 1 and following.header.flags == 0
            await client.send("pause")
            return made, again, last, await get_log(client)

    made, again, last, walk = talk(conversation())
    step = walk.path(0, last)[-1]
    assert (step.yaw, step.forward, step.redone) == (1.0, 0.0, ((0.0, 0.0, 2),))
    assert again.images != made[last].images
    stream = Replay(generator, walk)
    shown = [stream.step(step) for step in walk.path(0, last)][-1]
    assert stream.differing == []
    # As it was shown: two frames of the first pass, two of the second
    assert encoded(shown) == made[last].images[:2] + again.images[2:]


def test_a_lost_connection_is_resumed_by_its_token(serve, talk, generator):
    async def conversation():
        running = serve()
        async with await Client.connect(running.url) as client:
            await opened(client)
            await client.input(forward=1.0)
            made = await step_to(client, 6)
            await client.send("prompt", sequence=1, text="cd")
            made = await step_to(client, max(made) + 2)
            client.socket.transport.abort()
            token = client.welcome["token"]
        async with await Client.connect(running.url, resume=token) as client:
            assert client.welcome["resumed"] and client.welcome["token"] == token
            assert (await client.text("opened"))["step"] == max(made)
            frames = await client.frames()
            assert frames.images == made[max(made)].images
            await client.input(yaw=1.0)
            await step_to(client, max(made) + 3)
            # A second connection takes it over; the first one is told
            async with await Client.connect(running.url, resume=token) as second:
                assert (await client.text("ended"))["reason"] == "moved"
                await second.text("opened")
                assert second.welcome["resumed"]
                walk = await get_log(second)
        async with await Client.connect(running.url, resume="no such token") as client:
            assert not client.welcome["resumed"]
        return walk

    walk = talk(conversation())
    assert walk.path(0, walk.branches[0].end)[-1].prompt == "cd"
    video(generator, walk)


def test_past_capacity_visitors_wait_in_line(serve, talk):
    async def conversation():
        running = serve(sessions=1)
        clients = [await Client.connect(running.url) for _ in range(4)]
        await opened(clients[0])
        for place, client in enumerate(clients[1:], start=1):
            await client.send("open")
            assert (await client.text("queued"))["place"] == place
        await clients[2].socket.close()  # leaves the line
        assert (await clients[3].text("queued"))["place"] == 2
        await clients[0].socket.close()
        await clients[1].text("opened")
        assert (await clients[3].text("queued"))["place"] == 1
        await clients[1].socket.close()
        await clients[3].text("opened")
        await clients[3].socket.close()

    talk(conversation())


def test_an_idle_world_ends_and_gives_its_place(serve, talk):
    async def conversation():
        running = serve(sessions=1)
        async with await Client.connect(running.url) as client:
            await opened(client)
            next(iter(running.play.sessions.values())).touched = float("-inf")
            assert (await client.text("ended"))["reason"] == "idle"
            await client.send("play")
            assert (await client.text("error"))["code"] == "not_open"
            await opened(client)  # another world may follow

    talk(conversation())


def test_a_world_ends_after_its_steps(serve, talk):
    async def conversation():
        async with await Client.connect(serve(steps=5).url) as client:
            await opened(client)
            await client.send("play")
            return (await client.text("ended"))["reason"]

    assert talk(conversation()) == "limit"


def test_reset_starts_the_walk_again(serve, talk, generator):
    async def conversation():
        async with await Client.connect(serve().url) as client:
            await opened(client)
            await step_to(client, 3)
            await client.send("reset", seed=8)
            assert await client.text("opened") == {
                "type": "opened",
                "branch": 0,
                "step": 0,
                "seed": 8,
                "prompt": "ab",
            }
            await step_to(client, 2)
            return await get_log(client)

    walk = talk(conversation())
    assert walk.seed == 8 and len(walk.branches) == 1
    video(generator, walk)


def test_recordings_and_logs(serve, talk, generator, tmp_path):
    async def record(client, first, last):
        await client.send("record", branch=0, first=first, last=last)
        return (await client.file(RECORDING)).images[0]

    async def conversation():
        async with await Client.connect(serve(snapshot_seconds=0.1).url) as client:
            await opened(client)
            await client.input(forward=1.0)
            made = await step_to(client, 20)
            whole = await record(client, 0, max(made))
            part = await record(client, 16, 18)
            for first, last, words in (
                (0, 9999, "step: expected at most"),
                (9, 8, "first: expected at most 3600 steps before 8, got 9"),
            ):
                await client.send("record", branch=0, first=first, last=last)
                error = await client.text("error")
                assert error["code"] == "record" and error["message"].startswith(words)
            await client.send("log")
            log = "\n".join((await client.text("log"))["lines"]).encode()
            await client.send("open", log=await client.upload(log))
            assert (await client.text("opened"))["step"] == max(made)
            frames = await client.frames()
            assert frames.images == made[max(made)].images
            return made, whole, part, log

    made, whole, part, log = talk(conversation())
    walk = load_walk(log.decode().splitlines())
    alone = video(generator, walk)
    for data, frames in ((whole, 1 + 4 * max(made)), (part, 3 * 4)):
        path = tmp_path / "walk.mp4"
        path.write_bytes(data)
        with av.open(path) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(pictures) == frames
    # The part shows steps 16 to 18: each of its frames is nearest to the right one
    scale = pictures[0].shape[0] // generator.height
    small = [p[scale // 2 :: scale, scale // 2 :: scale].astype(float) for p in pictures]
    right = np.concatenate([alone[step] for step in (16, 17, 18)])
    wrong = np.concatenate([alone[step] for step in (5, 6, 7)])
    for picture, expected, other in zip(small, right, wrong):
        assert np.abs(picture - expected).mean() < np.abs(picture - other).mean()


async def saved_world(running):
    """Plays on a server that goes; returns what its client was given, and the last frames."""
    async with await Client.connect(running.url) as client:
        await opened(client)
        await client.input(yaw=0.5, forward=1.0)
        made = await step_to(client, 30)
        await client.send("log")
        log = "\n".join((await client.text("log"))["lines"]).encode()
        await client.send("save")
        saved = await client.file(SAVED)
    return log, saved, made[max(made)]


async def go_on(client, log, file):
    number = await client.upload(log)
    await client.send("open", log=number, saved=await client.upload(file))
    await client.text("opened")
    return await client.frames()


def test_another_server_goes_on_from_the_last_snapshot(serve, talk, generator):
    async def conversation():
        log, saved, last = await saved_world(serve(snapshot_seconds=0.2))
        running = serve()
        async with await Client.connect(running.url) as client:
            frames = await go_on(client, log, saved.images[0])
            assert frames.header.step == last.header.step and frames.images == last.images
            tree = await client.text("tree")
            assert {"branch": 0, "step": saved.header.step} in tree["snapshots"]
            assert not any(text["type"] == "error" for text in client.texts)
            made = await step_to(client, last.header.step + 4)
            walk = await get_log(client)
        return saved.header.step, made, walk

    step, made, walk = talk(conversation())
    assert 0 < step < max(made)
    alone = video(generator, walk)  # compares the CRC of every step
    assert made[max(made)].images == encoded(alone[max(made)])


def falsified(file, change):
    tensors, facts = read_file(file)
    change(tensors, facts)
    return safetensors.torch.save(tensors, facts)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t, f: t.pop("latent"), "snapshot: expected latent (1, "),
        (lambda t, f: t.update(latent=t["latent"].double()), "snapshot: expected latent (1, "),
        (lambda t, f: t["cache.step"].fill_(-1), "snapshot: expected cache.step below"),
        (lambda t, f: t["cache.text_lens"].fill_(99), "snapshot: expected cache.text_lens up to"),
        (lambda t, f: t["frames"].add_(1), "saved: expected the frames that the walk noted"),
        (lambda t, f: f.update(step="999"), "step: expected at most"),
        (lambda t, f: f.update(model="0" * 64), "saved: expected a world of "),
        (lambda t, f: f.update(snapshot="{}"), "snapshot: expected seed, steps, prompt and"),
    ],
)
def test_a_saved_world_that_does_not_fit_is_refused_and_the_log_replayed(
    serve, talk, change, words
):
    async def conversation():
        running = serve(snapshot_seconds=0.2)
        log, saved, last = await saved_world(running)
        async with await Client.connect(running.url) as client:
            frames = await go_on(client, log, falsified(saved.images[0], change))
            assert frames.images == last.images
            errors = [text for text in client.texts if text["type"] == "error"]
        return errors

    (error,) = talk(conversation())
    assert error["message"].startswith(words) and not error["fatal"]


def test_tall_video_is_h264_whose_messages_stand_alone(serve, talk, generator):
    async def conversation():
        running = serve(h264_above=generator.height - 1)
        async with await Client.connect(running.url, formats=("h264", "webp")) as client:
            assert client.welcome["format"] == "h264"
            first = await opened(client)
            await client.input(forward=1.0)
            made = await step_to(client, 12)
            walk = await get_log(client)
        async with await Client.connect(running.url, formats=("webp",)) as client:
            assert client.welcome["format"] == "webp"
        async with await Client.connect(serve().url, formats=("h264",)) as client:
            assert client.welcome["format"] == "jpeg"
        return first, made, walk

    first, made, walk = talk(conversation())
    assert len(first.images) == 1 and FORMATS[first.header.format] == "h264"
    alone = video(generator, walk)
    for step, frames in made.items():
        decoder = av.CodecContext.create("h264", "r")
        pictures = [p for image in frames.images for p in decoder.decode(av.Packet(image))]
        pictures = [p.to_ndarray(format="rgb24") for p in (*pictures, *decoder.decode(None))]
        assert len(pictures) == 4
        # The random model's colours are noise, of which 4:2:0 keeps a part
        shown = np.stack(pictures).astype(float).mean(-1)
        right = np.abs(shown - alone[step].mean(-1)).mean()
        wrong = np.abs(shown - alone[step][::-1].mean(-1)).mean()
        assert right < wrong, step
