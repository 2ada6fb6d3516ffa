"""The steps of a calibration: statistics, prefix, statistics behind the prefix, modules, recipe.

Each step is a function from values to a value, so that a caller may store what a step returned and go on from there.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration import qfem, qfep
from spike_export.calibration.checkpoint import Checkpoint
from spike_export.calibration.corpus import Corpus
from spike_export.calibration.errors import RecipeError
from spike_export.calibration.measure import measure_spikes
from spike_export.calibration.modules import linears, siblings
from spike_export.calibration.perplexity import model_perplexity, with_bos
from spike_export.calibration.prefix_cache import prefix_key_values
from spike_export.calibration.progress import Progress, silent
from spike_export.calibration.qfem import ModuleChoice
from spike_export.calibration.recipe import (
    ActivationRange,
    CorpusSource,
    Dtype,
    ModelSource,
    ModulePlan,
    Prefix,
    PrefixCandidate,
    Recipe,
    Scheme,
    Search,
    WeightScheme,
    WindowKind,
    activation_scale,
)
from spike_export.calibration.reference_model import ReferenceModel, load_reference_model
from spike_export.calibration.simulate import QuantizedWeights, simulated
from spike_export.calibration.spikes import SpikeStatistics
from spike_export.calibration.token_windows import TokenWindows

SEARCH_WINDOWS = 8
"""Calibration windows on which candidates are compared; the final statistics use all."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What to measure and how to choose.

    Attributes:
        samples: Calibration windows.
        length: Tokens per window, BOS included.
        seed: Places the windows.
        windows: From where they are cut.
        weights: Scales of INT8 weights.
        activation_range: What the static activation scales cover.
        dtype: Precision of what is not quantized.
        qfem: Whether modules may stay in 16 bit.
        qfep: Whether a prefix may be used.
        alpha: Threshold given by the user; None to choose.
        max_fp16_modules: Number of linears to keep at most, and exactly as many as fit; None to choose.
        tolerance: Relative perplexity increase that the automatic choice accepts over its goal.
    """

    samples: int = 32
    length: int = 512
    seed: int = 0
    windows: WindowKind = "packed"
    weights: WeightScheme = "int8-per-channel"
    activation_range: ActivationRange = "sample-mean"
    dtype: Dtype = "float16"
    qfem: bool = True
    qfep: bool = True
    alpha: float | None = None
    max_fp16_modules: int | None = None
    tolerance: float = 0.005

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.samples < 1:
            raise RecipeError(f"--samples is {self.samples}; at least one window is needed")
        if self.length < 8:
            raise RecipeError(f"--length is {self.length}; a window needs at least 8 tokens")
        if self.alpha is not None and self.max_fp16_modules is not None:
            raise RecipeError("--alpha and --max-fp16-modules both say which modules stay in 16 bit; give one")
        if self.max_fp16_modules is not None and self.max_fp16_modules < 0:
            raise RecipeError(f"--max-fp16-modules is {self.max_fp16_modules}; expected 0 or more")
        if not 0 <= self.tolerance < 1:
            raise RecipeError(f"--tolerance is {self.tolerance}; expected a fraction such as 0.005")


@dataclass(frozen=True)
class PrefixChoice:
    """The outcome of the competition.

    Attributes:
        token_ids: The winner; empty for no prefix.
        candidates: Every competitor with its verdict, the empty prefix first.
    """

    token_ids: tuple[int, ...] = ()
    candidates: tuple[PrefixCandidate, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """A checkpoint with the windows it is calibrated on; the model is read into memory on first use."""

    checkpoint: Checkpoint
    windows: TokenWindows
    options: CalibrationOptions
    _models: dict[tuple[int, ...], ReferenceModel] = field(default_factory=dict, repr=False)
    _perplexities: dict[tuple[int, ...], float] = field(default_factory=dict, repr=False)

    @cached_property
    def model(self) -> ReferenceModel:
        """The unquantized model without a prefix."""
        return load_reference_model(self.checkpoint)

    @cached_property
    def quantized_weights(self) -> QuantizedWeights:
        """INT8 weights, shared by all simulations."""
        return QuantizedWeights(self.model, self.options.weights)

    def model_behind(self, prefix: tuple[int, ...]) -> ReferenceModel:
        """Return the model with a prefix's key/values in place."""
        if not prefix:
            return self.model
        if prefix not in self._models:
            self._models[prefix] = self.model.with_prefix(prefix_key_values(self.checkpoint, prefix))
        return self._models[prefix]

    def fed(self, content: NDArray[np.int64], prefix: tuple[int, ...]) -> NDArray[np.int64]:
        """Return what the model is fed behind a prefix: the content, with BOS before it unless the prefix has it."""
        bos = self.checkpoint.bos_token_id
        return content if bos in prefix else with_bos(content, bos)

    def with_options(self, options: CalibrationOptions) -> "Calibration":
        """Return the same model and windows with other options; what is in memory is shared, not read again."""
        changed = replace(self, options=options)
        if "model" in self.__dict__:
            changed.__dict__["model"] = self.model
        if "quantized_weights" in self.__dict__ and options.weights == self.options.weights:
            changed.__dict__["quantized_weights"] = self.quantized_weights
        return changed

    @property
    def search_windows(self) -> NDArray[np.int64]:
        """A few of the calibration windows, evenly spaced."""
        content = self.windows.calibration
        chosen = np.linspace(0, len(content) - 1, min(SEARCH_WINDOWS, len(content))).astype(np.int64)
        return content[np.unique(chosen)]

    def measure(self, prefix: tuple[int, ...], progress: Progress = silent) -> SpikeStatistics:
        """Record the statistics of all calibration windows behind a prefix."""
        fed = self.fed(self.windows.calibration, prefix)
        return measure_spikes(self.model_behind(prefix), fed, prefix, progress=progress)

    def reference_perplexity(self, prefix: tuple[int, ...]) -> float:
        """Return the unquantized model's perplexity on the search windows behind a prefix."""
        if prefix not in self._perplexities:
            self._perplexities[prefix] = self._perplexity(prefix)
        return self._perplexities[prefix]

    def simulated_perplexity(self, statistics: SpikeStatistics, kept: tuple[str, ...]) -> float:
        """Return the perplexity on the search windows with all but `kept` (representatives) quantized."""
        rule = self.options.activation_range
        scales = {
            linear: activation_scale(spikes.range(rule))
            for name, spikes in statistics.modules.items()
            if name not in kept
            for linear in siblings(name)
        }
        with simulated(self.model, scales, self.quantized_weights):
            return self._perplexity(statistics.prefix_ids)

    def _perplexity(self, prefix: tuple[int, ...]) -> float:
        content = self.search_windows
        return model_perplexity(self.model_behind(prefix), self.fed(content, prefix), content.shape[1])


