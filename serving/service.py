"""What the endpoints share: the model's text, the worker that computes, and the settings."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from spike_export.artifacts.manifest import MANIFEST_FILE, Manifest
from spike_export.engines.engine import Engine, open_onnx
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.generation.prompt_tokens import PromptEncoder
from spike_export.engines.generation.slots import Slots
from spike_export.serving.grammars import Grammars
from spike_export.serving.metrics import Metrics
from spike_export.serving.model_card import model_card
from spike_export.serving.scheduling.batch import Batch
from spike_export.serving.scheduling.limits import Limits
from spike_export.serving.scheduling.worker import Worker
from spike_export.serving.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spike_export.engines.onnx_runtime.sequences import Provider

Log = Callable[[str, dict[str, object]], None]
"""Takes the name of an event and its fields; none of them is text of a prompt or of an answer."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Model:
    """What the endpoints know of the model. The worker alone holds the runtime, so that a failed one can be let go.

    Attributes:
        defaults: How to generate where a request says nothing.
        prompts: Turns prompts into tokens.
        fingerprint: Differs between bundles; OpenAI's `system_fingerprint`.
    """

    tokenizer: "PreTrainedTokenizerBase"
    manifest: Manifest
    defaults: GenerationOptions
    prompts: PromptEncoder
    fingerprint: str


@dataclass(frozen=True)
class Service:
    """A model that is being served."""

    settings: Settings
    model: Model
    limits: Limits
    worker: Worker
    metrics: Metrics
    grammars: Grammars
    card: Mapping[str, object]
    log: Log
    _tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizer"))

    async def off_loop(self, call: Callable[[], _Result]) -> _Result:
        """Run what may take long on one thread beside the event loop: a tokenizer is not for several at once."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, call)

    def close(self) -> None:
        """Stop the threads and release the runtime."""
        self.worker.close()
        self._tokenizing.shutdown(cancel_futures=True)
        self.model.prompts.close()


def open_service(
    bundle: Path,
    settings: Settings,
    log: Log,
    *,
    threads: int | None = None,
    provider: "Provider | None" = None,
    lowering: bool = True,
) -> Service:
    """Load a bundle and start the thread that computes; `Engine.open` says what the options mean.

    Raises:
        ArtifactError: The manifest cannot be read.
        EngineError: The bundle cannot be run here, or the settings do not fit it.
    """
    engine = Engine.open(bundle, threads=threads, provider=provider, lowering=lowering)
    first: list[Slots] = [engine.open_slots(settings.rows)]
    limits = Limits(first[0].rows, first[0].context, first[0].chunk, settings.prefill_budget)
    digest = hashlib.sha256((bundle / MANIFEST_FILE).read_bytes()).hexdigest()
    model = Model(engine.tokenizer, engine.manifest, engine.defaults, engine.prompts, f"bundle-{digest[:12]}")
    del engine  # its runtime belongs to the slots alone

    opened = partial(open_onnx, bundle, threads or 0, provider or "cpu", lowering=lowering)

    def open_batch() -> Batch:
        slots = first.pop() if first else opened().open_slots(limits.rows)
        return Batch(model.tokenizer, model.manifest.vocab_size, slots, limits, settings.prefix_cache)

    def on_failure(reason: str) -> None:
        log("engine failed", {"reason": reason})

    worker = Worker(open_batch, settings.rows + settings.queue, on_failure)
    metrics = Metrics(settings.model, worker, limits)
    grammars = Grammars(model.tokenizer, model.manifest.vocab_size, model.defaults.eos_token_ids)
    card = model_card(bundle, model.manifest, settings.model, limits.context, limits.rows, provider or "cpu")
    return Service(settings, model, limits, worker, metrics, grammars, card, log)
