"""`/v1/models`, and what load balancers and Prometheus ask."""

import time
from typing import Any

from starlette.responses import Response

from spike_export.serving.metrics import CONTENT_TYPE
from spike_export.serving.openai.exchange import JsonAnswer
from spike_export.serving.openai.requests import require_model
from spike_export.serving.service import Service


class State:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service, self._since = service, int(time.time())

    async def models(self) -> Response:
        """List the model that is served."""
        return JsonAnswer({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        """Describe the model of a name."""
        require_model(self._service, name)
        return JsonAnswer(self._model())

    async def live(self) -> Response:
        """Say that the server answers, whatever its engine does."""
        return JsonAnswer({"status": "ok"})

    async def ready(self) -> Response:
        """Say whether requests are taken: status 503 while the engine does not compute."""
        worker = self._service.worker
        return JsonAnswer({"status": worker.state}, 200 if worker.state == "ready" else 503)

    async def metrics(self) -> Response:
        """Return the figures in Prometheus' text format."""
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE)

    def _model(self) -> dict[str, Any]:
        limits = self._service.limits
        return {
            "id": self._service.settings.model,
            "object": "model",
            "created": self._since,
            "owned_by": "spike-export",
            "max_model_len": limits.context,
        }