def max_kept_linears(calibration: Calibration) -> int:
    """Return how many linears may stay in 16 bit: what the user allows, else a tenth."""
    if not calibration.options.qfem:
        return 0
    if calibration.options.max_fp16_modules is not None:
        return calibration.options.max_fp16_modules
    return int(qfem.AUTOMATIC_SHARE * len(linears(calibration.checkpoint.config.num_hidden_layers)))


def choose_prefix(calibration: Calibration, plain: SpikeStatistics, progress: Progress = silent) -> PrefixChoice:
    """Let no prefix, `[BOS]` and the found prefixes compete.

    A prefix is accepted when it lowers the worst max-median ratio; of the accepted ones the one with the lowest
    simulated perplexity wins, quantized as the final model will be: with the highest ratios kept in 16 bit.

    Args:
        calibration: The model and its windows.
        plain: Statistics without a prefix, of all calibration windows.
        progress: Told after each step.
    """
    bos = calibration.checkpoint.bos_token_id
    if bos is None:
        return PrefixChoice()
    proposed = qfep.propose_prefixes(calibration.model, plain, bos, progress)
    prefixes = qfep.distinct([(), (bos,), *(prefix.token_ids for prefix in proposed)])
    candidates: list[PrefixCandidate] = []
    for done, prefix in enumerate(prefixes, start=1):
        candidates.append(_candidate(calibration, prefix, candidates[0].ratio if candidates else None))
        progress("prefixes", done, len(prefixes))
    return _winner(tuple(candidates))


