"""Records that several tests of the stages need."""

import pytest

from aapt.training.stages import adversarial, rollout_regression


@pytest.fixture
def made_segments(monkeypatch):
    """The segments that a student-forced stage passes through its model in parallel, in order."""
    segments, pass_again = [], adversarial.parallel_pass

    def record(net, segment, *text):
        segments.append(segment)
        return pass_again(net, segment, *text)

    for stage in (adversarial, rollout_regression):
        monkeypatch.setattr(stage, "parallel_pass", record)
    return segments
