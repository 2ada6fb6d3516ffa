"""Results of commands as JSON documents, where the results have none of their own; docs/formats.md lists the keys."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spike_export.artifacts.recipe import Recipe
    from spike_export.engines.build.reuse import ProvidedEngine
    from spike_export.pipeline.run_job import JobResult


def engine_document(engine: "ProvidedEngine") -> dict[str, Any]:
    """Return what a build ended with."""
    return {
        "plans": [str(plan) for plan in engine.plans],
        "backends": [sidecar.backend.model_dump(mode="json") for sidecar in engine.sidecars],
        "built": not engine.reused,
        "note": engine.note,
        "as_planned": engine.complaint is None,
        "complaint": engine.complaint,
        "warnings": list(engine.warnings),
    }


def recipe_document(recipe: "Recipe", path: str) -> dict[str, Any]:
    """Return what a calibration chose, and where the recipe lies."""
    return {
        "recipe": path,
        "linears": len(recipe.modules),
        "kept": {name: recipe.modules[name].precision for name in recipe.kept_linears()},
        "prefix": None if recipe.prefix is None else recipe.prefix.model_dump(mode="json"),
        "activations": recipe.activations(),
        "notes": list(recipe.notes()),
    }


def job_document(result: "JobResult") -> dict[str, Any]:
    """Return what the main job left; `engine` is null where the limit on accuracy was missed."""
    return {
        "bundle": str(result.bundle),
        "report": str(result.report),
        "passed": result.check.passed,
        "engine": None if result.engine is None else engine_document(result.engine),
        "notes": [] if result.recipe is None else list(result.recipe.notes()),
        "check": result.check.model_dump(mode="json"),
    }
