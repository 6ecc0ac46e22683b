"""UniPC against its publication written again, against diffusers, and in streams of a model."""

import numpy as np
import pytest
import torch

from aapt.convert.kinds import KINDS
from aapt.model.config import FewStepConfig
from aapt.streaming.few_step import FewStepRollout
from aapt.streaming.solvers import UniPC

from ..helpers import SIZE, wan_transformer
from ..plain_unipc import unipc
from ..plain_wan import PlainWan
from .test_few_step import noise, prompts

LONGLIVE = KINDS["longlive-2-5b"].sampling.times
TIMES = [(0.9,), (0.9, 0.4), (0.95, 0.7, 0.2), LONGLIVE, (0.999, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1)]


def estimate(x, time):
    """A smooth estimate of the clean x that depends on x and the time."""
    return torch.tanh(1.5 * x - time) + 0.3 * x.roll(1, dims=-1) * time**2


def ours(x, times):
    solver = UniPC(times, x[None])
    for _ in times[1:]:
        x = solver.next(estimate(x, times[len(solver.estimates)]))
    return estimate(x, times[-1])


@pytest.mark.parametrize("times", TIMES)
def test_unipc_equals_its_publication(times):
    x = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(x, times), unipc(estimate, x, times), rtol=0, atol=1e-12)


@pytest.mark.parametrize("times", TIMES)
def test_unipc_equals_that_of_diffusers(times):
    """diffusers computes its coefficients in float32."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, solver_type="bh2"
    )
    scheduler.set_timesteps(sigmas=np.array(times))
    start = x = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    for time, step in zip(times, scheduler.timesteps, strict=True):
        x = scheduler.step((x - estimate(x, time)) / time, step, x).prev_sample
    torch.testing.assert_close(ours(start, times), x, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("chunk", "window", "sink", "first", "times"),
    [(1, 5, 1, None, LONGLIVE), (4, 11, 4, None, LONGLIVE), (3, 6, 2, 1, (0.9, 0.5))],
)
def test_a_rollout_with_unipc_equals_the_plain_one(chunk, window, sink, first, times):
    net = wan_transformer(chunk=chunk, window_frames=window, sink_frames=sink, first_chunk=first)
    text, sampling = prompts(), FewStepConfig(times, first_times=LONGLIVE, solver="unipc")
    rollout, plain = FewStepRollout(net, *text, SIZE, sampling), PlainWan(net, *text, False)
    for index in range((sink + window) // chunk + 3):
        drawn = noise(1, chunk if index else net.config.opening_frames)
        with torch.no_grad():
            expected = plain.unipc_chunk(drawn[0], times if index else LONGLIVE)
        torch.testing.assert_close(rollout.step(drawn), expected, rtol=1e-7, atol=1e-7)
    assert int(rollout.cache.step) == len(plain.keys[0])


def test_the_network_is_told_whole_thousandths():
    """The network gets 999, 937, 833 and 624, as from Wan's sampler; UniPC has exact times."""
    sampling = KINDS["longlive-2-5b"].sampling
    net = wan_transformer(chunk=2, window_frames=3)
    rollout = FewStepRollout(net, *prompts(), SIZE, sampling)
    told = [moment.told[0].item() for moment in rollout.times]
    assert told == pytest.approx([0.999, 0.937, 0.833, 0.624], abs=1e-12)
    assert [moment.time[0].item() for moment in rollout.times] == list(sampling.times)
