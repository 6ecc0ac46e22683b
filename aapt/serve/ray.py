"""The page on many machines: one replica of Ray Serve per device.

    AAPT_MODEL=tiny-world serve run aapt.serve.ray:app

A connection stays with its replica, which ends only after its connections have (`DRAIN_SECONDS`).
"""

import os

from fastapi import FastAPI
from ray import serve

from ..streaming.generator import StreamingGenerator
from .app import create_app
from .settings import Deployment

DRAIN_SECONDS = 600.0


def build(environment: dict[str, str]) -> serve.Application:
    """Makes the deployment from environment variables, see `Deployment.from_environment`."""
    wanted = Deployment.from_environment(environment)
    settings = wanted.settings

    def application() -> FastAPI:
        generator = StreamingGenerator.from_pretrained(wanted.model, **wanted.placement)
        return create_app(generator, wanted.model, settings)

    deployment = serve.deployment(
        serve.ingress(application)(),
        name="play",
        autoscaling_config={
            "min_replicas": 1,
            "initial_replicas": wanted.replicas,
            "max_replicas": wanted.replicas,
            "target_ongoing_requests": settings.sessions,
        },
        max_ongoing_requests=4 * settings.sessions,  # visitors in line, and HTTP beside them
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        ray_actor_options={"num_cpus": 1, "num_gpus": wanted.gpus},
    )
    return deployment.bind()


app = build(dict(os.environ))
