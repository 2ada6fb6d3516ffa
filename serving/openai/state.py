"""`/v1/models`, and what load balancers and Prometheus ask."""

import time
from pathlib import Path
from typing import Any

from starlette.responses import Response

from spike_export.serving.metrics import CONTENT_TYPE
from spike_export.serving.openai.exchange import JsonAnswer
from spike_export.serving.openai.requests import require_model
from spike_export.serving.service import Service

_PAGE = Path(__file__).parents[1] / "page.html"

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


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

    async def card(self) -> Response:
        """Return what is known of the model: formats, prefix, accuracy."""
        return JsonAnswer(self._service.card)

    async def page(self) -> Response:
        """Return the chat page; it loads nothing from elsewhere, and its browser is told to see to that."""
        return Response(_PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)

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
            "aliases": list(self._service.settings.aliases),
        }
