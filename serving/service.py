"""What the endpoints share: the model's text, the worker that computes, and the settings."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from spike_export.artifacts.manifest import MANIFEST_FILE, Manifest, load_manifest
from spike_export.engines.bundle_text import BundleText
from spike_export.engines.generation.bundle_tokenizer import BundleTokenizer
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.generation.prompt_tokens import PromptEncoder
from spike_export.engines.generation.slots import Slots
from spike_export.engines.runtime_choice import RuntimeChoice
from spike_export.serving.engine_process import EngineProcess, can_start
from spike_export.serving.grammars import Grammars
from spike_export.serving.metrics import Metrics
from spike_export.serving.model_card import model_card
from spike_export.serving.scheduling.batch import Batch
from spike_export.serving.scheduling.limits import Limits
from spike_export.serving.scheduling.worker import Worker
from spike_export.serving.settings import Settings

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

    tokenizer: BundleTokenizer
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

    @property
    def places(self) -> int:
        """Most sequences at once, running and waiting together."""
        return self.limits.rows + self.settings.queue

    async def off_loop(self, call: Callable[[], _Result]) -> _Result:
        """Run what may take long on one thread beside the event loop: a tokenizer is not for several at once."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, call)

    def close(self) -> None:
        """Stop the threads and release the runtime."""
        self.worker.close()
        self._tokenizing.shutdown(cancel_futures=True)
        self.model.prompts.close()


def open_service(choice: RuntimeChoice, settings: Settings, log: Log) -> Service:
    """Open a runtime and start the thread that asks it.

    Raises:
        ArtifactError: The manifest cannot be read.
        EngineError: The runtime cannot be opened here, or the settings do not fit it.
    """
    opening = _Opening(choice, settings, load_manifest(choice.bundle).vocab_size)
    text = BundleText.read(choice.bundle)
    first: list[Slots] = [opening.slots()]
    limits = Limits(first[0].rows, first[0].context, first[0].chunk, settings.prefill_budget, first[0].longest_prompt)
    digest = hashlib.sha256((choice.bundle / MANIFEST_FILE).read_bytes()).hexdigest()
    model = Model(text.tokenizer, text.manifest, text.defaults, text.prompts, f"bundle-{digest[:12]}")

    def open_batch() -> Batch:
        slots = first.pop() if first else opening.slots()
        return Batch(model.tokenizer, model.manifest.vocab_size, slots, limits, settings.prefix_cache)

    def on_failure(reason: str) -> None:
        log("engine failed", {"reason": reason})

    worker = Worker(open_batch, limits.rows + settings.queue, on_failure)
    metrics = Metrics(settings.model, worker, limits)
    grammars = Grammars(model.tokenizer, model.manifest.vocab_size, model.defaults.eos_token_ids)
    card = model_card(choice.bundle, model.manifest, settings.model, limits.context, limits.rows, choice.title)
    return Service(settings, model, limits, worker, metrics, grammars, card, log)


class _Opening:
    """Opens the rows of a runtime, as often as it fails: in this process, or in one that starts at once."""

    def __init__(self, choice: RuntimeChoice, settings: Settings, vocab: int) -> None:
        self._choice, self._settings, self._vocab = choice, settings, vocab
        self._apart = settings.engine_process and can_start
        self._started = [self._start()] if self._apart else []

    def slots(self) -> Slots:
        if not self._apart:
            return self._choice.open_rows(self._settings.rows)[1]
        process = self._started.pop() if self._started else self._start()
        return process.open_slots()

    def _start(self) -> EngineProcess:
        settings = self._settings
        return EngineProcess(self._choice, settings.rows, self._vocab, settings.engine_idle, settings.timeout)
