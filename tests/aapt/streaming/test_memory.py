"""A step as one captured graph: a stand-in for a graph replays from the same addresses."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aapt import Control, StreamingGenerator
from aapt.model.world_model import WorldModel
from aapt.streaming import memory

from ..helpers import CONFIG
from .few_step_generator import FORMS
from .few_step_generator import build as build_few_step
from .test_generator import HEIGHT, WALK, WIDTH, build, play

VIEWS = ("aten.select", "aten.lift_fresh", "aten.detach", "aten.view", "aten.alias")
INSIDE = []  # graphs that are being replayed


def stand_in(function, device, pool=None):
    """Replays as a graph does: warm-up calls first, then one output tensor at one address."""
    for _ in range(3):
        function()
    out = function()

    def replay():
        INSIDE.append(function)
        try:
            return out.copy_(function())
        finally:
            INSIDE.pop()

    return replay


class Outside(TorchDispatchMode):
    """Counts the operations that are launched outside of a graph."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not INSIDE:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def generators(monkeypatch, **model):
    """One that runs eagerly and one that replays, with equal weights."""
    made = []
    for replayed in (False, True):
        if replayed:
            monkeypatch.setattr(memory, "capture", stand_in)
        world, vae = build()
        if model:
            torch.manual_seed(2)
            world = WorldModel(dataclasses.replace(CONFIG, **model), None).float()
        made.append(StreamingGenerator(world, vae, height=HEIGHT, width=WIDTH, prompts=["ab"]))
    return made


