"""The Open Inference Protocol (KServe v2) as far as probes and dashboards ask: health, server and model metadata.

Source: https://github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md.
"""

from importlib.metadata import version

from starlette.responses import Response

from spike_export.serving.openai.exchange import JsonAnswer
from spike_export.serving.openai.requests import require_model
from spike_export.serving.service import Service

_VERSION = "1"
"""The only version of the model."""


class InferenceProtocol:
    """The endpoints. There is no `infer`: text is asked for by OpenAI's endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def _is_ready(self) -> bool:
        return self._service.worker.state == "ready"

    async def live(self) -> Response:
        """Say that the server answers."""
        return JsonAnswer({"live": True})

    async def ready(self) -> Response:
        """Say whether requests are taken: status 503 while the engine does not compute."""
        return JsonAnswer({"ready": self._is_ready}, 200 if self._is_ready else 503)

    async def server(self) -> Response:
        """Describe the server."""
        return JsonAnswer({"name": "spike-export", "version": version("spike-export"), "extensions": []})

    async def model(self, name: str) -> Response:
        """Describe the model of a name; it has no tensors that a client could send."""
        require_model(self._service, name)
        platform = str(self._service.card["runtime"])
        model = self._service.settings.model
        return JsonAnswer({"name": model, "versions": [_VERSION], "platform": platform, "inputs": [], "outputs": []})

    async def model_ready(self, name: str) -> Response:
        """Say whether the model takes requests."""
        require_model(self._service, name)
        return JsonAnswer({"name": name, "ready": self._is_ready}, 200 if self._is_ready else 503)