def _candidate(calibration: Calibration, prefix: tuple[int, ...], without: float | None) -> PrefixCandidate:
    fed = calibration.fed(calibration.search_windows, prefix)
    statistics = measure_spikes(calibration.model_behind(prefix), fed, prefix)
    module, ratio = qfep.worst_ratio(statistics)
    accepted = without is None or qfep.lowers_worst_ratio(ratio, without)
    perplexity = None
    if accepted:
        kept = _keep(calibration, statistics).kept
        perplexity = calibration.simulated_perplexity(statistics, kept)
    return PrefixCandidate(
        token_ids=prefix,
        text=prefix_text(calibration.checkpoint, prefix),
        worst_module=module,
        ratio=ratio,
        perplexity=perplexity,
        verdict="accepted" if accepted else "turned down: does not lower the worst ratio",
    )


def _keep(calibration: Calibration, statistics: SpikeStatistics) -> ModuleChoice:
    alpha = calibration.options.alpha
    if alpha is not None and calibration.options.qfem:
        return qfem.keep_above(statistics.ratios(), alpha)
    return qfem.keep_highest(statistics.ratios(), max_kept_linears(calibration))


def _winner(candidates: tuple[PrefixCandidate, ...]) -> PrefixChoice:
    best = min(candidates, key=lambda c: float("inf") if c.perplexity is None else c.perplexity)
    judged = tuple(
        candidate
        if candidate.perplexity is None
        else candidate.model_copy(update={"verdict": "chosen" if candidate is best else "higher perplexity"})
        for candidate in candidates
    )
    return PrefixChoice(best.token_ids, judged)


def prefix_text(checkpoint: Checkpoint, token_ids: tuple[int, ...]) -> str:
    """Return the tokens as text; empty without a tokenizer."""
    return str(checkpoint.tokenizer.decode(list(token_ids))) if checkpoint.tokenizer and token_ids else ""


def choose_kept(calibration: Calibration, statistics: SpikeStatistics, progress: Progress = silent) -> ModuleChoice:
    """Choose the modules that stay in 16 bit, as the options say; evaluate the curve unless they fix the answer."""
    options = calibration.options
    if not options.qfem or options.alpha is not None or options.max_fp16_modules is not None:
        return _keep(calibration, statistics)
    evaluated = 0

    def evaluate(kept: tuple[str, ...]) -> float:
        nonlocal evaluated
        evaluated += 1
        progress("module sets", evaluated, 0)
        return calibration.simulated_perplexity(statistics, kept)

    reference = calibration.reference_perplexity(statistics.prefix_ids)
    most = max_kept_linears(calibration)
    return qfem.choose_modules(statistics.ratios(), evaluate, reference, options.tolerance, most)


def build_recipe(
    calibration: Calibration,
    corpus: Corpus,
    statistics: SpikeStatistics,
    choice: ModuleChoice,
    search: Search = Search(),
) -> Recipe:
    """Write the plan down: precision, scale, ratio and reason of every linear, and the prefix of `statistics`."""
    checkpoint, options = calibration.checkpoint, calibration.options
    ids = statistics.prefix_ids
    prefix = None
    if ids:
        prefix = Prefix(token_ids=ids, text=prefix_text(checkpoint, ids), ratio=qfep.worst_ratio(statistics)[1])
    return Recipe(
        model=ModelSource(
            source=checkpoint.name,
            architecture=checkpoint.config.family.model_type,
            sha256=checkpoint.tensors.sha256(),
        ),
        corpus=CorpusSource(
            name=corpus.name,
            sha256=corpus.sha256,
            samples=options.samples,
            length=options.length,
            seed=options.seed,
            windows=options.windows,
        ),
        scheme=Scheme(weights=options.weights, activation_range=options.activation_range, unquantized=options.dtype),
        alpha=choice.alpha if options.qfem else None,
        prefix=prefix,
        modules=_module_plans(statistics, choice.kept, options),
        search=search,
    )


def _module_plans(
    statistics: SpikeStatistics, kept: tuple[str, ...], options: CalibrationOptions
) -> dict[str, ModulePlan]:
    plans = {}
    for name, spikes in statistics.modules.items():
        if name in kept:
            plan = ModulePlan(precision=options.dtype, ratio=spikes.ratio, reason="ratio > alpha")
        else:
            scale = activation_scale(spikes.range(options.activation_range))
            plan = ModulePlan(precision="int8", activation_scale=scale, ratio=spikes.ratio)
        plans.update(dict.fromkeys(siblings(name), plan))
    return plans
