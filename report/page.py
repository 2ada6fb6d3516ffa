"""The report: one self-contained HTML page of what a work directory holds, and its pictures as files beside it.

Each part of the page is gathered on its own; a part whose artifact is missing or damaged says so in one sentence.
The page is a pure function of the artifacts: writing it twice gives the same bytes.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files.atomic_write import write_text
from spike_export.artifacts.visible_text import visible
from spike_export.report.check_table import (
    HEADINGS,
    corpus_sentence,
    cost_sentences,
    gate_sentence,
    noise_sentences,
    worst_lines,
)
from spike_export.report.facts import command_lines, engine_facts, flat, run_facts, version_facts
from spike_export.report.figures.drawing import save_png, svg_text
from spike_export.report.headline import headline, title
from spike_export.report.loaded import Loaded, load
from spike_export.report.pictures import (
    Picture,
    cost_picture,
    curve_picture,
    input_picture,
    ratio_picture,
    spike_map_picture,
)
from spike_export.report.summary import cards, verdict
from spike_export.report.tables import (
    TableRow,
    check_table_rows,
    kept_rows,
    kept_sentence,
    kind_rows,
    prefix_rows,
    smoothing_rows,
    speed_rows,
    token_rows,
    transform_rows,
)
from spike_export.report.task_table import TASK_HEADINGS, task_gates, task_rows, task_sentence

REPORT_NAME = "report.html"

PICTURE_FOLDER = "pictures"
"""Beside the page: each picture as SVG and as PNG."""


@dataclass(frozen=True)
class Shown:
    """A picture as the page shows it: drawn once, for the page and for its file."""

    picture: Picture
    svg: str

    @classmethod
    def of(cls, picture: Picture | None) -> "Shown | None":
        """Draw a picture; None where there is none."""
        return None if picture is None else cls(picture, svg_text(picture.drawing, picture.name))


def write_report(run: Path, engine: Path | None = None, tokenizer: Path | None = None) -> Path:
    """Write `report.html` into a work directory, and its pictures into the folder `pictures`.

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

    loaded = load(run, engine or run / "engine.json", tokenizer or run / "bundle" / "tokenizer.json")
    shown = {
        name: Shown.of(picture)
        for name, picture in {
            "cost": cost_picture(loaded),
            "spikes": spike_map_picture(loaded),
            "ratios": ratio_picture(loaded),
            "curve": curve_picture(loaded.recipe),
            "inputs": input_picture(loaded),
        }.items()
    }
    template = files("spike_export.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    # Autoescape for all: token texts, names and reasons come from files and may hold any markup.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(_page(loaded) | {"pictures": shown})
    path = run / REPORT_NAME
    # A tokenizer may yield half of a surrogate pair, which UTF-8 cannot hold.
    write_text(path, page.encode("utf-8", "backslashreplace").decode("utf-8"))
    _write_pictures(run / PICTURE_FOLDER, [each for each in shown.values() if each is not None])
    return path


def _write_pictures(folder: Path, shown: list[Shown]) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error}); move what is there away"
        raise ArtifactError(f"{folder}: {reason}") from error
    for each in shown:
        write_text(folder / f"{each.picture.name}.svg", each.svg + "\n")
        save_png(each.picture.drawing, folder / f"{each.picture.name}.png")


def _page(loaded: Loaded) -> dict[str, Any]:
    """Return everything the template shows besides pictures, as text."""
    recipe, check = loaded.recipe, loaded.check
    return {
        "title": title(loaded),
        "headline": headline(loaded),
        "verdict": verdict(check),
        "cards": cards(loaded),
        "facts": run_facts(recipe),
        "absences": {name: visible(sentence) for name, sentence in loaded.absences.items()},
        "tokens": token_rows(loaded),
        "kept": kept_rows(recipe),
        "kept_sentence": kept_sentence(recipe),
        "kinds": kind_rows(recipe),
        "transforms": transform_rows(recipe),
        "smoothing": smoothing_rows(recipe),
        "prefixes": prefix_rows(recipe),
        "check_headings": HEADINGS,
        "check_rows": check_table_rows(check),
        "cost_sentences": cost_sentences(check) if check is not None else [],
        "noise_sentences": noise_sentences(check) if check is not None else [],
        "worst_positions": worst_lines(check) if check is not None else [],
        "check_sentence": corpus_sentence(check) if check is not None else "",
        "gates": [(gate.passed, gate_sentence(gate)) for gate in check.gates] if check is not None else [],
        "task_headings": TASK_HEADINGS,
        "task_rows": [TableRow(row) for row in task_rows(loaded.tasks)],
        "task_sentence": "" if loaded.tasks is None else task_sentence(loaded.tasks),
        "task_gates": [] if loaded.tasks is None else task_gates(loaded.tasks),
        "manifest": list(flat(loaded.manifest)) if loaded.manifest is not None else [],
        "speeds": speed_rows(loaded.speeds),
        "commands": command_lines(loaded.commands),
        "versions": version_facts(loaded.commands),
        "engine": list(engine_facts(loaded.engine)) if loaded.engine is not None else [],
    }
