"""Sheets of samples take at most their share of the time."""

import pytest

from aapt.runs.sheets import SHARE, Sheets


def drawn(every: int, update: float, sheet: float, updates: int) -> tuple[list[int], float]:
    """Updates after which sheets are drawn, and the sheets' share of the time."""
    now = [0.0]
    sheets, after, spent = Sheets(every, clock=lambda: now[0]), [], 0.0
    for done in range(1, updates + 1):
        now[0] += update
        if sheets.due(done):
            now[0] += sheet
            spent += sheet
            sheets.drawn(sheet)
            after.append(done)
    return after, spent / now[0]


def test_cheap_sheets_come_when_they_are_asked_for():
    after, share = drawn(every=10, update=1.0, sheet=0.1, updates=35)
    assert after == [10, 20, 30] and share < SHARE


@pytest.mark.parametrize("sheet", [0.6, 7.0, 40.0])
def test_dear_sheets_wait(sheet):
    after, share = drawn(every=10, update=1.0, sheet=sheet, updates=5000)
    assert after[0] == 10 and 1 < len(after) < 500
    assert 0.8 * SHARE < share <= SHARE + sheet / 5000
    gaps = [later - sooner for sooner, later in zip(after[1:], after[2:])]
    assert min(gaps) >= 10
