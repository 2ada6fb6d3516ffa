"""Two runs of one model compared: what was chosen, what became of each module, and how accurate the results are."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.recipe import ModulePlan, Recipe, load_recipe
from spike_export.artifacts.results.check_document import Check, CheckCorpus, CheckCost, load_check
from spike_export.artifacts.visible_text import visible
from spike_export.engines.accuracy.intervals import Interval
from spike_export.inspection.run import RECIPE_FILE

CHECK_FILE = "check.json"

NONE = "none"


@dataclass(frozen=True, slots=True)
class ModuleDifference:
    """A module that the two runs treat differently, or whose ratio differs.

    Attributes:
        module: HF name.
        first: Precision and kind of scale in the first run.
        second: The same in the second run.
        ratio: The max-median ratio in the second run, as a multiple of the first run's; None where it is not known.
        scale: The same of the static scale; None unless both have one.
    """

    module: str
    first: str
    second: str
    ratio: float | None
    scale: float | None


@dataclass(frozen=True, slots=True)
class AccuracyDifference:
    """The accuracy of the two bundles on one text.

    Attributes:
        text: Name of the text.
        first: Increase of the perplexity by quantization in the first run, as a fraction.
        second: The same in the second run.
        change: Perplexity of the second bundle over the first one's, minus 1, paired over the windows; None where the
            two checks did not read the same windows, or do not say what each window gave.
    """

    text: str
    first: Interval
    second: Interval
    change: Interval | None


@dataclass(frozen=True)
class RunDifference:
    """What differs between two runs.

    Attributes:
        choices: (What, in the first run, in the second run) of what holds for the whole model, where they differ.
        modules: The modules that are treated differently.
        compared: Modules of the model.
        ratio: Median over the modules of the second run's ratio as a multiple of the first run's; None if not known.
        accuracy: Of the shipped bundles; empty unless both runs have a check.
    """

    choices: tuple[tuple[str, str, str], ...]
    modules: tuple[ModuleDifference, ...]
    compared: int
    ratio: float | None
    accuracy: tuple[AccuracyDifference, ...]

    def document(self) -> dict[str, Any]:
        """Return the difference as JSON's values."""
        return {
            "format": 1,
            "choices": [{"what": what, "first": first, "second": second} for what, first, second in self.choices],
            "modules": [asdict(each) for each in self.modules],
            "compared": self.compared,
            "ratio": self.ratio,
            "accuracy": [asdict(each) for each in self.accuracy],
        }


def difference(first: Path | str, second: Path | str) -> RunDifference:
    """Compare the recipes of two runs, and their checks where both have one.

    Raises:
        ArtifactError: A folder has no recipe, the runs are of different models, or a check cannot be read.
        RecipeError: A recipe is malformed.
    """
    runs = Path(first), Path(second)
    one, other = (_recipe(run) for run in runs)
    if set(one.modules) != set(other.modules):
        strange = sorted(set(one.modules) ^ set(other.modules))
        raise ArtifactError(
            f"{first} and {second}: runs of different models: only one of them has the module {strange[0]}"
        )
    changed = [_module(name, plan, other.modules[name]) for name, plan in one.modules.items()]
    ratios = [each.ratio for each in changed if each.ratio is not None]
    checks = [load_check(run / CHECK_FILE) for run in runs if (run / CHECK_FILE).is_file()]
    return RunDifference(
        choices=tuple(row for row in _choices(one, other) if row[1] != row[2]),
        modules=tuple(each for each in changed if each.first != each.second),
        compared=len(changed),
        ratio=float(np.median(ratios)) if ratios else None,
        accuracy=tuple(_accuracy(*checks)) if len(checks) == len(runs) else (),
    )


def _recipe(run: Path) -> Recipe:
    if not (run / RECIPE_FILE).is_file():
        raise ArtifactError(f"{run}: no run's folder: it has no {RECIPE_FILE}; give a folder that calibrate wrote")
    return load_recipe(run / RECIPE_FILE)


def _module(name: str, one: ModulePlan, other: ModulePlan) -> ModuleDifference:
    return ModuleDifference(
        name, _kind(one), _kind(other), _factor(one.ratio, other.ratio), _factor(one.static_scale, other.static_scale)
    )


def _kind(plan: ModulePlan) -> str:
    return f"{plan.precision}, {plan.activations}" if plan.number_format else plan.precision


def _factor(one: float | None, other: float | None) -> float | None:
    return other / one if one and other else None


def _choices(one: Recipe, other: Recipe) -> Iterator[tuple[str, str, str]]:
    """Yield what holds for the whole model, in words."""
    words = [dict(_words(recipe)) for recipe in (one, other)]
    for what in words[0]:
        yield what, words[0][what], words[1][what]


def _words(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "model", f"{visible(recipe.model.source)} (sha256 {recipe.model.sha256[:12]})"
    yield "corpus", f"{visible(recipe.corpus.name)}, {recipe.corpus.samples} windows of {recipe.corpus.length} tokens"
    prefix = recipe.prefix
    yield "prefix", NONE if prefix is None else f"{list(prefix.token_ids)} {visible(repr(prefix.text))}"
    yield "threshold", NONE if recipe.alpha is None else f"{recipe.criterion} above {recipe.alpha:.4g}"
    yield from ((name, str(value)) for name, value in recipe.scheme.model_dump(exclude_none=True).items())
    yield "rotation", NONE if recipe.rotation is None else f"{recipe.rotation.kind}, seed {recipe.rotation.seed}"
    yield "hadamard", recipe.hadamard_places()
    forms = sorted({f"{plan.form} {plan.parameter:g}" for plan in recipe.smoothing.values()})
    yield "smoothing", f"{len(recipe.smoothing)} inputs: {', '.join(forms)}" if forms else NONE
    yield "value rotation", f"{len(recipe.value_rotation)} layers" if recipe.value_rotation else NONE
    yield "smoothing of the head", NONE if recipe.head_smoothing is None else f"{recipe.head_smoothing.parameter:g}"
    yield "modules kept", str(len(recipe.kept()))


def _accuracy(one: Check, other: Check) -> Iterator[AccuracyDifference]:
    """Yield the shipped bundles' accuracy on each text that both checks read."""
    seconds = {corpus.name: (corpus, cost) for corpus, cost in _costs(other)}
    for corpus, cost in _costs(one):
        if corpus.name in seconds:
            theirs, second = seconds[corpus.name]
            paired = corpus.windows_sha256 is not None and corpus.windows_sha256 == theirs.windows_sha256
            change = _change(cost, second) if paired else None
            yield AccuracyDifference(corpus.name, _interval(cost), _interval(second), change)


def _costs(check: Check) -> Iterator[tuple[CheckCorpus, CheckCost]]:
    if check.shipped is not None and check.shipped.cost is not None:
        yield check.corpus, check.shipped.cost
    yield from ((text.corpus, text.cost) for text in check.texts)


def _interval(cost: CheckCost) -> Interval:
    return Interval(cost.increase.mean, cost.increase.margin)


def _change(one: CheckCost, other: CheckCost) -> Interval | None:
    """Return the relative change of the perplexity, paired over the windows; None where a check is an older one."""
    if not one.losses or len(one.losses) != len(other.losses):
        return None
    return Interval.of(np.array(other.losses) - np.array(one.losses)).as_increase
