"""Text from prompts: the Python interface over every runtime."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.closing import Closing
from spike_export.artifacts.manifest import Manifest
from spike_export.artifacts.progress import Progress, silent
from spike_export.engines.bundle_text import BundleText
from spike_export.engines.generation.bundle_tokenizer import BundleTokenizer
from spike_export.engines.generation.decoding import Decoding
from spike_export.engines.generation.draft_length import DraftLength
from spike_export.engines.generation.generated_text import Generation, Piece, Row, joined, streamed
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.generation.prompt_tokens import Prompt, PromptEncoder
from spike_export.engines.runtime_choice import RuntimeChoice, Speculate

if TYPE_CHECKING:
    from spike_export.engines.onnx_runtime.cache_memory import Provider
    from spike_export.engines.onnx_runtime.session import WeightsCopy
    from spike_export.engines.tensorrt.engines import RuntimeOptions


@dataclass(frozen=True)
class Engine(Closing):
    """A runtime with the tokenizer and the manifest of the bundle it runs.

    Attributes:
        defaults: Options of the bundle's `generation_config.json`, with the tokens that end a sequence.
        prompts: Turns prompts into tokens.
    """

    decoding: Decoding
    tokenizer: BundleTokenizer
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
        weights_copy: "WeightsCopy" = "never",
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
            weights_copy: `auto` holds INT8 weights a second time, for steps of one row over a static cache, where the
                processor has VNNI instructions: single prompts decode faster, and opening takes longer. Their
                numbers then differ from those of a batch by less than INT8 itself changes. `never` gives a prompt the
                same text alone and in a batch.
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
        choice = RuntimeChoice.of(
            path,
            threads=threads,
            provider=provider,
            lowering=lowering,
            speculate=speculate,
            weights_copy=weights_copy,
            bundle=bundle,
            rebuild=rebuild,
            runtime=runtime,
        )
        text = BundleText.read(choice.bundle)
        return cls(choice.open(progress), text.tokenizer, text.manifest, text.defaults, text.prompts)

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

    def _options(self, options: GenerationOptions | None, changes: Mapping[str, Any]) -> GenerationOptions:
        base = options or self.defaults
        options = replace(base, **changes)
        return options if options.eos_token_ids else replace(options, eos_token_ids=self.defaults.eos_token_ids)

    def _pieces(self, tokens: list[NDArray[np.int64]], options: GenerationOptions) -> Iterator[Piece]:
        steps = self.decoding.decode(tokens, options)  # what does not fit is said here, not at the first piece
        return streamed(steps, [Row(self.tokenizer, row, prompt, options) for row, prompt in enumerate(tokens)])
