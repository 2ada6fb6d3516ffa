"""The server as an application of Ray Serve: `serve run spike_export.serving.ray_app:build path=BUNDLE`.

Replicas share nothing. A request with the header `x-session-id` goes to the replica that a hash of the header names, or
to one of the next two while that one is full, so that its prompts find their beginnings in the prefix cache.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from spike_export.engines.runtime_choice import RuntimeChoice
from spike_export.serving.app import create_app
from spike_export.serving.server import log_line
from spike_export.serving.service import Service, open_service
from spike_export.serving.settings import Settings

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

_HEALTH_SECONDS = 10

Count = Annotated[int, Field(ge=1)]


class Arguments(BaseModel):
    """What `serve run` and a `serveConfigV2` pass, as text or as numbers.

    Attributes:
        path: Bundle or plan, at the same place on all machines.
        model: Name of the model in requests; that of the bundle's folder or the plan's file by default.
        bundle: Bundle of a plan that does not lie in `PLAN.run`.
        threads: Processors, and threads, of a replica.
        gpus: GPUs of a replica.
        rows: Most sequences that a replica computes together.
        queue: Most sequences that wait for a row.
        prefix_cache: Bytes for keys and values of prompts.
        min_replicas, max_replicas: Ray Serve starts a replica more where each has more requests than rows.
        drain: Seconds that running requests get when a replica is stopped.
    """

    model_config = ConfigDict(extra="forbid")

    path: Path
    model: str | None = None
    bundle: Path | None = None
    threads: Count = 1
    gpus: Annotated[int, Field(ge=0)] = 0
    rows: Count = 8
    queue: Annotated[int, Field(ge=0)] = 64
    prefix_cache: Annotated[int, Field(ge=0)] = 256 << 20
    min_replicas: Count = 1
    max_replicas: Count = 1
    drain: Annotated[float, Field(ge=0)] = 30.0

    def settings(self) -> Settings:
        """Return the settings of a replica's service."""
        return Settings(
            model=self.model or self.path.stem, rows=self.rows, queue=self.queue, prefix_cache=self.prefix_cache
        )

    def choice(self) -> RuntimeChoice:
        """Return what a replica opens."""
        threads = None if self.gpus else self.threads
        return RuntimeChoice.of(self.path, bundle=self.bundle, threads=threads)


class Replica:
    """One server, without a socket: Ray Serve hands it requests."""

    def __init__(self, arguments: Arguments) -> None:
        self._service: Service = open_service(arguments.choice(), arguments.settings(), log_line)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application; Ray Serve asks for it once. It closes the service when the replica ends."""
        return create_app(self._service)

    def check_health(self) -> None:
        """See that the engine computes, or is loaded again; Ray Serve replaces a replica for which this raises."""
        if self._service.worker.state == "stopped":
            raise RuntimeError("the engine has failed twice")


def build(arguments: Arguments) -> Any:
    """Return the application for Ray Serve.

    Args:
        arguments: What to serve, and how much.
    """
    from ray import serve

    deployment = serve.deployment(serve.ingress()(Replica), name="spike-export", **deployment_options(arguments))
    return deployment.bind(arguments)


def deployment_options(arguments: Arguments) -> dict[str, Any]:
    """Return how Ray Serve runs the replicas: how many, on what, and who gets which request."""
    from ray.serve.config import RequestRouterConfig

    return {
        "max_ongoing_requests": arguments.rows + arguments.queue,
        "autoscaling_config": {
            "min_replicas": arguments.min_replicas,
            "max_replicas": max(arguments.min_replicas, arguments.max_replicas),
            "target_ongoing_requests": arguments.rows,
        },
        "ray_actor_options": {
            "num_cpus": arguments.threads,
            "num_gpus": arguments.gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(arguments.threads)}},
        },
        "health_check_period_s": _HEALTH_SECONDS,
        "graceful_shutdown_timeout_s": arguments.drain,
        "request_router_config": RequestRouterConfig(request_router_class=ROUTER),
    }
