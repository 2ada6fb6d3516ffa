"""What a work directory holds for a report: each part is read on its own, and says why where it cannot be."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from spike_export.artifacts.errors import ArtifactError, SpikeExportError
from spike_export.artifacts.files.documents import read_document
from spike_export.artifacts.recipe import Recipe, load_recipe
from spike_export.artifacts.results.attribution import Attribution, attribution_of
from spike_export.artifacts.results.check_document import Check, load_check
from spike_export.artifacts.results.command_log import COMMANDS_FILE, Command, load_commands
from spike_export.artifacts.results.speed_document import SPEED_FILE, Speed, load_speeds
from spike_export.artifacts.results.task_document import TaskAccuracy, load_task_accuracy, task_place
from spike_export.artifacts.visible_text import visible
from spike_export.calibration.statistics.spikes import SpikeStatistics, load_spikes
from spike_export.engines.plan.paths import plan_paths

Artifact = TypeVar("Artifact")
TokenText = Callable[[int], str]

PARTS = ("before", "after", "recipe", "check", "manifest", "engine")
"""Without any of them there is nothing to report."""


@dataclass(frozen=True)
class Loaded:
    """What the work directory holds; None where an artifact is missing, and then why.

    Attributes:
        attribution: Of this very recipe.
        bundle_bytes: Of all the bundle's files.
        commands: What made the work directory, the last command last.
        speeds: Of a server of the bundle, by load.
        tasks: Of this very bundle.
    """

    before: SpikeStatistics | None
    after: SpikeStatistics | None
    recipe: Recipe | None
    check: Check | None
    manifest: Mapping[str, Any] | None
    engine: Mapping[str, Mapping[str, Any]] | None
    attribution: Attribution | None
    bundle_bytes: int | None
    commands: tuple[Command, ...]
    speeds: tuple[Speed, ...]
    absences: Mapping[str, str]
    token_text: TokenText
    tasks: TaskAccuracy | None = None


def load(run: Path, engine: Path, tokenizer: Path) -> Loaded:
    """Read the parts of a work directory.

    Args:
        run: The work directory.
        engine: The engine's sidecar.
        tokenizer: For the text of tokens.

    Raises:
        ArtifactError: There is nothing to report.
    """
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
        attribution=None,
        bundle_bytes=_size(manifest.parent) if manifest.is_file() else None,
        commands=_optional("commands", run / COMMANDS_FILE, lambda path: load_commands(path).commands, absences),
        speeds=_optional("speeds", run / SPEED_FILE, load_speeds, absences),
        absences=absences,
        token_text=_token_text(tokenizer),
    )
    if all(part in absences for part in PARTS):
        raise ArtifactError(f"{run}: nothing to report; name the work directory of a run")
    return _with_tasks(_with_attribution(_without_stale_prefix(loaded), run), run)


def _optional(
    name: str, path: Path, read: Callable[[Path], tuple[Artifact, ...]], absences: dict[str, str]
) -> tuple[Artifact, ...]:
    """Read a file that many runs lack, so that only damage is worth a sentence."""
    try:
        return read(path) if path.exists() else ()
    except ArtifactError as error:
        absences[name] = f"{error}."
        return ()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _with_attribution(loaded: Loaded, run: Path) -> Loaded:
    """Add what was measured of the inputs; hardly any run has it, so that only damage is worth a sentence."""
    if loaded.recipe is None:
        return loaded
    try:
        return replace(loaded, attribution=attribution_of(loaded.recipe, run))
    except ArtifactError as error:
        return replace(loaded, absences={**loaded.absences, "attribution": f"{error}."})


def _with_tasks(loaded: Loaded, run: Path) -> Loaded:
    """Add the standard tasks of this bundle; few runs have them, so that only damage and other bundles' are told."""
    path = task_place(run / "bundle")
    if not path.is_file() or loaded.manifest is None:
        return loaded
    try:
        tasks, model = load_task_accuracy(path), loaded.manifest.get("model")
    except ArtifactError as error:
        return replace(loaded, absences={**loaded.absences, "tasks": f"{error}."})
    if not isinstance(model, Mapping) or tasks.recipe_sha256 != model.get("recipe_sha256"):
        why = "The standard tasks are left out: another bundle answered them. Run check --tasks again."
        return replace(loaded, absences={**loaded.absences, "tasks": why})
    return replace(loaded, tasks=tasks)


def _without_stale_prefix(loaded: Loaded) -> Loaded:
    """Leave out prefixed statistics that are not of the recipe's prefix: the recipe may be edited by hand."""
    if loaded.after is None or loaded.recipe is None or loaded.after.prefix_ids == loaded.recipe.prefix_ids:
        return loaded
    why = "The statistics with a prefix are left out: the recipe has another prefix, or none."
    return replace(loaded, after=None, absences={**loaded.absences, "after": why})


def _load_engine(sidecars: tuple[Path, ...]) -> Mapping[str, Mapping[str, Any]]:
    """Return the sidecars of an engine by their names without suffix: one, or two of a split engine."""
    return {path.stem: _load_json(path) for path in sidecars}


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
