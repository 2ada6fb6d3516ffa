"""The pictures of a report: what they show, in words too, and the figures behind their marks as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from spike_export.artifacts.recipe import Recipe
from spike_export.artifacts.visible_text import visible
from spike_export.calibration.noise_shares import noise_shares
from spike_export.checkpoint.modules import is_router, representative_of
from spike_export.report.check_table import number, with_margin
from spike_export.report.figures.cost_chart import cost_chart
from spike_export.report.figures.drawing import Drawing
from spike_export.report.figures.input_map import input_map, input_table
from spike_export.report.figures.kept_curve import qfem_curve
from spike_export.report.figures.ratio_chart import highest_ratios, ratio_chart
from spike_export.report.figures.spike_map import spike_map, spike_picture
from spike_export.report.loaded import Loaded
from spike_export.report.summary import costs_by_text
from spike_export.report.tables import TableRow


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        name: Of its files, and in front of its ids.
        label: What it says to who cannot see it.
        caption: The text below.
        headings: Of the table of its figures.
        rows: Of that table.
    """

    name: str
    drawing: Drawing
    label: str
    caption: str
    headings: tuple[str, ...]
    rows: Sequence[TableRow]


def cost_picture(loaded: Loaded) -> Picture | None:
    """Return what the shipped variant costs on each text."""
    costs = costs_by_text(loaded.check)
    drawing = cost_chart(costs)
    if drawing is None:
        return None
    rows = [
        TableRow(
            (
                name,
                with_margin(cost.increase),
                f"{number(cost.divergence.mean, 3)} +/- {number(cost.divergence.margin, 2)}",
                number(cost.quantiles.median, 2),
                number(cost.quantiles.p99, 2),
                number(cost.quantiles.max, 2),
                with_margin(cost.top1_agreement).lstrip("+"),
                with_margin(cost.top5_agreement).lstrip("+"),
            )
        )
        for name, cost in costs.items()
    ]
    return Picture(
        "cost",
        drawing,
        "Points with 95 % intervals: increase of the perplexity, and divergence, by text",
        "The shipped bundle against the unquantized model behind the same prefix. Bars are 95 % intervals of the mean "
        "over the windows.",
        ("text", "perplexity", "KL, mean", "median", "99 %", "largest", "same top-1", "in the top-5"),
        rows,
    )


def spike_map_picture(loaded: Loaded) -> Picture | None:
    """Return the spikes by layer and position, without and with the prefix."""
    if loaded.before is None:
        return None
    drawing = spike_picture(loaded.before, loaded.after)
    picture = spike_map(loaded.before)
    if drawing is None or picture is None:
        return None
    behind = spike_map(loaded.after) if loaded.after is not None else None
    rows = [
        TableRow(
            (
                str(layer),
                number(float(picture.amax[row].max())),
                "" if behind is None else number(float(behind.amax[row].max())),
            )
        )
        for row, layer in enumerate(picture.layers)
    ]
    return Picture(
        "spikes",
        drawing,
        "Heat map of the largest activation at the input of each layer's down projection, by token position",
        "Largest absolute activation at the input of each layer's FFN down projection, over all samples; later "
        "positions share a cell, which shows their maximum. A single bright cell is a spike: a per-tensor INT8 scale "
        "must cover the spike, which leaves few steps for all other tokens of the layer.",
        ("layer", "largest activation", "with the prefix"),
        rows,
    )


def ratio_picture(loaded: Loaded) -> Picture | None:
    """Return the modules with the highest max-median ratios."""
    decisive = loaded.after or loaded.before
    if decisive is None:
        return None
    before = loaded.before if loaded.after is not None else None
    drawing = ratio_chart(decisive, loaded.recipe, before)
    if drawing is None:
        return None
    ratios, earlier = decisive.ratios(), before.ratios() if before is not None else {}
    rows = [
        TableRow((visible(name), number(ratios[name]), number(earlier.get(name)) if name in earlier else ""))
        for name in highest_ratios(decisive, before)
    ]
    return Picture(
        "ratios",
        drawing,
        "Bar chart of the modules with the highest max-median ratio and their precision",
        "Max-median ratio: the largest token of a sample against its median token, mean over samples. One bar "
        "stands for all linears that read the same input.",
        ("module", "ratio", "without the prefix"),
        rows,
    )


def curve_picture(recipe: Recipe | None) -> Picture | None:
    """Return the perplexity by the number of modules in 16 bit."""
    if recipe is None:
        return None
    search = recipe.search
    drawing = qfem_curve(search.curve, search.reference_perplexity, len(recipe.kept()), recipe.scheme.unquantized)
    if drawing is None:
        return None
    rows = [
        TableRow(
            (
                point.criterion,
                str(point.fp16_modules),
                f"{point.fp16_share:.1%}",
                number(point.perplexity, 5),
                "yes" if point.pareto else "",
            )
        )
        for point in search.curve
    ]
    return Picture(
        "curve",
        drawing,
        "Line chart of perplexity against the number of linears that are kept",
        "Perplexity by the number of linears in 16 bit (QFeM): the modules with the highest scores stay in 16 bit, all "
        "others are quantized.",
        ("by", "linears", "multiply-accumulates", "perplexity", "Pareto"),
        rows,
    )


def input_picture(loaded: Loaded) -> Picture | None:
    """Return from which inputs the error comes: as measured, else as the search estimated."""
    if loaded.recipe is None:
        return None
    shares, label = _input_shares(loaded, loaded.recipe)
    drawing = input_map(shares, label)
    if drawing is None:
        return None
    rows = []
    for readers, row in input_table(shares).items():
        layer = max(row, key=lambda each: row[each])
        rows.append(TableRow((readers, f"{sum(row.values()):.1%}", str(layer), f"{row[layer]:.1%}")))
    return Picture(
        "inputs",
        drawing,
        f"Heat map of the share of each input in the {label}, by layer",
        f"From which inputs the {label} comes. A row is one kind of input, named by the linears that read it; behind "
        "the name stands its total.",
        ("input of", "share", "largest in layer", "its share"),
        rows,
    )


def _input_shares(loaded: Loaded, recipe: Recipe) -> tuple[dict[str, float], str]:
    measured = loaded.attribution
    if measured is None:
        return noise_shares(recipe), "estimated noise of INT8"
    alone = {
        name: max(found.alone, 0.0)
        for name, found in measured.inputs.items()
        if name in recipe.modules and not is_router(name) and representative_of(name) == name
    }
    total = sum(alone.values())
    return ({name: value / total for name, value in alone.items()} if total else {}), "divergence measured alone"
