"""The report: one self-contained HTML page of what a work directory holds.

Each part of the page is gathered on its own; a part whose artifact is missing or damaged says so in one sentence.
The page is a pure function of the artifacts: writing it twice gives the same bytes.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib.figure import Figure

from spike_export.artifacts.atomic_write import write_text
from spike_export.artifacts.check_document import Check, load_check
from spike_export.artifacts.documents import read_document
from spike_export.artifacts.errors import ArtifactError, SpikeExportError
from spike_export.artifacts.recipe import Recipe, load_recipe
from spike_export.artifacts.visible_text import visible
from spike_export.calibration.statistics.spikes import SpikeStatistics, load_spikes
from spike_export.checkpoint.modules import split_name
from spike_export.engines.plan.paths import plan_paths
from spike_export.report.check_table import (
    HEADINGS,
    NOT_MEASURED,
    check_rows,
    corpus_sentence,
    cost_sentences,
    gate_sentence,
    number,
    shipped_rows,
    with_margin,
    worst_lines,
)
from spike_export.report.figures import qfem_curve, ratio_chart, spike_picture, svg_text

REPORT_NAME = "report.html"

TOP_TOKENS = 20
TOKENS_PER_MODULE = 3
MAX_FACTS = 80
"""Lines shown of a document whose keys we do not know."""
MAX_ENTRIES = 8
"""Entries shown of a list in such a document: a model has two cache tensors for each layer."""

Artifact = TypeVar("Artifact")
TokenText = Callable[[int], str]


@dataclass(frozen=True)
class Loaded:
    """What the work directory holds; None where an artifact is missing, and then why."""

    before: SpikeStatistics | None
    after: SpikeStatistics | None
    recipe: Recipe | None
    check: Check | None
    manifest: Mapping[str, Any] | None
    engine: Mapping[str, Mapping[str, Any]] | None
    absences: Mapping[str, str]
    token_text: TokenText


@dataclass(frozen=True)
class Picture:
    """A figure of the page: its SVG, what it says to who cannot see it, and the text below."""

    svg: str
    label: str
    caption: str


@dataclass(frozen=True)
class TableRow:
    """Cells as text; `strong` marks the row that the reader looks for."""

    cells: tuple[str, ...]
    strong: bool = False


@dataclass(frozen=True)
class SpikingToken:
    """One (module, token) pair with a large activation."""

    module: str
    token_id: int
    position: int
    amax: float
    ratio: float


def write_report(run: Path, engine: Path | None = None, tokenizer: Path | None = None) -> Path:
    """Write `report.html` into a work directory.

    Args:
        run: The work directory.
        engine: The engine's sidecar (`engine.json`); by default the one in the work directory, if there is one. Where
            there is none of this name, those of a split engine are taken (`engine.prefill.json`, `engine.decode.json`).
        tokenizer: A `tokenizer.json` for the text of tokens; by default the bundle's. Without one, ids are shown.

    Returns:
        Path of the page.

    Raises:
        ArtifactError: The work directory holds nothing to report, or the page cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    loaded = _load(run, engine or run / "engine.json", tokenizer or run / "bundle" / "tokenizer.json")
    template = files("spike_export.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    # Autoescape for all: token texts, names and reasons come from files and may hold any markup.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(_page(loaded))
    path = run / REPORT_NAME
    # A tokenizer may yield half of a surrogate pair, which UTF-8 cannot hold.
    write_text(path, page.encode("utf-8", "backslashreplace").decode("utf-8"))
    return path


def _load(run: Path, engine: Path, tokenizer: Path) -> Loaded:
    absences: dict[str, str] = {}

    def part(name: str, path: Path, load: Callable[[], Artifact], absence: str) -> Artifact | None:
        if not path.is_file():
            absences[name] = absence
            return None
        try:
            return load()
        except SpikeExportError as error:
            absences[name] = f"{error}."
            return None

    recipe_path, check_path, manifest = run / "recipe.json", run / "check.json", run / "bundle" / "manifest.json"
    before, after = run / "spikes", run / "spikes_prefixed"
    halves = plan_paths(engine, split=True)
    sidecars = halves if not engine.is_file() and all(half.is_file() for half in halves) else (engine,)
    loaded = Loaded(
        before=part("before", run / "spikes.json", lambda: load_spikes(before), "No activations were measured."),
        after=part("after", run / "spikes_prefixed.json", lambda: load_spikes(after), "No prefix was measured."),
        recipe=part("recipe", recipe_path, lambda: load_recipe(recipe_path), "There is no recipe."),
        check=part("check", check_path, lambda: load_check(check_path), "The accuracy has not been checked yet."),
        manifest=part("manifest", manifest, lambda: _load_json(manifest), "The model has not been exported yet."),
        engine=part("engine", sidecars[-1], lambda: _load_engine(sidecars), "No engine has been built yet."),
        absences=absences,
        token_text=_token_text(tokenizer),
    )
    if len(absences) == len(("before", "after", "recipe", "check", "manifest", "engine")):
        raise ArtifactError(f"{run}: nothing to report; name the work directory of a run")
    return _without_stale_prefix(loaded)


def _without_stale_prefix(loaded: Loaded) -> Loaded:
    """Leave out prefixed statistics that are not of the recipe's prefix: the recipe may be edited by hand."""
    if loaded.after is None or loaded.recipe is None or loaded.after.prefix_ids == loaded.recipe.prefix_ids:
        return loaded
    why = "The statistics with a prefix are left out: the recipe has another prefix, or none."
    return replace(loaded, after=None, absences={**loaded.absences, "after": why})


def _load_engine(sidecars: tuple[Path, ...]) -> Mapping[str, Mapping[str, Any]]:
    """Return the sidecars of an engine by their names without suffix: one, or two of a split engine."""
    return {path.stem: _load_json(path) for path in sidecars}


def _engine_facts(sidecars: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    for name, document in sidecars.items():
        yield from _flat(document if len(sidecars) == 1 else {name: document})


def _load_json(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(read_document(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path.name}: cannot be read ({error})") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{path.name}: cannot be read (expected an object)")
    return document


def _token_text(tokenizer: Path) -> TokenText:
    """Return a function from token id to legible text; the bare id where there is no tokenizer."""
    if not tokenizer.is_file():
        return lambda token_id: f"token {token_id}"
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_file(str(tokenizer))
    except Exception:  # the library raises a bare Exception; the ids are still worth a report
        return lambda token_id: f"token {token_id}"

    def text(token_id: int) -> str:
        decoded = vocabulary.decode([token_id], skip_special_tokens=False) or vocabulary.id_to_token(token_id)
        # Quoted, because many a token is, or begins with, a space.
        return f"“{visible(decoded)}”" if decoded else f"token {token_id}"

    return text


def _page(loaded: Loaded) -> dict[str, Any]:
    """Return everything the template shows, as text."""
    recipe = loaded.recipe
    return {
        "title": visible(recipe.model.source) if recipe is not None else _manifest_title(loaded.manifest),
        "headline": _headline(loaded),
        "facts": _facts(loaded),
        "absences": {name: visible(sentence) for name, sentence in loaded.absences.items()},
        "spikes": _spike_picture(loaded),
        "ratios": _ratio_picture(loaded),
        "curve": _curve_picture(recipe),
        "tokens": _token_rows(loaded),
        "kept": _kept_rows(recipe),
        "kept_sentence": _kept_sentence(recipe),
        "prefixes": _prefix_rows(recipe),
        "check_headings": HEADINGS,
        "check_rows": _check_rows(loaded.check),
        "cost_sentences": cost_sentences(loaded.check) if loaded.check is not None else [],
        "worst_positions": worst_lines(loaded.check) if loaded.check is not None else [],
        "check_sentence": corpus_sentence(loaded.check) if loaded.check is not None else "",
        "gates": [(gate.passed, gate_sentence(gate)) for gate in loaded.check.gates] if loaded.check else [],
        "manifest": list(_flat(loaded.manifest)) if loaded.manifest is not None else [],
        "engine": list(_engine_facts(loaded.engine)) if loaded.engine is not None else [],
    }


def _manifest_title(manifest: Mapping[str, Any] | None) -> str:
    model = (manifest or {}).get("model")
    source = model.get("source") if isinstance(model, dict) else model
    return visible(source) if isinstance(source, str) and source else "a language model"


def _headline(loaded: Loaded) -> str:
    """Return the result in one or two sentences."""
    recipe = loaded.recipe
    if recipe is None:
        return f"{_accuracy_clause(loaded.check)} {_unquantized_clause(loaded)}".strip()
    total, kept = len(recipe.modules), len(recipe.kept())
    quantized = f"{total - kept} of {total} linears ({_share(total - kept, total)}) run in {_format(loaded)}"
    count = len(recipe.prefix_ids)
    prefix = f" behind the prefix “{visible(recipe.prefix.text)}” ({_tokens(count)})" if recipe.prefix else ""
    return f"{_accuracy_clause(loaded.check)} {quantized}{prefix}.".strip()


def _format(loaded: Loaded) -> str:
    """Return what the bundle's quantized linears are in."""
    return "FP8" if "fp8" in ((loaded.manifest or {}).get("linears") or {}) else "INT8"


def _unquantized_clause(loaded: Loaded) -> str:
    dtype = (loaded.manifest or {}).get("dtype")
    if isinstance(dtype, str):
        return f"Exported in {visible(dtype)} without a recipe."
    return visible(loaded.absences["recipe"])


def _accuracy_clause(check: Check | None) -> str:
    if check is None:
        return ""
    shipped = check.shipped
    if shipped is None:
        return f"Perplexity in {check.reference.dtype}: {check.reference.perplexity:.3f}."
    cost = "" if shipped.cost is None else f" ({with_margin(shipped.cost.increase)})"
    behind = check.reference.behind_prefix
    before = f"{check.reference.perplexity:.3f}" if behind is None else f"{behind:.3f} behind the prefix"
    return (
        f"Perplexity goes from {before} in {visible(check.reference.dtype)} to {shipped.perplexity:.3f}{cost} as "
        f"{visible(shipped.name)}."
    )


def _share(part: int, total: int) -> str:
    return f"{100 * part / total:.1f} %" if total else NOT_MEASURED


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def _facts(loaded: Loaded) -> list[tuple[str, str]]:
    """Return the inputs of the run as (name, value)."""
    recipe = loaded.recipe
    if recipe is None:
        return []
    corpus = recipe.corpus
    inside = ", each inside one document" if corpus.windows == "documents" else ""
    return [
        ("Architecture", visible(recipe.model.architecture)),
        ("Weights", recipe.scheme.weights),
        ("Activations", f"{recipe.activations()}, range: {recipe.scheme.activation_range}"),
        ("Head", recipe.scheme.head),
        ("Not quantized", recipe.scheme.unquantized),
        ("Calibrated on", f"{visible(corpus.name)}: {corpus.samples} samples of {corpus.length} tokens{inside}"),
        ("Alpha", number(recipe.alpha) if recipe.alpha is not None else "none: no module is kept by its ratio"),
        ("Model SHA-256", visible(recipe.model.sha256)),
    ]


def _picture(figure: Figure | None, name: str, label: str, caption: str) -> Picture | None:
    return None if figure is None else Picture(svg_text(figure, name), label, caption)


def _spike_picture(loaded: Loaded) -> Picture | None:
    if loaded.before is None:
        return None
    return _picture(
        spike_picture(loaded.before, loaded.after),
        "spikes",
        "Heat map of the largest activation at the input of each layer's down projection, by token position",
        "Largest absolute activation at the input of each layer's FFN down projection, over all samples; later "
        "positions share a cell, which shows their maximum. A single bright cell is a spike: a per-tensor INT8 scale "
        "must cover the spike, which leaves few steps for all other tokens of the layer.",
    )


def _ratio_picture(loaded: Loaded) -> Picture | None:
    decisive = loaded.after or loaded.before
    if decisive is None:
        return None
    return _picture(
        ratio_chart(decisive, loaded.recipe, loaded.before if loaded.after is not None else None),
        "ratios",
        "Bar chart of the modules with the highest max-median ratio and their precision",
        "Max-median ratio: the largest token of a sample against its median token, mean over samples. One bar "
        "stands for all linears that read the same input.",
    )


def _curve_picture(recipe: Recipe | None) -> Picture | None:
    if recipe is None:
        return None
    return _picture(
        qfem_curve(
            recipe.search.curve, recipe.search.reference_perplexity, len(recipe.kept()), recipe.scheme.unquantized
        ),
        "curve",
        "Line chart of perplexity against the number of linears that are kept",
        "Perplexity by the number of linears in 16 bit (QFeM): the modules with the highest scores stay in 16 bit, all "
        "others are quantized.",
    )


def spiking_tokens(statistics: SpikeStatistics, top: int = TOP_TOKENS) -> list[SpikingToken]:
    """Return the (module, token) pairs that stand out most from their sample's median token.

    Of each token id only its strongest occurrence in a module counts, and a module gives no more than
    `TOKENS_PER_MODULE`, so that one module does not fill the list.
    """
    found = [token for name in list(statistics.ratios())[:top] for token in _module_tokens(statistics, name)]
    return sorted(found, key=lambda token: -token.ratio)[:top]


def _module_tokens(statistics: SpikeStatistics, name: str) -> list[SpikingToken]:
    spikes = statistics.modules[name]
    amax, ratios = spikes.token_amax, spikes.token_ratios.ravel()
    seen = np.flatnonzero(~np.isnan(ratios))  # a mixture's router sends an expert some of the tokens only
    order = seen[np.argsort(-ratios[seen], kind="stable")]
    _, first = np.unique(statistics.token_ids.ravel()[order], return_index=True)
    strongest = order[np.sort(first)[:TOKENS_PER_MODULE]]
    return [
        SpikingToken(
            module=name,
            token_id=int(statistics.token_ids.ravel()[index]),
            position=int(index % amax.shape[1]),
            amax=float(amax.ravel()[index]),
            ratio=float(ratios[index]),
        )
        for index in strongest
    ]


def _token_rows(loaded: Loaded) -> list[TableRow]:
    if loaded.before is None:
        return []
    return [
        TableRow(
            (
                visible(token.module),
                _layer(token.module),
                loaded.token_text(token.token_id),
                str(token.token_id),
                str(token.position),
                number(token.amax),
                number(token.ratio),
            )
        )
        for token in spiking_tokens(loaded.before)
    ]


def _layer(module: str) -> str:
    try:
        return str(split_name(module)[0])
    except ValueError:
        return ""


def _kept_rows(recipe: Recipe | None) -> list[TableRow]:
    if recipe is None:
        return []
    plans = [(name, plan) for name, plan in recipe.modules.items() if plan.number_format is None]
    plans.sort(key=lambda item: -(item[1].ratio or 0.0))
    return [
        TableRow((visible(name), plan.precision, number(plan.ratio), visible(plan.reason or "")))
        for name, plan in plans
    ]


def _kept_sentence(recipe: Recipe | None) -> str:
    if recipe is None:
        return ""
    kept = len(recipe.kept())
    if kept == 0:
        return "All linears are quantized."
    verb = "linear is" if kept == 1 else "linears are"
    return f"{kept} of {len(recipe.modules)} {verb} not quantized, highest ratio first, with the reason."


def _prefix_rows(recipe: Recipe | None) -> list[TableRow]:
    if recipe is None:
        return []
    return [
        TableRow(
            (
                f"“{visible(candidate.text)}”" if candidate.token_ids else "no prefix",
                " ".join(map(str, candidate.token_ids)),
                visible(candidate.worst_module),
                number(candidate.ratio),
                number(candidate.perplexity, 5),
                visible(candidate.verdict),
            ),
            strong=candidate.token_ids == recipe.prefix_ids,
        )
        for candidate in recipe.search.prefixes
    ]


def _check_rows(check: Check | None) -> list[TableRow]:
    if check is None:
        return []
    return [TableRow(row, strong) for row, strong in zip(check_rows(check), shipped_rows(check), strict=True)]


def _flat(document: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield the leaves of a document as (path, text), at most `MAX_FACTS`; a list by its first entries."""
    leaves = list(_leaves(document, ""))
    yield from leaves[:MAX_FACTS]
    if len(leaves) > MAX_FACTS:
        yield "…", f"{len(leaves) - MAX_FACTS} more lines are in the file"


def _leaves(value: Any, path: str) -> Iterable[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield visible(path), visible(_leaf_text(value, path))


def _leaf_text(value: Any, path: str) -> str:
    if isinstance(value, list):
        names = [str(inner.get("name", "unnamed")) if isinstance(inner, dict) else str(inner) for inner in value]
        more = f" and {len(names) - MAX_ENTRIES} more" if len(names) > MAX_ENTRIES else ""
        return ", ".join(names[:MAX_ENTRIES]) + more or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and path.endswith("bytes"):
        return f"{value:,} ({value / 2**20:,.1f} MiB)"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
