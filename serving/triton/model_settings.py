"""What a model of the repository is told: the parameters of its `config.pbtxt`, which may be edited."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from spike_export.artifacts.errors import EngineError
from spike_export.serving.settings import Settings

BUNDLE = "bundle"
"""The folder beside `model.py` that holds the bundle."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model is run; the names in capitals are the keys in `config.pbtxt`.

    Attributes:
        engine: Name of the bundle's folder or of the plan's file, beside `model.py`.
        threads: Of ONNX Runtime; 0 for all.
        rows: Most sequences that are computed together.
        queue: Most sequences that wait for a row.
        prefill_budget: Tokens of prompts that are read between two steps.
        prefix_cache: Bytes for keys and values of prompts; 0 for none.
        timeout: Longest time for an answer, in seconds.
    """

    engine: str = BUNDLE
    threads: int = 0
    rows: int = 8
    queue: int = 64
    prefill_budget: int = 256
    prefix_cache: int = 256 << 20
    timeout: int = 600

    def parameters(self) -> dict[str, str]:
        """Return key and value of each setting, as text."""
        return {field.name.upper(): str(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def of(cls, parameters: Mapping[str, Any], place: str) -> Self:
        """Read the parameters of a model's configuration; other keys are Triton's.

        Args:
            parameters: Key → `{"string_value": ...}`, as Triton gives them.
            place: Name of the model, for messages.

        Raises:
            EngineError: A figure is no whole number.
        """
        found: dict[str, Any] = {}
        for field in fields(cls):
            text = str(parameters.get(field.name.upper(), {}).get("string_value", "")).strip()
            if text:
                found[field.name] = text if field.name == "engine" else _whole(text, field.name.upper(), place)
        return cls(**found)

    def service(self, model: str) -> Settings:
        """Return the settings of the service that computes.

        Triton runs each model in a process of its own and begins it anew, so that the runtime needs no further one.
        """
        return Settings(
            model=model,
            rows=self.rows,
            queue=self.queue,
            prefill_budget=self.prefill_budget,
            prefix_cache=self.prefix_cache,
            timeout=float(self.timeout),
            engine_process=False,
        )


def _whole(text: str, key: str, place: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise EngineError(f"{place}: parameter {key} of config.pbtxt is {text!r}; expected a whole number")
    return int(text)
