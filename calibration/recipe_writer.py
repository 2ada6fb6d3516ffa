"""Puts the choices into a recipe."""

from collections.abc import Collection
from dataclasses import replace

from spike_export.artifacts.recipe import CorpusSource, ModelSource, Prefix, Recipe, Scheme, Search
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.mixture import Mixture
from spike_export.calibration.methods import qfep
from spike_export.calibration.methods.context import Calibration, Transform, attention_plans, module_plans
from spike_export.calibration.methods.kv_cache_steps import kv_cache_plans
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.overflow_guard import stream_dtype
from spike_export.calibration.methods.prefix_choice import prefix_notes, prefix_text
from spike_export.calibration.methods.qfem import ModuleChoice
from spike_export.calibration.statistics.spikes import SpikeStatistics


def build_recipe(
    calibration: Calibration,
    corpus: Corpus | Mixture,
    statistics: SpikeStatistics,
    choice: ModuleChoice,
    transform: Transform = Transform(),
    search: Search = Search(),
    per_token: Collection[str] = (),
) -> Recipe:
    """Write the plan down: precision, scale, ratio and reason of every linear, and the prefix of `statistics`.

    Args:
        calibration: The model and the options.
        corpus: What it was calibrated on.
        statistics: Of the transformed model behind the prefix.
        choice: The modules that stay in 16 bit.
        transform: What is done to the weights.
        search: How the choices were made.
        per_token: Representatives whose tokens have each a scale of their own.
    """
    checkpoint = calibration.checkpoint
    dtype, guard = stream_dtype(calibration.options.dtype, statistics)
    options = replace(calibration.options, dtype=dtype)
    ids = statistics.prefix_ids
    prefix = None
    if ids:
        text, ratio = prefix_text(checkpoint, ids), qfep.worst_ratio(statistics)[1]
        prefix = Prefix(token_ids=ids, text=text, ratio=ratio, notes=prefix_notes(checkpoint, ids))
    head = calibration.head_smoothing(transform.rotation)
    return Recipe(
        model=ModelSource(
            source=checkpoint.name,
            architecture=checkpoint.config.family.model_type,
            sha256=checkpoint.tensors.sha256(),
        ),
        corpus=_corpus_source(corpus, options),
        scheme=_scheme(options, guard),
        alpha=choice.alpha if options.qfem else None,
        criterion=choice.criterion,
        prefix=prefix,
        modules=module_plans(statistics, choice.kept, transform, options, per_token=per_token),
        attention=attention_plans(statistics, options),
        kv_cache=kv_cache_plans(calibration, transform, ids),
        rotation=transform.rotation,
        hadamard=transform.hadamard,
        input_hadamard=transform.input_hadamard,
        smoothing=transform.smoothing,
        value_rotation=transform.value_rotation,
        head_smoothing=head.plan,
        search=search.model_copy(update={"head": head.candidates}),
    )


def _corpus_source(text: Corpus | Mixture, options: CalibrationOptions) -> CorpusSource:
    mixture = text if isinstance(text, Mixture) else Mixture.of(text)
    return mixture.source(options.samples, options.length, options.seed, options.windows)


def _scheme(options: CalibrationOptions, reason: str | None) -> Scheme:
    return Scheme(
        weights=options.weights,
        activation_range=options.activation_range,
        excluded_weights=options.searched_kept_weights,
        attention=options.attention,
        head=options.head,
        unquantized=options.dtype,
        unquantized_reason=reason,
    )
