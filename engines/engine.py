"""Text from prompts: the Python interface over every runtime."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.closing import Closing
from spike_export.artifacts.documents import read_document
from spike_export.artifacts.errors import EngineError, one_line
from spike_export.artifacts.manifest import Manifest, load_manifest
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.threads import require_threads
from spike_export.checkpoint.tokenizer import load_tokenizer
from spike_export.engines.generation.decoding import Decoding
from spike_export.engines.generation.draft_length import DraftLength
from spike_export.engines.generation.generated_text import Generation, Piece, Row, joined, streamed
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.generation.prompt_tokens import Prompt, PromptEncoder
from spike_export.engines.generation.slots import SlotRuntime, Slots
from spike_export.engines.plan_runtime import bundle_of, is_plan, open_plans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spike_export.engines.onnx_runtime.decoding import OnnxDecoding
    from spike_export.engines.onnx_runtime.sequences import Provider
    from spike_export.engines.tensorrt.engines import RuntimeOptions

Speculate = Literal["off", "ngram"]
"""Where drafts of the next tokens come from."""

_TOKENIZER_FILE, _GENERATION_FILE = "tokenizer.json", "generation_config.json"


@dataclass(frozen=True)
class Engine(Closing):
    """A runtime with the tokenizer and the manifest of the bundle it runs.

    Attributes:
        defaults: Options of the bundle's `generation_config.json`, with the tokens that end a sequence.
        prompts: Turns prompts into tokens.
    """

    decoding: Decoding
    tokenizer: "PreTrainedTokenizerBase"
    manifest: Manifest
    defaults: GenerationOptions
    encoder: InitVar[PromptEncoder | None] = None
    prompts: PromptEncoder = field(init=False, repr=False)

    def __post_init__(self, encoder: PromptEncoder | None) -> None:
        """Take the encoder that was started before the runtime, or one that starts with the first prompt."""
        object.__setattr__(self, "prompts", encoder or PromptEncoder(self.tokenizer, self.manifest))

    @classmethod
    def open(
        cls,
        path: Path | str | Sequence[Path | str],
        *,
        threads: int | None = None,
        provider: "Provider | None" = None,
        lowering: bool = True,
        speculate: Speculate = "off",
        bundle: Path | str | None = None,
        rebuild: bool = False,
        runtime: "RuntimeOptions | None" = None,
        progress: Progress = silent,
    ) -> "Engine":
        """Open a bundle in ONNX Runtime, or a plan in TensorRT.

        A plan is code: open only plans that you trust.

        Args:
            path: Folder of a bundle, or a plan; for a split engine the common name of its halves, `engine.plan`. Or
                several plans of one bundle with different contexts: each batch runs in the plan with the least context
                that has room, and all plans have their weights on the GPU.
            threads: Threads of ONNX Runtime per operator, 1 to the number of processors; 0, the default, for as many
                as `OMP_NUM_THREADS` says, else one per core.
            provider: Device of ONNX Runtime: `cpu`, the default, or `cuda` with the extra `gpu`.
            lowering: Let ONNX Runtime compute with operators of its own where it is faster on a CPU; the results are
                the same but for rounding. False runs the bundle's standard operators.
            speculate: `ngram` drafts the next tokens from the text so far, for one prompt over a static cache, and
                verifies them in one call: faster where an answer repeats its prompt. The distribution is the same; the
                text is, but for rounding. `off` computes token by token.
            bundle: Bundle that the plan was built from; by default `PLAN.run/bundle` of the first plan, where the main
                job writes it.
            rebuild: Build a plan again that was built here and cannot be used any more.
            runtime: How TensorRT runs plans: GPU, CUDA graphs, budget of streamed weights.
            progress: Called while plan and bundle are hashed (bytes) and while a plan is built (percent).

        Raises:
            ArtifactError: The manifest cannot be read, or a plan that is to be rebuilt cannot be written.
            EngineError: The bundle is incomplete, has no tokenizer, or cannot be run here; the plan is missing,
                foreign or stale; an option belongs to the other runtime; the machine has fewer processors
                than threads.
        """
        if threads:
            require_threads(threads)
        targets = [Path(path)] if isinstance(path, (str, Path)) else [Path(each) for each in path]
        if not targets:
            raise EngineError("there is nothing to open; name a bundle or a plan")
        target = next((each for each in targets if not is_plan(each)), targets[0])
        if not is_plan(target):
            given = {"bundle": bundle is not None, "rebuild": rebuild, "another plan": len(targets) > 1}
            how = "how to run plans (weight budget, GPU, CUDA graphs)"
            _refuse(given | {how: runtime is not None}, f"{target} is no engine plan")
            open_runtime: Callable[[], Decoding] = partial(
                open_onnx, target, threads or 0, provider or "cpu", lowering=lowering, speculate=speculate
            )
            folder = target
        else:
            given = {
                "threads": threads is not None,
                "provider": provider is not None,
                "lowering": not lowering,
                "speculate": speculate != "off",
            }
            _refuse(given, f"{target} runs in TensorRT")
            folder = bundle_of(target, Path(bundle) if bundle is not None else None)
            open_runtime = partial(open_plans, targets, folder, progress, rebuild=rebuild, runtime=runtime)
        manifest = load_manifest(folder)
        tokenizer = _tokenizer(folder)
        defaults = default_options(folder, manifest, tokenizer)
        prompts = PromptEncoder(tokenizer, manifest).started()
        return cls(open_runtime(), tokenizer, manifest, defaults, prompts)

    @property
    def drafts(self) -> DraftLength | None:
        """How many tokens were drafted and accepted so far; None where nothing is drafted."""
        drafts: DraftLength | None = getattr(self.decoding, "drafts", None)
        return drafts

    def close(self) -> None:
        """Release the runtime's memory."""
        self.decoding.close()
        self.prompts.close()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], options: GenerationOptions | None = None, **changes: Any
    ) -> list[Generation]:
        """Return the continuation of each prompt; all prompts are decoded together, with the result of each alone.

        Args:
            prompts: One text, or a list of texts, chats and token arrays (`PromptEncoder` says what is fed).
            options: Replace the bundle's defaults.
            changes: Fields of `GenerationOptions` that replace those of `options`, or of the defaults.

        Raises:
            EngineError: A prompt or an option cannot be used, or the runtime fails.
        """
        options = self._options(options, changes)
        tokens = self.prompts.encode(prompts)
        pieces: list[list[Piece]] = [[] for _ in tokens]
        for piece in self._pieces(tokens, options):
            pieces[piece.row].append(piece)
        return [joined(own, len(prompt)) for own, prompt in zip(pieces, tokens, strict=True)]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], options: GenerationOptions | None = None, **changes: Any
    ) -> Iterator[Piece]:
        """Yield the text while it is generated, a piece per token; arguments and errors are those of `generate`."""
        options = self._options(options, changes)
        return self._pieces(self.prompts.encode(prompts), options)

    def open_slots(self, rows: int) -> Slots:
        """Return rows for sequences that come and go, as a server needs them.

        Raises:
            EngineError: The runtime has none.
        """
        if not isinstance(self.decoding, SlotRuntime):
            raise EngineError(
                "TensorRT decodes whole batches here, and sequences cannot come and go; serve the bundle that the plan "
                "was built from"
            )
        return self.decoding.open_slots(rows)

    def _options(self, options: GenerationOptions | None, changes: Mapping[str, Any]) -> GenerationOptions:
        base = options or self.defaults
        options = replace(base, **changes)
        return options if options.eos_token_ids else replace(options, eos_token_ids=self.defaults.eos_token_ids)

    def _pieces(self, tokens: list[NDArray[np.int64]], options: GenerationOptions) -> Iterator[Piece]:
        steps = self.decoding.decode(tokens, options)  # what does not fit is said here, not at the first piece
        return streamed(steps, [Row(self.tokenizer, row, prompt, options) for row, prompt in enumerate(tokens)])


