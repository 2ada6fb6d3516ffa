"""What a run decided and why, in words: of the whole recipe, and of single modules."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from spike_export.artifacts.errors import ArtifactError, RecipeError
from spike_export.artifacts.recipe import SMOOTHED_HEAD, ModulePlan, Recipe, load_recipe
from spike_export.artifacts.visible_text import visible
from spike_export.calibration.statistics.spikes import load_description
from spike_export.checkpoint.checkpoint import LM_HEAD
from spike_export.checkpoint.modules import representative_of
from spike_export.cli.terminal.text_table import print_facts, print_table

HEAD = LM_HEAD.removesuffix(".weight")

_LIKELY = 5
"""Names that a message about an unknown module offers."""


def _recipe(run: Path) -> Recipe:
    path = run / "recipe.json"
    if not path.exists():
        raise ArtifactError(f"{run}: holds no recipe.json; give the work directory of a run that calibrated")
    return load_recipe(path)


def summarize_recipe(run: Path, as_json: bool, console: Console) -> None:
    """Print the recipe's scheme, its prefix, what competed, and the modules that are not quantized."""
    recipe = _recipe(run)
    if as_json:
        console.print_json(json.dumps(_summary(recipe)))
        return
    print_facts(console, _headlines(recipe))
    for title, columns, rows in _tables(recipe):
        if rows:
            print_table(console, title, columns, rows)


_Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def _tables(recipe: Recipe) -> list[_Table]:
    search = recipe.search
    prefixes = [
        (
            " ".join(str(token) for token in each.token_ids) or "(none)",
            visible(repr(each.text)),
            f"{each.ratio:.0f}",
            _number(each.reference_perplexity),
            _number(each.perplexity),
            each.verdict,
        )
        for each in search.prefixes
    ]
    transforms = [
        (each.name, _number(each.perplexity), f"{each.divergence:.4f}", each.verdict) for each in search.transforms
    ]
    heads = [(each.name, f"{each.divergence:.4f}", each.verdict) for each in search.head]
    curve = [
        (
            point.criterion,
            str(point.fp16_modules),
            f"{point.fp16_share:.1%}",
            _number(point.perplexity),
            "yes" if point.pareto else "",
        )
        for point in search.curve
    ]
    kept = [(name, plan.precision, plan.reason or "") for name, plan in _kept(recipe).items()]
    return [
        ("prefixes", ("tokens", "text", "worst ratio", "16-bit ppl", "INT8 ppl", "verdict"), prefixes),
        ("transforms, all in INT8", ("transform", "ppl", "divergence", "verdict"), transforms),
        ("smoothings of the head's input", ("smoothing", "divergence", "verdict"), heads),
        ("sets of kept modules", ("by", "linears", "MACs", "ppl", "Pareto"), curve),
        ("not quantized", ("module", "precision", "reason"), kept),
    ]


def _headlines(recipe: Recipe) -> list[tuple[str, str]]:
    scheme = recipe.scheme
    counts = Counter(plan.precision for plan in recipe.modules.values())
    lines = [
        ("model", f"{recipe.model.source} ({recipe.model.architecture})"),
        ("scheme", f"weights {scheme.weights}, activations {scheme.activations}, range {scheme.activation_range}"),
        ("head", scheme.head),
        ("linears", ", ".join(f"{count} {precision}" for precision, count in sorted(counts.items()))),
        ("prefix", f"{list(recipe.prefix.token_ids)} {recipe.prefix.text!r}" if recipe.prefix else "none"),
        ("rotation", f"{recipe.rotation.kind}, seed {recipe.rotation.seed}" if recipe.rotation else "none"),
        ("smoothing", f"{len(recipe.smoothing)} inputs"),
    ]
    if recipe.search.reference_perplexity is not None:
        plain = _number(recipe.search.plain_reference_perplexity)
        behind = _number(recipe.search.reference_perplexity)
        lines.append(("unquantized perplexity on the search windows", f"{plain}, behind the prefix {behind}"))
    return [*lines, *(("note", note) for note in recipe.notes())]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _kept(recipe: Recipe) -> dict[str, ModulePlan]:
    return {name: plan for name, plan in recipe.modules.items() if plan.number_format is None}


def _summary(recipe: Recipe) -> dict[str, Any]:
    return {
        **dict(_headlines(recipe)),
        "search": recipe.search.model_dump(mode="json"),
        "not quantized": {name: plan.model_dump(mode="json") for name, plan in _kept(recipe).items()},
    }


def explain_modules(run: Path, names: Sequence[str], as_json: bool, console: Console) -> None:
    """Print for each module its precision and the figures that decided it.

    Raises:
        RecipeError: A name is none of the recipe's modules.
    """
    recipe = _recipe(run)
    explained = {name: _explanation(recipe, run, name) for name in (_resolve(recipe, each) for each in names)}
    if as_json:
        console.print_json(json.dumps(explained))
        return
    for name, lines in explained.items():
        console.print(Text(name, style="bold"), soft_wrap=True)
        for label, value in lines.items():
            console.print(Text(f"  {label}: {value}"), soft_wrap=True)


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
        lines["activation scale"] = "each token's own, at run time"
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
    if plan.activation_scale is not None:
        covers = f"magnitudes up to {127 * plan.activation_scale:.4g}"
        clip = f", {plan.clip:.0%} of what calibration saw; the rest saturates" if plan.clip else ""
        lines["activation scale"] = f"{plan.activation_scale:.4g}: {covers}{clip}"
    representative = representative_of(name)
    smoothing = recipe.smoothing.get(representative)
    if smoothing is not None:
        lines["smoothing"] = f"{smoothing.form} {smoothing.parameter} on the input of {representative}"
    for stem, label in (("spikes", "without a prefix"), ("spikes_prefixed", "behind the prefix")):
        seen = _seen(run / stem, representative)
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


def _seen(stem: Path, module: str) -> str:
    """Return the largest tokens of a module's statistics; empty where there are none."""
    try:
        tokens = load_description(stem)["modules"][module]["top_tokens"]
    except (ArtifactError, KeyError):
        return ""
    return ", ".join(
        f"{token['amax']:.4g} at {visible(repr(token['text']))} (window {token['sample']}, token {token['position']})"
        for token in tokens[:3]
    )
