"""Figures of a server for Prometheus, at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.167, 0.25, 0.5, 1.0, 2.0)


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def make(kind: type, name: str, text: str, **options):
            return kind(f"aapt_{name}", text, registry=self.registry, **options)

        self.connections = make(Gauge, "connections", "WebSocket connections")
        self.worlds = make(Gauge, "worlds", "Worlds open")
        self.waiting = make(Gauge, "waiting", "Visitors in line")
        self.bytes = make(Gauge, "worlds_bytes", "Memory of streams and snapshots")
        self.steps = make(
            Histogram, "step_seconds", "Time of a step, decoding included", buckets=SECONDS
        )
        self.waits = make(
            Histogram, "wait_seconds", "Time by which a step began late", buckets=SECONDS
        )
        self.redos = make(Histogram, "redo_seconds", "Time of a step made again", buckets=SECONDS)
        self.dropped = make(Counter, "dropped_messages", "Frame messages that a slow client lost")
        self.errors = make(Counter, "errors", "Errors told to clients", labelnames=["code"])

    def step(self, seconds: float, wait: float) -> None:
        self.steps.observe(seconds)
        self.waits.observe(wait)

    def redo(self, seconds: float) -> None:
        self.redos.observe(seconds)

    def text(self) -> bytes:
        """Returns all figures in the text format of Prometheus."""
        return generate_latest(self.registry)
