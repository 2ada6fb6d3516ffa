"""Which runtime computes, and how: ONNX Runtime over a bundle, or TensorRT over plans; opened where it is needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.process.threads import require_threads
from spike_export.artifacts.progress import Progress, silent
from spike_export.engines.generation.decoding import Decoding
from spike_export.engines.generation.draft_length import DraftLength
from spike_export.engines.generation.slots import SlotRuntime, Slots
from spike_export.engines.plan_runtime import bundle_of, is_plan, open_plans

if TYPE_CHECKING:
    from spike_export.engines.onnx_runtime.cache_memory import Provider
    from spike_export.engines.onnx_runtime.decoding import OnnxDecoding
    from spike_export.engines.onnx_runtime.session import WeightsCopy
    from spike_export.engines.tensorrt.engines import RuntimeOptions

Speculate = Literal["off", "ngram"]
"""Where drafts of the next tokens come from."""


@dataclass(frozen=True)
class RuntimeChoice:
    """What to open and how; `Engine.open` says what the options mean. It can be pickled.

    Attributes:
        bundle: Folder with manifest and tokenizer.
        plans: Plans that were built from it; none where ONNX Runtime runs the bundle.
        sample_clipping: Share of ONNX Runtime's calls that count clipped activations; 0 for none.
        weights_copy: Whether ONNX Runtime computes steps of one row with a copy of the weights.
    """

    bundle: Path
    plans: tuple[Path, ...] = ()
    threads: int = 0
    provider: "Provider" = "cpu"
    lowering: bool = True
    speculate: Speculate = "off"
    rebuild: bool = False
    runtime: "RuntimeOptions | None" = None
    sample_clipping: float = 0.0
    weights_copy: "WeightsCopy" = "never"

    @classmethod
    def of(
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
        sample_clipping: float = 0.0,
        weights_copy: "WeightsCopy" = "never",
    ) -> Self:
        """Choose by what is to be opened.

        Raises:
            EngineError: There is no such plan or bundle, or an option belongs to the other runtime.
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
            return cls(
                target,
                (),
                threads or 0,
                provider or "cpu",
                lowering,
                speculate,
                sample_clipping=sample_clipping,
                weights_copy=weights_copy,
            )
        given = {
            "threads": threads is not None,
            "provider": provider is not None,
            "lowering": not lowering,
            "speculate": speculate != "off",
            "a share of calls that count clipped activations": sample_clipping != 0,
            "a copy of the weights": weights_copy != "never",
        }
        _refuse(given, f"{target} runs in TensorRT")
        folder = bundle_of(target, Path(bundle) if bundle is not None else None)
        return cls(folder, tuple(targets), rebuild=rebuild, runtime=runtime)

    @property
    def title(self) -> str:
        """Name of the runtime, and where it computes."""
        return "TensorRT" if self.plans else f"ONNX Runtime, {self.provider}"

    def open(self, progress: Progress = silent) -> Decoding:
        """Open the runtime.

        Args:
            progress: Called while plan and bundle are hashed (bytes) and while a plan is built (percent).

        Raises:
            ArtifactError: The manifest cannot be read, or a plan that is to be rebuilt cannot be written.
            EngineError: It cannot be run here.
        """
        if self.plans:
            return open_plans(self.plans, self.bundle, progress, rebuild=self.rebuild, runtime=self.runtime)
        return open_onnx(
            self.bundle,
            self.threads,
            self.provider,
            lowering=self.lowering,
            speculate=self.speculate,
            sample_clipping=self.sample_clipping,
            weights_copy=self.weights_copy,
        )

    def open_rows(self, rows: int) -> tuple[Decoding, Slots]:
        """Open the runtime with rows for sequences that come and go, as a server needs them.

        Raises:
            ArtifactError: The manifest cannot be read.
            EngineError: It cannot be run here, or has no such rows.
        """
        decoding = self.open()
        if not isinstance(decoding, SlotRuntime):
            raise EngineError("sequences come and go in one plan, and several are given; name one of them")
        return decoding, decoding.open_slots(rows)


def _refuse(given: Mapping[str, bool], reason: str) -> None:
    """Refuse options that the runtime at hand does not have."""
    for name, there in given.items():
        if there:
            raise EngineError(f"{name} was given, but {reason}; leave it out")


def open_onnx(
    path: Path,
    threads: int,
    provider: "Provider",
    *,
    lowering: bool = True,
    speculate: Speculate = "off",
    sample_clipping: float = 0.0,
    weights_copy: "WeightsCopy" = "never",
) -> "OnnxDecoding":
    """Open a bundle in ONNX Runtime.

    Raises:
        ArtifactError: The manifest cannot be read.
        EngineError: It cannot be run here, or drafts cannot be verified over its cache.
    """
    if speculate not in ("off", "ngram"):
        raise EngineError(f"speculate is {speculate!r}; expected off or ngram")
    if weights_copy not in ("never", "auto"):
        raise EngineError(f"weights_copy is {weights_copy!r}; expected never or auto")
    if speculate != "off" and load_manifest(path).kv_cache != "static":
        raise EngineError(f"{path}: drafts are verified over a static cache; export with --kv-cache static")
    from spike_export.engines.onnx_runtime.decoding import OnnxDecoding
    from spike_export.engines.onnx_runtime.session import open_for_generation

    session = open_for_generation(
        path, threads, provider, lowering=lowering, sample_clipping=sample_clipping, weights_copy=weights_copy
    )
    return OnnxDecoding(session, None if speculate == "off" else DraftLength())
