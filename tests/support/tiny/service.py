"""A real server in this process: a small random bundle with a tokenizer of bytes, uvicorn on a thread."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from openai import OpenAI

from spike_export.checkpoint.hf_directory import open_hf_directory
from spike_export.checkpoint.modules import linears
from spike_export.engines.runtime_choice import RuntimeChoice
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from spike_export.serving.server import served_meanwhile
from spike_export.serving.service import Service, open_service
from spike_export.serving.settings import Settings
from tests.support.tiny.checkpoints import random_llama, write_hf
from tests.support.tiny.models import tiny_recipe

CAPACITY = 192
"""Tokens of a sequence in the bundle's static cache."""

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
)


def write_served_bundle(folder: Path, capacity: int | None = CAPACITY) -> Path:
    """Write an INT8 bundle with BOS in its prefix, a tokenizer and a chat template; a growing cache for None."""
    model = write_hf(folder / "model", random_llama())
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    checkpoint = open_hf_directory(model, "tiny")
    recipe = tiny_recipe(checkpoint, dict.fromkeys(linears(checkpoint.config), 0.04), prefix=(0, 40))
    cache = CacheOptions() if capacity is None else CacheOptions("static", capacity)
    export_bundle(checkpoint, recipe, ExportOptions("float32", cache=cache), folder / "bundle")
    return folder / "bundle"


@dataclass
class Running:
    """A server that runs.

    Attributes:
        url: Of the server, without a path.
        log: (event, fields) of every line it wrote.
    """

    service: Service
    url: str
    log: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def client(self, **settings: Any) -> OpenAI:
        """Return the official client, which tries nothing twice."""
        return OpenAI(base_url=f"{self.url}/v1", max_retries=0, timeout=60, **{"api_key": "none", **settings})

    def post(self, path: str, **call: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, timeout=60, **call)

    def get(self, path: str, **call: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=60, **call)


@contextmanager
def running(bundle: Path, threads: int | None = 1, sample_clipping: float = 0.0, **changes: Any) -> Iterator[Running]:
    """Serve a bundle or a plan on a free port until the block ends; its engine starts at once, in this process."""
    log: list[tuple[str, dict[str, Any]]] = []
    defaults = {"rows": 4, "queue": 16, "drain": 1, "engine_process": False}
    settings = Settings(model="tiny", port=0, **defaults | changes)
    choice = RuntimeChoice.of(bundle, threads=threads, sample_clipping=sample_clipping)
    service = open_service(choice, settings, lambda event, fields: log.append((event, fields)))
    with served_meanwhile(service) as url:
        yield Running(service, url, log)
