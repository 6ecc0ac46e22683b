"""The generator thread: one per device, which gives its time to many flows in fair parts."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from ..model.caches import CacheError

QUANTUM = 0.005  # seconds granted per round
log = logging.getLogger("aapt.serve")


class Flow(Protocol):
    """Work that comes in slices: a world being played, a recording."""

    def due(self) -> float | None:
        """When the next slice may start, in seconds of `time.perf_counter`; None for no slice."""

    def is_step(self) -> bool:
        """True if the next slice is a step, which flows can make together."""

    def run(self) -> None:
        """Does one slice: at most one step of a stream."""

    def fail(self, error: Exception) -> None:
        """Ends the flow, because a slice raised."""


@contextmanager
def failing(flow: Flow) -> Iterator[None]:
    """Ends a flow if what is inside raises."""
    try:
        yield
    except CacheError as error:  # whoever runs the server can choose another cache
        log.warning("%s", error)
        flow.fail(error)
    except Exception as error:
        log.exception("a slice failed")
        flow.fail(error)


class Scheduler:
    """Runs slices of flows one by one on a thread of its own: deficit round robin (Shreedhar and
    Varghese, 1996) on measured time.

    A flow that waits gets QUANTUM per round and runs while it has time left; a slice that takes
    longer is paid for in the next rounds. So flows that always wait get equal time, whatever their
    slices cost.

    Args:
        together: Runs a slice of each of several flows at once. With it, all flows whose step is
            due join the flow whose turn it is, and the time is divided equally among them.
    """

    def __init__(self, together: Callable[[Sequence[Flow]], None] | None = None):
        self._together = together
        self._order: deque[Flow] = deque()
        self._credit: dict[Flow, float] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="aapt-generator", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ends the thread after the slice under way."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def add(self, flow: Flow) -> None:
        with self._changed:
            self._order.append(flow)
            self._credit[flow] = 0.0
            self._changed.notify_all()

    def remove(self, flow: Flow) -> None:
        """Takes a flow out. Its slice under way, if any, is finished."""
        with self._changed:
            if flow in self._credit:
                self._order.remove(flow)
                del self._credit[flow]

    def wake(self) -> None:
        """Looks again at what is due, because a flow has changed."""
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        while self.run_slice():
            pass

    def run_slice(self) -> bool:
        """Waits for the flow whose turn it is and runs a slice of it, and of the flows that join;
        False after `stop`."""
        flows = self._wait()
        if not flows:
            return False
        started = time.perf_counter()
        if len(flows) > 1:
            self._together(flows)
        else:
            with failing(flows[0]):
                flows[0].run()
        with self._changed:
            share = (time.perf_counter() - started) / len(flows)
            for flow in flows:
                if flow in self._credit:
                    self._credit[flow] -= share
        return True

    def _wait(self) -> list[Flow]:
        """Waits for the next flow to run; returns it and those that join, none to stop."""
        with self._changed:
            while not self._stopping:
                now = time.perf_counter()
                due = {flow: at for flow in self._order if (at := flow.due()) is not None}
                if ready := {flow for flow, at in due.items() if at <= now}:
                    return self._joined(self._next(ready), ready)
                self._changed.wait(min(due.values()) - now if due else None)
        return []

    def _joined(self, flow: Flow, ready: set[Flow]) -> list[Flow]:
        if self._together is None or not flow.is_step():
            return [flow]
        others = (other for other in self._order if other in ready and other is not flow)
        return [flow, *(other for other in others if other.is_step())]

    def _next(self, ready: set[Flow]) -> Flow:
        for flow in self._order:
            if flow not in ready:
                self._credit[flow] = 0.0
        while True:
            flow = self._order[0]
            if flow in ready and self._credit[flow] > 0:
                return flow
            if flow in ready:
                self._credit[flow] += QUANTUM
            self._order.rotate(-1)
