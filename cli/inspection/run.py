"""`inspect RUN`: what a run decided and why, in tables and lines."""

from collections.abc import Mapping, Sequence

from rich.console import Console

from spike_export.artifacts.visible_text import visible
from spike_export.cli.terminal.lines import print_lines
from spike_export.cli.terminal.text_table import print_facts, print_table
from spike_export.inspection.run import RunInspection, decimals


def print_run(inspection: RunInspection, console: Console) -> None:
    """Print the recipe's scheme, its prefix, the candidates of each search, and the modules that are not quantized."""
    print_facts(console, inspection.headlines)
    for title, columns, rows in _tables(inspection):
        if rows:
            print_table(console, title, columns, rows)


def print_explanations(explained: Mapping[str, Mapping[str, str]], console: Console) -> None:
    """Print for each module its precision and the figures that decided it."""
    for name, lines in explained.items():
        print_lines(console, name, style="bold")
        for label, value in lines.items():
            print_lines(console, f"  {label}: {visible(value)}")


_Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def _tables(inspection: RunInspection) -> list[_Table]:
    search = inspection.recipe.search
    prefixes = [
        (
            " ".join(str(token) for token in each.token_ids) or "(none)",
            visible(repr(each.text)),
            f"{each.ratio:.0f}",
            decimals(each.reference_perplexity),
            decimals(each.perplexity),
            each.verdict,
        )
        for each in search.prefixes
    ]
    transforms = [
        (each.name, decimals(each.perplexity), f"{each.divergence:.4f}", each.verdict) for each in search.transforms
    ]
    heads = [(each.name, f"{each.divergence:.4f}", each.verdict) for each in search.head]
    inputs = [
        (
            str(each.per_token_linears),
            f"{each.per_token_share:.1%}",
            decimals(each.perplexity),
            f"{each.divergence:.4f}",
            each.verdict,
        )
        for each in search.activations
    ]
    curve = [
        (
            point.criterion,
            str(point.fp16_modules),
            f"{point.fp16_share:.1%}",
            decimals(point.perplexity),
            "yes" if point.pareto else "",
        )
        for point in search.curve
    ]
    weights = [
        (
            "INT8" if each.weights == "int8" else "16 bit",
            str(each.linears),
            f"{each.bytes / 1e6:.1f}",
            decimals(each.perplexity),
            f"{each.divergence:.4f}",
            each.verdict,
        )
        for each in search.kept_weights
    ]
    kept = [(name, plan.precision, plan.reason or "") for name, plan in inspection.unquantized.items()]
    return [
        ("prefix candidates", ("tokens", "text", "worst ratio", "16-bit ppl", "INT8 ppl", "verdict"), prefixes),
        (
            "smoothing, rotation and Hadamard candidates, all linears in INT8",
            ("candidate", "ppl", "divergence", "verdict"),
            transforms,
        ),
        ("smoothing candidates of the head's input", ("smoothing", "divergence", "verdict"), heads),
        ("sets of inputs with a scale per token", ("linears", "MACs", "ppl", "divergence", "verdict"), inputs),
        ("sets of modules in 16 bit", ("by", "linears", "MACs", "ppl", "Pareto"), curve),
        ("weights of the modules in 16 bit", ("form", "linears", "MB", "ppl", "divergence", "verdict"), weights),
        (
            "estimated noise of INT8",
            ("input of", "share", "inputs", "the noisiest", "its share"),
            _noise_rows(inspection.noise_shares),
        ),
        (
            _divergence_title(inspection),
            ("input of", "alone", "saved without", "inputs", "the largest", "its own"),
            _divergence_rows(inspection),
        ),
        ("not quantized", ("module", "precision", "reason"), kept),
    ]


def _divergence_title(inspection: RunInspection) -> str:
    measured = inspection.attribution
    if measured is None:
        return ""
    return f"divergence in nats per token, {measured.divergence:.2e} in all, on {measured.windows} held-out windows"


def _divergence_rows(inspection: RunInspection) -> list[tuple[str, ...]]:
    """Return one row for the inputs of one name: sums, and the input that causes most alone."""
    measured = inspection.attribution
    if measured is None:
        return []
    kinds: dict[str, list[str]] = {}
    for name in measured.inputs:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)

    def alone(name: str) -> float:
        return measured.inputs[name].alone

    return [
        (
            kind,
            f"{sum(map(alone, names)):.2e}",
            f"{sum(map(measured.saved_without, names)):.2e}",
            str(len(names)),
            worst,
            f"{alone(worst):.2e}",
        )
        for kind, names in sorted(kinds.items(), key=lambda kind: -sum(map(alone, kind[1])))
        for worst in (max(names, key=alone),)
    ]


def _noise_rows(shares: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Return one row for the inputs of one name, whatever their layers and experts; the largest share first."""
    kinds: dict[str, dict[str, float]] = {}
    for name, share in shares.items():
        kinds.setdefault(name.rpartition(".")[2], {})[name] = share
    sums = sorted(kinds.items(), key=lambda kind: -sum(kind[1].values()))
    return [
        (kind, f"{sum(each.values()):.1%}", str(len(each)), worst, f"{each[worst]:.1%}")
        for kind, each in sums
        for worst in (max(each, key=each.__getitem__),)
    ]