def _refuse(given: Mapping[str, bool], reason: str) -> None:
    """Refuse options that the runtime at hand does not have."""
    for name, there in given.items():
        if there:
            raise EngineError(f"{name} was given, but {reason}; leave it out")


def open_onnx(
    path: Path, threads: int, provider: "Provider", *, lowering: bool = True, speculate: Speculate = "off"
) -> "OnnxDecoding":
    """Open a bundle in ONNX Runtime.

    Raises:
        ArtifactError: The manifest cannot be read.
        EngineError: It cannot be run here, or drafts cannot be verified over its cache.
    """
    if speculate not in ("off", "ngram"):
        raise EngineError(f"speculate is {speculate!r}; expected off or ngram")
    if speculate != "off" and load_manifest(path).kv_cache != "static":
        raise EngineError(f"{path}: drafts are verified over a static cache; export with --kv-cache static")
    from spike_export.engines.onnx_runtime.decoding import OnnxDecoding
    from spike_export.engines.onnx_runtime.session import open_for_generation

    session = open_for_generation(path, threads, provider, lowering=lowering)
    return OnnxDecoding(session, None if speculate == "off" else DraftLength())


def default_options(bundle: Path, manifest: Manifest, tokenizer: Any) -> GenerationOptions:
    """Return the options that the model's makers give in `generation_config.json`, else those of transformers.

    The tokens that end a sequence are that file's, else the manifest's, else the tokenizer's.

    Raises:
        EngineError: The file is damaged, or has an impossible value.
    """
    path = bundle / _GENERATION_FILE
    try:
        given = json.loads(read_document(path)) if path.exists() else {}
        eos = given.get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise EngineError(f"{path}: not a JSON object ({one_line(error)}); export the bundle again") from error
    known = {field.name for field in fields(GenerationOptions)} - {"eos_token_ids", "stop_strings", "logprobs"}
    # What transformers' generate() takes where neither file nor caller gives a top k.
    values: dict[str, Any] = {"top_k": 50}
    values |= {name: value for name, value in given.items() if name in known and value is not None}
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    ends = ends or list(manifest.eos_token_ids) or [getattr(tokenizer, "eos_token_id", None)]
    try:
        return GenerationOptions(**values, eos_token_ids=tuple(end for end in ends if end is not None))
    except (EngineError, TypeError) as error:
        raise EngineError(f"{path}: {one_line(error)}; correct it") from error


def _tokenizer(bundle: Path) -> "PreTrainedTokenizerBase":
    if not (bundle / _TOKENIZER_FILE).is_file():
        raise EngineError(
            f"{bundle / _TOKENIZER_FILE}: this file is missing, and text needs a tokenizer; export from a model that "
            "has one"
        )
    from transformers import AutoTokenizer

    load = partial(AutoTokenizer.from_pretrained, bundle, local_files_only=True, trust_remote_code=False)
    return load_tokenizer(load, bundle, EngineError)
