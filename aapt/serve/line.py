"""Places on a server, and the line for them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(eq=False)
class Turn:
    """A visitor in line: the place in it that was told last."""

    given: asyncio.Future
    told: Callable[[int], None]
    place: int = 0


class Line:
    """`places` visitors at once; others wait in the order of asking. Used on the event loop alone.

    Args:
        changed: Told after each change.
    """

    def __init__(self, places: int, changed: Callable[["Line"], None] = lambda line: None):
        self.places, self.changed = places, changed
        self.taken = 0
        self._waiting: list[Turn] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def enter(self, told: Callable[[int], None]) -> None:
        """Waits for a place. `told` gets the place in line, 1 for the next, each time it
        changes."""
        if self.taken < self.places:
            self.taken += 1
            self.changed(self)
            return
        turn = Turn(asyncio.get_running_loop().create_future(), told)
        self._waiting.append(turn)
        self._tell()
        try:
            await turn.given
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
                self._tell()
            else:  # the place was given in the same moment
                self.leave()
            raise

    def leave(self) -> None:
        """Gives a place to the next in line."""
        if self._waiting:
            self._waiting.pop(0).given.set_result(None)
            self._tell()
        else:
            self.taken -= 1
            self.changed(self)

    def _tell(self) -> None:
        for place, turn in enumerate(self._waiting, start=1):
            if place != turn.place:
                turn.place = place
                turn.told(place)
        self.changed(self)
