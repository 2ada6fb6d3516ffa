"""The options of the stages, from the arguments of the commands."""

from typing import TYPE_CHECKING

from spike_export.cli.arguments import (
    PROFILES_OF,
    BuildArguments,
    ClusterArguments,
    CorpusArguments,
    DtypeArguments,
    ExecutionArguments,
    GateArguments,
    GraphArguments,
    QuantizationArguments,
    ThreadArguments,
    values,
)

if TYPE_CHECKING:
    from spike_export.calibration.corpus.files import CorpusOptions
    from spike_export.calibration.methods.options import CalibrationOptions
    from spike_export.engines.plan.build_options import BuildOptions
    from spike_export.export.cache_options import CacheOptions
    from spike_export.pipeline.cluster.cluster_options import ClusterOptions
    from spike_export.pipeline.evaluation_text import EvaluationText
    from spike_export.pipeline.execution import ExecutionOptions


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


def corpus_options(corpus: CorpusArguments) -> "CorpusOptions":
    """Return where the corpus is, and what of it is text."""
    from spike_export.calibration.corpus.files import CorpusOptions

    return CorpusOptions(
        corpus.corpus, corpus.text_field, corpus.corpus_split, corpus.chat_template, corpus.corpus_weight
    )


def execution_options(execution: ExecutionArguments) -> "ExecutionOptions":
    """Return where and how calibration runs the model."""
    from spike_export.pipeline.execution import ExecutionOptions

    return ExecutionOptions(devices=execution.device, compute_dtype=execution.compute_dtype, layers=execution.layers)


def cache_options(graph: GraphArguments) -> "CacheOptions":
    """Return which cache of keys and values the graph has."""
    from spike_export.export.cache_options import CacheOptions

    return CacheOptions(graph.kv_cache, graph.capacity)


def cluster_options(cluster: ClusterArguments) -> "ClusterOptions | None":
    """Return the cluster that windows are spread over, or None without --ray.

    Raises:
        CalibrationError: A figure means no worker, or is given without --ray.
    """
    from spike_export.artifacts.errors import CalibrationError
    from spike_export.pipeline.cluster.cluster_options import ClusterOptions

    given = {name.removeprefix("ray_"): value for name, value in values(cluster).items() if value is not None}
    if not given:
        return None
    if "ray" not in given:
        raise CalibrationError(f"--ray-{next(iter(given))} is of a Ray cluster; give --ray too")
    return ClusterOptions(address=given.pop("ray"), **given)


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


def further_texts(gate: GateArguments, corpus: CorpusArguments) -> "CorpusOptions":
    """Return the texts of other kinds that a bundle is judged on; records hold them under the corpus's key."""
    from spike_export.calibration.corpus.files import CorpusOptions

    return CorpusOptions(gate.text or None, corpus.text_field)


def evaluation_text(corpus: CorpusArguments, gate: GateArguments) -> "EvaluationText":
    """Return the text that a bundle is judged on."""
    from spike_export.pipeline.evaluation_text import EvaluationText

    return EvaluationText(
        corpus=corpus_options(corpus),
        samples=corpus.samples,
        length=corpus.length,
        seed=corpus.seed,
        windows=corpus.windows,
        further=further_texts(gate, corpus),
    )


def use_threads(arguments: ThreadArguments) -> None:
    """Let the command and what it starts use as many threads as were asked for; call it before torch is loaded.

    Raises:
        EngineError: This machine cannot run so many at once.
    """
    from spike_export.artifacts.process.threads import allow_threads

    if arguments.threads is not None:
        allow_threads(arguments.threads)
