"""What a run decided and why: of the whole recipe, and of single modules."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spike_export.artifacts.errors import ArtifactError, RecipeError
from spike_export.artifacts.recipe import SMOOTHED_HEAD, ModulePlan, Recipe, load_recipe
from spike_export.artifacts.results.attribution import Attribution, attribution_of
from spike_export.artifacts.visible_text import visible
from spike_export.calibration.noise_shares import noise_shares
from spike_export.calibration.statistics.description import LargeToken, SpikesDescription, load_description
from spike_export.checkpoint.checkpoint import LM_HEAD
from spike_export.checkpoint.modules import representative_of

RECIPE_FILE = "recipe.json"

HEAD = LM_HEAD.removesuffix(".weight")

TOKENS_OWN = "each token's own, at run time"

_LIKELY = 5
"""Names that a message about an unknown module offers."""


@dataclass(frozen=True)
class RunInspection:
    """A run that calibrated, the recipe it decided on, and what of its divergence each input causes, if measured."""

    run: Path
    recipe: Recipe
    attribution: Attribution | None = None

    @property
    def headlines(self) -> tuple[tuple[str, str], ...]:
        """Label and value, in words, of what holds for the whole model; the recipe's notes last."""
        return (*_headlines(self.recipe), *(("note", note) for note in self.recipe.notes()))

    @property
    def unquantized(self) -> Mapping[str, ModulePlan]:
        """The modules that are not quantized."""
        return {name: plan for name, plan in self.recipe.modules.items() if plan.number_format is None}

    @property
    def noise_shares(self) -> dict[str, float]:
        """Each input, by its representative, with its share of the estimated noise."""
        return noise_shares(self.recipe)

    def document(self) -> dict[str, Any]:
        """Return the recipe's scheme, its prefix, the candidates, the noise, and what is not quantized, as JSON."""
        return {
            **dict(_headlines(self.recipe)),
            "notes": list(self.recipe.notes()),
            "noise shares": self.noise_shares,
            "divergence": None if self.attribution is None else self.attribution.model_dump(mode="json"),
            "search": self.recipe.search.model_dump(mode="json"),
            "not quantized": {name: plan.model_dump(mode="json") for name, plan in self.unquantized.items()},
        }

    def explain(self, modules: Sequence[str]) -> dict[str, dict[str, str]]:
        """Return for each module, by its full name, its precision and the figures that decided it, in words.

        Args:
            modules: Full names such as `model.layers.11.mlp.down_proj`, or their ends from the layer on.

        Raises:
            RecipeError: A name is none of the recipe's modules.
        """
        names = [_resolve(self.recipe, each) for each in modules]
        return {name: {**_explanation(self.recipe, self.run, name), **self._caused(name)} for name in names}

    def _caused(self, name: str) -> dict[str, str]:
        """Return how much of the divergence a module's input causes, in words."""
        measured = self.attribution
        representative = name if name == HEAD else representative_of(name)
        if measured is None or representative not in measured.inputs:
            return {}
        alone, saved = measured.inputs[representative].alone, measured.saved_without(representative)
        figures = f"{alone:.2e} nats alone; all but it has {saved:.2e} less than all, {measured.divergence:.2e}"
        return {f"divergence of the input of {representative}": figures}


def inspect_run(run: Path) -> RunInspection:
    """Read what a run decided.

    Raises:
        RecipeError: The recipe cannot be read.
        ArtifactError: What was measured of its inputs cannot be read.
    """
    recipe = load_recipe(run / RECIPE_FILE)
    return RunInspection(run, recipe, attribution_of(recipe, run))


def _headlines(recipe: Recipe) -> list[tuple[str, str]]:
    scheme = recipe.scheme
    counts = Counter(plan.precision for plan in recipe.modules.values())
    lines = [
        ("model", f"{recipe.model.source} ({recipe.model.architecture})"),
        ("scheme", f"weights {scheme.weights}, activations {recipe.activations()}, range {scheme.activation_range}"),
        ("head", scheme.head),
        ("linears", ", ".join(f"{count} {precision}" for precision, count in sorted(counts.items()))),
        ("prefix", f"{list(recipe.prefix.token_ids)} {recipe.prefix.text!r}" if recipe.prefix else "none"),
        ("rotation", f"{recipe.rotation.kind}, seed {recipe.rotation.seed}" if recipe.rotation else "none"),
        ("hadamard", recipe.hadamard_places()),
        ("smoothing", f"{len(recipe.smoothing)} inputs"),
        ("value rotation", f"{len(recipe.value_rotation)} layers"),
    ]
    plain, behind = recipe.search.plain_reference_perplexity, recipe.search.reference_perplexity
    searched = f"{decimals(plain)}, behind the prefix {decimals(behind)}" if behind is not None else "not measured"
    return [*lines, ("unquantized perplexity on the search windows", searched)]


def decimals(value: float | None) -> str:
    """Return a figure with three decimals; nothing for one that is not known."""
    return "" if value is None else f"{value:.3f}"


def _resolve(recipe: Recipe, name: str) -> str:
    if name == HEAD:
        return name
    for candidate in (name, f"model.layers.{name}", f"model.{name}"):
        if candidate in recipe.modules:
            return candidate
    likely = [known for known in recipe.modules if name.rpartition(".")[2] in known][:_LIKELY]
    offered = ", ".join(likely or list(recipe.modules)[:_LIKELY])
    raise RecipeError(f"{name}: the recipe has no such module; it has {offered} ...")


