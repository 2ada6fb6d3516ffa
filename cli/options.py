"""The options of the stages, from the arguments of the commands."""

from typing import TYPE_CHECKING, Any

from spike_export.cli.arguments import (
    PROFILES_OF,
    BuildArguments,
    CorpusArguments,
    DtypeArguments,
    ExecutionArguments,
    GraphArguments,
    QuantizationArguments,
    values,
)

if TYPE_CHECKING:
    from spike_export.calibration.methods.options import CalibrationOptions
    from spike_export.engines.plan.build_options import BuildOptions
    from spike_export.export.cache_options import CacheOptions
    from spike_export.pipeline.evaluation_text import EvaluationText


def calibration_options(
    corpus: CorpusArguments, quantization: QuantizationArguments, dtype: DtypeArguments
) -> "CalibrationOptions":
    """Return how to calibrate and choose."""
    from spike_export.calibration.methods.options import CalibrationOptions

    return CalibrationOptions(
        samples=corpus.samples,
        length=corpus.length,
        seed=corpus.seed,
        windows=corpus.windows,
        dtype=dtype.dtype,
        **values(quantization),
    )


def corpus_fields(corpus: CorpusArguments) -> dict[str, Any]:
    """Return what a job knows of its corpus."""
    names = ("corpus", "text_field", "corpus_split", "chat_template")
    return {name: getattr(corpus, name) for name in names}


def execution_fields(execution: ExecutionArguments) -> dict[str, Any]:
    """Return what a job knows of its execution."""
    return {
        "devices": execution.device,
        "compute_dtype": execution.compute_dtype,
        "residency": execution.layers,
    }


def cache_options(graph: GraphArguments) -> "CacheOptions":
    """Return which cache of keys and values the graph has."""
    from spike_export.export.cache_options import CacheOptions

    return CacheOptions(graph.kv_cache, graph.capacity)


def build_options(build: BuildArguments) -> "BuildOptions":
    """Return how to build the plan."""
    from spike_export.engines.plan.build_options import BatchRange, BuildOptions

    return BuildOptions(
        backend=build.backend,
        targets=build.target,
        profiles=PROFILES_OF[build.profiles],
        split=build.profiles == "split",
        batch=BatchRange(1, build.typical_batch, build.max_batch),
        capacity=build.plan_capacity,
        max_context=build.max_context,
        typical_prompt=build.typical_prompt,
        max_prompt=build.max_prompt,
        optimization_level=build.optimization_level,
        refit=build.refit,
        strip_weights=build.strip_weights,
        weight_streaming=build.weight_streaming,
        hardware_compatible=build.hardware_compatible,
        version_compatible=build.version_compatible,
        timing_cache=build.timing_cache,
        ignore_memory=build.ignore_memory,
    )


def evaluation_text(corpus: CorpusArguments) -> "EvaluationText":
    """Return the text that a bundle is judged on."""
    from spike_export.pipeline.evaluation_text import EvaluationText

    return EvaluationText(**values(corpus))
