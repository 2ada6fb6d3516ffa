"""`/props` and `/slots` of llama.cpp's server: what the model is, and which rows are in use."""

from typing import Any

from starlette.responses import Response

from spike_export.serving.openai.exchange import JsonAnswer
from spike_export.serving.service import Service


class ServerState:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def props(self) -> Response:
        """Describe the model, its context and the defaults of generation."""
        model, limits = self._service.model, self._service.limits
        defaults = model.defaults
        params = {
            "seed": -1,
            "temperature": defaults.temperature if defaults.do_sample else 0.0,
            "top_k": defaults.top_k,
            "top_p": defaults.top_p,
            "min_p": defaults.min_p,
        }
        return JsonAnswer(
            {
                "default_generation_settings": {"n_ctx": limits.context, "params": params},
                "total_slots": limits.rows,
                "model_alias": self._service.settings.model,
                "model_path": model.manifest.model.source,
                "chat_template": model.tokenizer.chat_template or "",
                "build_info": model.fingerprint,
            }
        )

    async def slots(self) -> Response:
        """List the rows; sequences always lie in the first of them."""
        limits, running = self._service.limits, self._service.worker.running
        rows: list[dict[str, Any]] = [
            {"id": row, "n_ctx": limits.context, "is_processing": row < running} for row in range(limits.rows)
        ]
        return JsonAnswer(rows)