def _head_explanation(recipe: Recipe) -> dict[str, str]:
    kept, head = recipe.scheme.unquantized, recipe.scheme.head
    precisions = {"unquantized": kept, "int8-weights": "float32 products of INT8 weights"}
    why = "the default" if head == "unquantized" else "asked for"
    lines = {"precision": precisions.get(head, "int8"), "why": f"scheme.head is {head}, {why}; no statistics decide it"}
    if head == SMOOTHED_HEAD:
        lines["activation scale"] = TOKENS_OWN
        lines["smoothing"] = _head_smoothing(recipe)
    return lines


def _head_smoothing(recipe: Recipe) -> str:
    """Return what the final norm's output is divided by, and how far from the model's own head that leaves this one."""
    plan, divergences = recipe.head_smoothing, {each.name: each.divergence for each in recipe.search.head}
    name = "none" if plan is None else f"{plan.form} {plan.parameter}"
    used = name if plan is None else f"{name} on the final norm's output"
    # A recipe that was edited may have what never competed.
    if name not in divergences or "none" not in divergences:
        return used
    alone, plain = divergences[name], divergences["none"]
    return f"{used}: the divergence of the head alone is {alone:.4f}, without smoothing {plain:.4f}"


def _clip(clip: float | None) -> str:
    if clip is None:
        return ""
    if clip > 1:
        return f", {clip:.2f} times the calibrated range, for other kinds of text"
    return f", {clip:.0%} of what calibration saw; the rest saturates"


def _explanation(recipe: Recipe, run: Path, name: str) -> dict[str, str]:
    if name == HEAD:
        return _head_explanation(recipe)
    plan = recipe.modules[name]
    lines = {"precision": plan.precision + (" products of INT8 weights" if plan.weights else "")}
    lines["why"] = _why(recipe, plan)
    if plan.ratio is not None:
        rank = _rank(recipe, "ratio", plan.ratio)
        lines["max-median ratio"] = f"{plan.ratio:.1f} (rank {rank} of {len(recipe.modules)} linears)"
    if plan.noise is not None:
        rank = _rank(recipe, "noise", plan.noise)
        lines["estimated noise of INT8"] = f"{plan.noise:.2e} of the residual stream (rank {rank})"
    if plan.per_token:
        lines["activation scale"] = TOKENS_OWN
    if plan.static_scale is not None:
        covers = f"magnitudes up to {127 * plan.static_scale:.4g}"
        lines["activation scale"] = f"{plan.static_scale:.4g}: {covers}{_clip(plan.clip)}"
    representative = representative_of(name)
    smoothing = recipe.smoothing.get(representative)
    if smoothing is not None:
        lines["smoothing"] = f"{smoothing.form} {smoothing.parameter} on the input of {representative}"
    for stem, label in (("spikes", "without a prefix"), ("spikes_prefixed", "behind the prefix")):
        seen = _seen(run / stem, representative, recipe, behind=stem != "spikes")
        if seen:
            lines[f"largest tokens {label}"] = seen
    return lines


def _why(recipe: Recipe, plan: ModulePlan) -> str:
    alpha = recipe.alpha
    score = plan.ratio if recipe.criterion == "ratio" else plan.noise
    if plan.reason == "router":
        return "a router decides which experts run; it is never quantized"
    if alpha is None or score is None:
        return plan.reason or "QFeM was not used: everything is quantized"
    if plan.number_format:
        return f"its {recipe.criterion} {score:.4g} does not exceed alpha = {alpha:.4g}"
    return f"its {recipe.criterion} {score:.4g} exceeds alpha = {alpha:.4g}" + (
        f" ({plan.reason.partition('; ')[2]})" if plan.reason and "; " in plan.reason else ""
    )


def _rank(recipe: Recipe, field: str, value: float) -> int:
    return 1 + sum(bool((getattr(plan, field) or 0.0) > value) for plan in recipe.modules.values())


def _seen(stem: Path, module: str, recipe: Recipe, *, behind: bool) -> str:
    """Return the largest tokens of a module's statistics; empty where the recipe was not made of them."""
    try:
        description = load_description(stem)
    except ArtifactError:
        return ""
    seen = description.modules.get(module)
    if seen is None or not _made_of(recipe, description, behind):
        return ""
    return ", ".join(map(_token, seen.top_tokens[:3]))


def _made_of(recipe: Recipe, description: SpikesDescription, behind: bool) -> bool:
    """Whether statistics are of the recipe's model, corpus and windows, and behind its prefix where any is meant."""
    prefix = recipe.prefix_ids if behind else ()
    model, corpus = description.model, description.corpus
    if model is None or corpus is None or (behind and not prefix):
        return False
    measured = (description.prefix_ids, model.sha256, corpus.sha256, description.samples)
    return measured == (prefix, recipe.model.sha256, recipe.corpus.sha256, recipe.corpus.samples)


def _token(token: LargeToken) -> str:
    text = visible(repr(token.text))
    return f"{token.amax:.4g} at {text} (window {token.sample}, token {token.position})"
