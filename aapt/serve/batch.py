"""`aapt serve --batch`: steps of several sessions in one pass of the model."""

import logging
import time
from collections.abc import Sequence

from ..streaming.actions import take_prompt
from ..streaming.batch import step_together
from .scheduler import failing
from .session import Session, Turn
from .world import Pass, World

log = logging.getLogger("aapt.serve")


def run_together(sessions: Sequence[Session]) -> None:
    """Runs a slice of each session, a step, and all steps in one pass.

    A session that fails ends alone. If the pass fails, each session is stepped alone, so that only
    those end whose own step fails.
    """
    begun: list[tuple[Session, Turn]] = []
    for session in sessions:
        with failing(session):
            if turn := session.begin():
                take_prompt(turn.lane.stream, turn.step)
                begun.append((session, turn))
    passes = _shared([turn for _, turn in begun]) if len(begun) > 1 else None
    for number, (session, turn) in enumerate(begun):
        with failing(session):
            made = passes[number] if passes else World.submit(turn.lane, turn.step)
            session.finish(turn, made)
    for session in sessions:
        session.settle()


def _shared(turns: Sequence[Turn]) -> list[Pass] | None:
    """Submits one pass for all turns; None if it fails."""
    started = time.perf_counter()
    try:
        calls = step_together(
            [turn.lane.stream for turn in turns], [turn.step.control for turn in turns]
        )
    except Exception:
        log.exception("a pass of %d streams failed; each is stepped alone", len(turns))
        return None
    submitted = time.perf_counter()
    return [Pass(call, started, submitted, len(turns)) for call in calls]