def test_replays_equal_eager_steps(monkeypatch, picture):
    eager, replayed = generators(monkeypatch)
    videos = []
    for generator in (eager, replayed):
        streams = [generator.open(picture, "ab", seed) for seed in (0, 1)]
        frames = [[stream.first_frame] for stream in streams]
        for control in WALK:
            for i, stream in enumerate(streams):
                frames[i].append(stream.step(control))
        streams[0].prompt = "something else"
        frames[0].append(streams[0].step(WALK[0]))
        videos.append([np.concatenate(each) for each in frames])
    for a, b in zip(*videos, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("condition_channels", [0, 3])
def test_models_without_a_camera_are_replayed_too(monkeypatch, picture, condition_channels):
    eager, replayed = generators(monkeypatch, condition_channels=condition_channels)
    size = eager.latent_size
    controls = [
        torch.randn(condition_channels, *size) if condition_channels else None for _ in range(4)
    ]
    videos = [play(g.open(picture, "ab"), controls) for g in (eager, replayed)]
    assert np.array_equal(*videos)


def test_a_graph_is_taken_over_and_rewound(monkeypatch, picture):
    _, generator = generators(monkeypatch)
    stream = generator.open(picture, "ab", seed=3)
    snapshot, expected = stream.snapshot(), play(stream, WALK)
    stream.restore(snapshot)
    assert np.array_equal(play(stream, WALK), expected)
    used = stream._memory
    stream.close()
    again = generator.open(picture, "ab", seed=3)
    assert again._memory is used and np.array_equal(play(again, WALK), expected)


def test_nothing_is_launched_outside_of_the_graph(monkeypatch, picture):
    """A warm step uploads its control and replays; it allocates nothing and reads no number."""
    _, generator = generators(monkeypatch)
    stream = generator.open(picture, "ab")
    play(stream, WALK)
    monkeypatch.setattr(stream._memory._reader, "read", lambda pixels: lambda: pixels)
    with torch.inference_mode(), Outside() as outside:
        stream.submit(Control(yaw=1.0))
    launches = [name for name in outside.seen if not name.startswith(VIEWS)]
    # Two numbers into the host's buffer, and the buffer to the device
    assert launches == ["aten.copy_.default"] * 3


class Device:
    """A stand-in for `torch.cuda` beside which the pixels of a step leave, recording the order."""

    def __init__(self, monkeypatch):
        self.done = []
        self.current, self.side = (self.stream(name) for name in ("step", "pixels"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())

    def stream(self, name):
        def record_event():
            self.done.append(f"{name} records")
            return SimpleNamespace(synchronize=lambda: self.done.append("host waits"))

        return SimpleNamespace(
            wait_stream=lambda other: self.done.append(f"{name} waits"),
            wait_event=lambda event: self.done.append(f"{name} waits for the copy"),
            record_event=record_event,
        )


def test_a_warm_step_with_its_pixels_waits_for_nothing_and_allocates_nothing(monkeypatch, picture):
    """The host waits when it takes the pixels, and not before."""
    eager, generator = generators(monkeypatch)
    stream, expected = generator.open(picture, "ab"), eager.open(picture, "ab")
    play(stream, WALK), play(expected, WALK)
    device, reader = Device(monkeypatch), stream._memory._reader
    reader._stream = device.side
    shape = torch.Size((1, 3, 4, HEIGHT, WIDTH))
    reader._buffers[shape] = [torch.zeros(shape, dtype=torch.uint8) for _ in range(2)]
    frames, taken = [], []
    for yaw in (1.0, -1.0):  # the second is submitted before the first is taken
        with torch.inference_mode(), Outside() as outside:
            taken.append(stream.submit(Control(yaw=yaw)))
        frames.append(expected.step(Control(yaw=yaw)))
        launches = [name for name in outside.seen if not name.startswith(VIEWS)]
        assert launches == ["aten.copy_.default"] * 4  # the control's, and that of the pixels
    each = ["pixels waits", "pixels records", "step waits for the copy"]
    assert device.done == 2 * each
    assert all(np.array_equal(take(), made) for take, made in zip(taken, frames, strict=True))
    assert device.done == 2 * each + 2 * ["host waits"]


class OnTheHost(TorchDispatchMode):
    """Counts the tensors that operations leave on the host: a graph on a device can hold none."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.seen.append(str(function))
        return out


def test_a_step_takes_nothing_from_the_host():
    """The meta device stands for a GPU: what is not on it comes from the host, and no graph of a
    GPU can hold it."""
    model, vae = build()
    held = memory.StreamMemory(model.to("meta"), vae.to("meta"), (4, 6))
    with torch.inference_mode(), OnTheHost() as host:
        pixels = held._run("steady")
    assert pixels.shape == (1, 3, 4, 32, 48) and pixels.device.type == "meta"
    assert host.seen == []


def test_a_memory_is_made_without_encoding_a_prompt(monkeypatch, picture):
    _, generator = generators(monkeypatch)
    encoder, prompts = generator.model.text_encoder, []
    monkeypatch.setattr(
        encoder, "forward", lambda p: prompts.append(p) or type(encoder).forward(encoder, p)
    )
    generator.open(picture, "ab")
    assert prompts == [["ab"]]


def test_the_parts_of_a_step_can_be_watched(monkeypatch, picture):
    """A watched step runs its operations without the graph, and changes the stream as ever."""
    eager, replayed = (made.open(picture, "ab") for made in generators(monkeypatch))
    seen = []

    def phase(name):
        assert not INSIDE
        seen.append(name)
        return nullcontext()

    for control in WALK[:2]:
        expected = eager.step(control)
        with replayed.watched(phase):
            assert np.array_equal(replayed.step(control), expected)
        assert np.array_equal(replayed.step(control), eager.step(control))
    assert seen == 2 * ["condition", "noise", "generate", "decode", "copy"]


def test_memory_is_counted_and_stays_where_it_is(monkeypatch, picture):
    _, generator = generators(monkeypatch)
    stream = generator.open(picture, "ab")
    held = stream._memory
    tensors = [held.latent, held.chunks["steady"].drawn, held.condition, held.control]
    tensors.append(held.rollout.cache.k)
    addresses = [x.data_ptr() for x in tensors]
    play(stream, WALK)
    stream.restore(stream.snapshot())
    stream.prompt = "something else"
    play(stream, WALK)
    assert [x.data_ptr() for x in tensors] == addresses
    assert stream.bytes >= sum(x.nbytes for x in tensors[:3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_a_device_is_one_graph(picture):
    """Replays equal the CPU's steps about, allocate nothing, and can be pipelined."""
    model, vae = build()
    expected = play(
        StreamingGenerator(model, vae, height=HEIGHT, width=WIDTH).open(picture, "ab"), WALK
    )
    generator = StreamingGenerator(model.cuda(), vae.cuda(), height=HEIGHT, width=WIDTH)
    stream = generator.open(picture, "ab")
    snapshot, frames, pending = stream.snapshot(), [], []
    for control in WALK:
        pending.append(stream.submit(control))
        if len(pending) == 2:
            frames.append(pending.pop(0)())
    frames.append(pending.pop()())
    video = np.concatenate(frames)
    assert np.abs(video.astype(int) - expected.astype(int)).max() <= 2
    stream.restore(snapshot)
    allocated = torch.cuda.memory_allocated()
    assert np.array_equal(play(stream, WALK), video)
    assert torch.cuda.memory_allocated() == allocated
    stream.restore(snapshot)
    pending = [stream.submit(control) for control in WALK]  # more than there are buffers
    assert np.array_equal(np.concatenate([take() for take in pending]), video)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_a_chunk_on_a_device_is_one_graph(picture, form):
    """The opening, the step after a picture and the steady one, as on the CPU about."""
    on_cpu, on_gpu = build_few_step(*form), build_few_step(*form)
    on_gpu = StreamingGenerator(
        on_gpu.model.cuda(),
        on_gpu.vae.cuda(),
        height=HEIGHT,
        width=WIDTH,
        sampling=on_gpu.sampling,
    )
    for given in (None, picture) if on_cpu.takes_picture else (None,):
        videos = []
        for generator in (on_cpu, on_gpu):
            stream = generator.open(given, "ab", seed=3)
            snapshot = stream.snapshot()
            videos.append(play(stream, [None] * 6))
        assert np.abs(videos[0].astype(int) - videos[1].astype(int)).max() <= 2
        stream.restore(snapshot)
        allocated = torch.cuda.memory_allocated()
        assert np.array_equal(play(stream, [None] * 6), videos[1])
        assert torch.cuda.memory_allocated() == allocated
