"""Motion of later segments: no statistic of the conditions tells a fake from a real clip."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from aapt.data.clips import ClipBatch, LatentClips, window_starts
from aapt.data.tiny_world.world import make_world, sample_trajectory
from aapt.model.conditioning import relative_poses
from aapt.training.later_motion import CANDIDATES, LaterMotion, continued, there_and_back

from ..helpers import CAMERA, SIZE, draws
from ..runs.counting import adversarial_stage, counting_model

PAIRS = 2000
LIMIT = 0.56  # of the area under the curve; chance is 0.5


@dataclasses.dataclass
class Motions:
    """Clips that are nothing but motion, (clips, ...) laid out as `ClipBatch.motion`."""

    motions: Tensor
    time: int = 1

    def __len__(self) -> int:
        return len(self.motions)

    def motion(self, numbers) -> Tensor:
        return self.motions[list(numbers)]

    def sample(self, random, frames, first_frame) -> ClipBatch:
        clips = random.integers(len(self))
        length = self.motions.shape[self.time]
        starts = window_starts(random, 1 + length, frames, first_frame)
        cut = [self.motions[c].narrow(self.time - 1, s, frames) for c, s in zip(clips, starts)]
        latents = torch.zeros(len(clips), 1, 1 + frames, 1, 1)
        return ClipBatch(latents, torch.stack(cut), [""] * len(clips), list(zip(clips, starts)))


def walks(clips: int, frames: int) -> Tensor:
    """Controls of the procedural world, (clips, frames, 2)."""
    made = [
        sample_trajectory(make_world(seed, seed % 6), frames, np.random.default_rng(seed))[0]
        for seed in range(clips)
    ]
    return torch.stack(made)


def smooth(clips: int, frames: int, numbers: int = 2) -> Tensor:
    """Numbers that swing smoothly about the mean of their clip, (clips, frames, numbers)."""
    rng = np.random.default_rng(0)
    mean, value, speed = rng.normal(size=(clips, numbers)) * 0.5, 0.0, 0.0
    rows = []
    for _ in range(50 + frames):
        speed = 0.8 * speed + 0.2 * rng.normal(size=(clips, numbers))
        value = 0.9 * value + 0.5 * speed + 0.1 * mean
        rows.append(value)
    return torch.from_numpy(np.stack(rows[50:], axis=1)).float()


def statistics(rows: Tensor, known: int) -> dict[str, Tensor]:
    """Statistics of conditions (pairs, T, numbers), of which `known` frames are overlap."""
    change = rows.diff(dim=1).norm(dim=2)
    before, after = rows[:, :known].flatten(1), rows[:, known : 2 * known].flatten(1)
    return {
        "jump": change[:, known - 1],
        "largest jump": change.amax(dim=1),
        "mean change": change.mean(dim=1),
        "deviation": rows.std(dim=1).mean(dim=1),
        "correlation": torch.cosine_similarity(before, after, dim=1),
    }


def area(fake: Tensor, real: Tensor) -> float:
    """The chance that a fake's value lies above a real one's; equal values count half."""
    fake, real = (x.double().mul(1e3).round().sort().values for x in (fake, real))
    below = torch.searchsorted(real, fake) + torch.searchsorted(real, fake, right=True)
    return below.double().mean().item() / 2 / len(real)


def betrayed(fakes: Tensor, reals: Tensor, known: int) -> dict[str, float]:
    """The area under the curve per statistic, whichever side betrays the fake."""
    of_fakes, of_reals = statistics(fakes, known), statistics(reals, known)
    areas = {name: area(of_fakes[name], of_reals[name]) for name in of_fakes}
    return {name: max(found, 1 - found) for name, found in areas.items()}


def test_conditions_of_the_discriminator_do_not_betray_a_fake(monkeypatch):
    """The conditions that a training stage shows the discriminator, second and third segment."""
    controls = walks(clips=300, frames=16)
    clips = LatentClips(torch.zeros(300, 4, 17, *SIZE), controls, [("a",)] * 300)
    stage = adversarial_stage(
        counting_model(*[0.0] * 4),
        segment_frames=8,
        segments=3,
        overlap_frames=2,
        whole_clips=False,
        discriminator_warmup=1,
    )
    shown = []
    monkeypatch.setattr(stage, "train_on_segment", lambda *given: shown.append(given) or {})
    stage.accumulate({"clips": clips}, draws(PAIRS), 0)
    assert len(shown) == 3
    for reals, fakes, *_ in shown[1:]:
        pair = [part.conditions.condition.mean(dim=(3, 4)) for part in (fakes, reals)]
        fake, real = (rows.transpose(1, 2) for rows in pair)
        found = betrayed(fake, real, known=2)
        assert max(found.values()) <= LIMIT, found
    spliced = torch.cat([fake[:, :2], real.roll(1, 0)[:, 2:]], dim=1)
    assert betrayed(spliced, real, known=2)["jump"] > 0.85  # the measure sees a leak


def test_trajectories_at_the_size_of_the_paper_do_not_betray_a_fake():
    """Clips of 15 s, segments of 10 s, an overlap of 1 s, two extensions; pairs in parts, which
    need less memory."""
    frames, known, parts = 60, 6, 20
    clips = Motions(relative_poses(smooth(300, 4 * 90).unflatten(1, (90, 4)), CAMERA))

    def rows(poses: Tensor) -> Tensor:
        turn, move = poses[..., 0, 2] / CAMERA.yaw_step, poses[..., 2, 3] / CAMERA.forward_step
        return torch.cat([turn, move], dim=2)

    pairs = [], []  # of each extension
    for part in range(parts):
        random = draws(PAIRS // parts, seed=part)
        shown = clips.sample(random, frames, "never")
        later, shown = LaterMotion(clips, shown, known, CAMERA), shown.motion
        for extension in pairs:
            shown = torch.cat([shown[:, -known:], later.next(frames - known, random)], dim=1)
            reals = clips.sample(random, frames, "never").motion
            extension.append((rows(shown), rows(reals)))
    for extension in pairs:
        fakes, reals = (torch.cat(part) for part in zip(*extension, strict=True))
        found = betrayed(fakes, reals, known)
        assert len(fakes) == PAIRS and max(found.values()) <= LIMIT, found


def test_skeletons_at_the_size_of_the_paper_do_not_betray_a_fake():
    """Clips of 15 s, segments of 10 s, an overlap of 1 s, five extensions."""
    frames, known, random = 60, 6, draws(2 * PAIRS)
    clips = Motions(smooth(1000, 90).transpose(1, 2)[..., None, None], time=2)
    shown = clips.sample(random, frames, "half")
    later, shown = LaterMotion(clips, shown, known, None), shown.motion
    for _ in range(5):
        shown = torch.cat([shown[:, :, -known:], later.next(frames - known, random)], dim=2)
        reals = clips.sample(random, frames, "never").motion
        pair = (motion.flatten(2).transpose(1, 2) for motion in (shown, reals))
        found = betrayed(*pair, known)
        assert max(found.values()) <= LIMIT, found


def test_a_trajectory_is_continued_by_the_most_similar_moment():
    """Among other trajectories is the trajectory itself, which then goes on as it did."""
    pool = smooth(clips=2 * CANDIDATES, frames=16)
    candidates = torch.arange(2 * CANDIDATES).view(2, CANDIDATES)
    for place in (3, 9):
        past = pool[candidates[:, 5]]
        made = continued(past[:, :place], pool, candidates, 6, CAMERA, draws(2))
        torch.testing.assert_close(made, past[:, place : place + 6])


@pytest.mark.parametrize("poses", [False, True])
def test_every_change_is_one_of_the_pool(poses):
    """Between video frames too: a continuation adds one constant to a trajectory."""
    controls = smooth(clips=2 * 3, frames=4 * 12).unflatten(1, (12, 4))
    motion = relative_poses(controls, CAMERA) if poses else controls[:, :, 0]
    pool = motion.unflatten(0, (2, 3))
    past = pool[:, 0, :5] + 0.5
    candidates = torch.tensor([[1, 2], [4, 5]])
    made = continued(past, pool.flatten(0, 1), candidates, 4, CAMERA, draws(2))
    for clip in range(2):
        joined = torch.cat([past[clip, -1:], made[clip]])
        numbers = joined.flatten(0, 1).flatten(1) if poses else joined
        theirs = pool[clip, 1:].flatten(1, 2).flatten(2) if poses else pool[clip, 1:]
        skipped = 3 if poses else 0  # changes within the last frame of the past
        changes = numbers.diff(dim=0)[skipped:]
        windows = theirs.diff(dim=1).unfold(1, len(changes), 1).movedim(-1, 2)
        assert (windows - changes).abs().amax(dim=(2, 3)).min() < 1e-6


def test_a_clip_is_continued_alike_whatever_is_beside_it():
    """Ranks hold parts of a batch, and train what one rank would."""
    pool = smooth(clips=9 * CANDIDATES, frames=16)
    pool[8 * CANDIDATES :] += torch.randn(CANDIDATES, 16, 2)  # the ninth clip trembles
    candidates = torch.arange(9 * CANDIDATES).view(9, CANDIDATES)
    past = pool.flip(0)[candidates[:, 0], :4]
    together = continued(past, pool, candidates, 6, CAMERA, draws(9))
    alone = continued(past[:8], pool, candidates[:8], 6, CAMERA, draws(8))
    torch.testing.assert_close(together[:8], alone, rtol=0, atol=0)


def test_a_segment_of_one_frame_is_continued_too():
    pool, candidates = walks(clips=2, frames=4), torch.tensor([[0], [1]])
    assert continued(pool[:, :1], pool, candidates, 3, CAMERA, draws(2)).shape == (2, 3, 2)


def test_a_clip_is_walked_there_and_back():
    """On to the end while the segment fits, else a turn after the delay or at the end."""
    assert there_and_back((2, 1), 10, 7, delay=1) == ([3, 4, 5, 6, 7, 8, 9], (9, 1))
    assert there_and_back((4, 1), 10, 7, delay=1) == ([5, 4, 3, 2, 1, 0, 1], (1, 1))
    assert there_and_back((8, 1), 10, 4, delay=3) == ([9, 8, 7, 6], (6, -1))
    assert there_and_back((6, -1), 10, 6, delay=0) == ([5, 4, 3, 2, 1, 0], (0, -1))
    assert there_and_back((1, -1), 10, 4, delay=0) == ([2, 3, 4, 5], (5, 1))
    assert there_and_back((0, 1), 1, 3, delay=2)[0] == [0, 0, 0]


def test_a_skeleton_continues_its_own_clip():
    """From the frame after its window, segment after segment (docs/method.md#10)."""
    frame = 100.0 * torch.arange(3)[:, None] + torch.arange(10)
    clips = Motions(frame[:, None, :, None, None], time=2)
    batch = clips.sample(draws(8), 4, "never")
    later = LaterMotion(clips, batch, 2, None)
    made = torch.cat([later.next(3, draws(8, 1)), later.next(3, draws(8, 2))], dim=2).flatten(1)
    for row, (clip, start) in zip(made, batch.windows, strict=True):
        paths = []
        for first_delay in (0, 1):
            first, place = there_and_back((start + 3, 1), 10, 3, first_delay)
            paths += [first + there_and_back(place, 10, 3, delay)[0] for delay in (0, 1)]
        assert row.tolist() in [[100 * clip + n for n in path] for path in paths]
