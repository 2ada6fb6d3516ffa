"""What a run is asked to do."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.manifest import LogitsScope
from spike_export.artifacts.recipe import NumberFormat
from spike_export.artifacts.results.accuracy_limits import AccuracyLimits
from spike_export.calibration.corpus.files import CorpusOptions
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.engines.plan.build_options import BuildOptions
from spike_export.engines.plan.paths import require_file_names
from spike_export.export.cache_options import CacheOptions
from spike_export.export.preconditions import require_quantized
from spike_export.pipeline.cluster.cluster_options import ClusterOptions
from spike_export.pipeline.execution import ExecutionOptions

if TYPE_CHECKING:
    from spike_export.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Job:
    """One model through the stages.

    Attributes:
        model: HF directory, `.gguf` file, or hub id.
        work_dir: Where statistics, recipe, bundle, check and report go.
        plan: The engine plan to write; None ends the run before the build.
        calibration: How to calibrate and choose.
        quantize: False exports the model as it is.
        number_format: What the linears that calibration quantizes are written in.
        corpus: The text of calibration and check.
        execution: Where and how calibration runs the model.
        cache: Which cache of keys and values the graph has.
        logits: Of which tokens the graph gives logits.
        limits: On the shipped bundle's accuracy.
        texts: Texts of other kinds than the calibration's, on which the bundle is judged too; some source code by
            default.
        build: How to build the plan.
        recompute_recipe: Discard a recipe that was edited by hand.
        attribution_windows: Windows on which to measure what each input causes of the divergence; 0 not to.
        cluster: Ray cluster whose workers forward the calibration's windows; None to do it in this process.
        command: The command line that asked for the job, for the report; empty where none did.
    """

    model: str
    work_dir: Path
    plan: Path | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    quantize: bool = True
    number_format: NumberFormat = "int8"
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    logits: LogitsScope = "all"
    limits: AccuracyLimits = field(default_factory=AccuracyLimits)
    texts: CorpusOptions = field(default_factory=CorpusOptions)
    build: BuildOptions = field(default_factory=BuildOptions)
    recompute_recipe: bool = False
    attribution_windows: int = 0
    cluster: ClusterOptions | None = None
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.attribution_windows < 0:
            raise RecipeError(f"--attribution-windows is {self.attribution_windows}; expected 0 or more")
        require_quantized(self.number_format, self.quantize)
        if self.number_format == "fp8" and self.calibration.attention != "unquantized":
            raise RecipeError(
                f"--attention {self.calibration.attention} does not go with --number-format fp8; leave one of them out"
            )
        self._require_cache()
        if self.plan is not None:
            require_file_names(self.plan, self.build.split)

    def _require_cache(self) -> None:
        """Refuse an INT8 cache that export or TensorRT would refuse.

        Raises:
            RecipeError: Names both options.
        """
        if self.calibration.kv_cache_dtype == "unquantized":
            return
        if not self.quantize:
            raise RecipeError("--kv-cache-dtype int8 and --no-quantize contradict each other; give one")
        if self.number_format == "fp8":
            raise RecipeError("--kv-cache-dtype int8 does not go with --number-format fp8; leave one of them out")
        if self.plan is not None and self.cache.kind == "static":
            raise RecipeError(
                "TensorRT does not write into a static cache in INT8; give --kv-cache dynamic, or calibrate and export "
                "for ONNX Runtime alone"
            )


def require_buildable(options: BuildOptions, number_format: NumberFormat = "int8") -> None:
    """Find out now, not after the calibration, that no backend here can build what is asked for.

    Raises:
        EngineError: Names the backend or the target, and the remedy.
    """
    from spike_export.engines.plan.backend import (
        choose_backend,
        detect_machine,
        require_features,
        require_float8_compatibility,
        resolve_targets,
    )

    machine, float8 = detect_machine(), number_format == "fp8"
    backend = choose_backend(options.backend, machine).backend
    resolve_targets(backend, options.targets, machine.gpu, float8=float8)
    require_features(backend, options.features, machine.gpu)
    require_float8_compatibility(options.hardware_compatible, float8=float8)


def require_length(length: int, checkpoint: "Checkpoint") -> None:
    """Refuse windows that are longer than the sequences a model takes.

    Raises:
        RecipeError: Names the option and the model's limit.
    """
    most = checkpoint.config.max_position_embeddings
    if length > most:
        raise RecipeError(f"--length is {length}; {checkpoint.name} takes at most {most} tokens: give that or less")


def require_room(length: int, capacity: int | None) -> None:
    """Refuse windows that the check could not feed into a static cache.

    Args:
        length: Tokens of a window, BOS included.
        capacity: Own tokens the cache has room for; None for one that grows.

    Raises:
        RecipeError: Names both options.
    """
    if capacity is not None and length > capacity:
        raise RecipeError(
            f"the static cache's capacity is {capacity}, and the check feeds windows of --length {length}: give a "
            f"--length that fits, or export with a larger --capacity"
        )
