"""Windows of clips: their starts, and the motion and prompts that belong to them."""

import pytest
import torch

from aapt.data.clips import LatentClips

from ..helpers import clips, draws


def numbered(count: int = 4, length: int = 9) -> LatentClips:
    """Clip c has latents 100 c + i, controls 100 c + n + 1 and prompts that start with "c"."""
    frame = 100.0 * torch.arange(count)[:, None] + torch.arange(length)
    latents = frame[:, None, :, None, None].expand(-1, 3, -1, 2, 2).half()
    controls = frame[:, 1:, None].expand(-1, -1, 2)
    return LatentClips(latents, controls, [(f"{c} long", f"{c}") for c in range(count)])


def test_first_frames_of_windows():
    data = clips(count=2, length=9)
    data.latents[:, :, 0] = 99.0
    starts = (data.sample(draws(200), 4).latents[:, 0, 0, 0, 0] == 99).sum()
    assert 90 < starts < 150  # half, and a fifth of the rest
    assert data.sample(draws(50), 4, first_frame="never").latents.max() < 50
    assert (data.sample(draws(50), 4, first_frame="always").latents[:, :, 0] == 99).all()
    with pytest.raises(ValueError, match="first_frame: expected 'always', 'half' or 'never', got"):
        data.sample(draws(1), 4, first_frame="late")
    with pytest.raises(ValueError, match="frames: expected at most 8, got 9"):
        data.sample(draws(1), 9)
    with pytest.raises(ValueError, match="frames: expected at most 7, got 8"):
        data.sample(draws(1), 8, first_frame="never")


@pytest.mark.parametrize("first_frame", ["half", "never"])
def test_every_window_can_be_drawn(first_frame):
    batch = numbered(length=7).sample(draws(400), 3, first_frame)
    starts = (batch.latents[:, 0, 0, 0, 0] % 100).unique().tolist()
    assert starts == ([1, 2, 3] if first_frame == "never" else [0, 1, 2, 3])


@pytest.mark.parametrize("first_frame", ["half", "never"])
def test_a_control_drives_the_latent_after_it(first_frame):
    """Control row n belongs to latent frame n + 1 of its clip."""
    batch = numbered().sample(draws(64), 5, first_frame)
    targets = batch.targets[:, 0, :, 0, 0]
    assert targets.dtype == torch.float32 and targets.shape == (64, 5)
    torch.testing.assert_close(batch.motion, targets[..., None].expand(-1, -1, 2))
    torch.testing.assert_close(batch.recycled, batch.targets - 1)
    assert batch.size == (2, 2)


def test_a_window_names_its_clip_and_its_first_frame():
    data = numbered()
    batch = data.sample(draws(64), 5)
    places = torch.tensor(batch.windows)
    assert torch.equal(100.0 * places[:, 0] + places[:, 1], batch.latents[:, 0, 0, 0, 0])
    assert torch.equal(data.motion([2, 0])[:, :, 0], data.all_motion[[2, 0], :, 0])


def test_prompts_are_phrasings_of_their_clip():
    batch = numbered().sample(draws(64), 5)
    clip = (batch.latents[:, 0, 0, 0, 0] // 100).int().tolist()
    assert [int(prompt.split()[0]) for prompt in batch.prompts] == clip
    assert set(batch.prompts) == {f"{c}{tail}" for c in range(4) for tail in ("", " long")}


def test_one_seed_gives_one_batch():
    batches = [numbered().sample(draws(8, seed), 5) for seed in (3, 3, 4)]
    assert torch.equal(batches[0].latents, batches[1].latents)
    assert batches[0].prompts == batches[1].prompts
    assert not torch.equal(batches[0].latents, batches[2].latents)


def test_parts_must_fit():
    latents, controls = torch.zeros(2, 3, 5, 2, 2), torch.zeros(2, 4, 2)
    with pytest.raises(ValueError, match="phrasings: expected one length, got 2, 2, 1"):
        LatentClips(latents, controls, [("a",)])
    with pytest.raises(
        ValueError, match=r"motion: expected controls \(clips, 4, 2\) .* got \(2, 5, 2\)"
    ):
        LatentClips(latents, torch.zeros(2, 5, 2), [("a",)] * 2)
