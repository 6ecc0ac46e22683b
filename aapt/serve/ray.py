"""The page on many machines: one replica of Ray Serve per device.

    AAPT_MODEL=tiny-world serve run aapt.serve.ray:app

A connection stays with its replica, which ends only after its connections have (`DRAIN_SECONDS`).
"""

import os

from fastapi import FastAPI
from ray import serve

from ..streaming.generator import StreamingGenerator
from .app import create_app
from .settings import Settings

DRAIN_SECONDS = 600.0


def build(environment: dict[str, str]) -> serve.Application:
    """Makes the deployment from environment variables: AAPT_MODEL, AAPT_DEVICE, AAPT_SESSIONS
    (worlds per replica), AAPT_REPLICAS (at most), AAPT_TOKEN."""
    name = environment.get("AAPT_MODEL", "tiny-world")
    device = environment.get("AAPT_DEVICE", "cpu")
    replicas = int(environment.get("AAPT_REPLICAS", "2"))
    settings = Settings(
        sessions=int(environment.get("AAPT_SESSIONS", "4")),
        token=environment.get("AAPT_TOKEN"),
    )

    def application() -> FastAPI:
        return create_app(StreamingGenerator.from_pretrained(name, device), name, settings)

    deployment = serve.deployment(
        serve.ingress(application)(),
        name="play",
        autoscaling_config={
            "min_replicas": 1,
            "initial_replicas": replicas,
            "max_replicas": replicas,
            "target_ongoing_requests": settings.sessions,
        },
        max_ongoing_requests=4 * settings.sessions,  # visitors in line, and HTTP beside them
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(device.startswith("cuda"))},
    )
    return deployment.bind()


app = build(dict(os.environ))
