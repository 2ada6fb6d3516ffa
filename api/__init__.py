"""INT8 W8A8 deployment of GLU language models: calibrate, export, check, build, inspect, generate.

Importing this package is quick: each name is read from its file when the name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spike_export.artifacts.errors import ArtifactError as ArtifactError
    from spike_export.artifacts.errors import CalibrationError as CalibrationError
    from spike_export.artifacts.errors import CheckpointError as CheckpointError
    from spike_export.artifacts.errors import CorpusError as CorpusError
    from spike_export.artifacts.errors import EngineError as EngineError
    from spike_export.artifacts.errors import RecipeError as RecipeError
    from spike_export.artifacts.errors import SpikeExportError as SpikeExportError
    from spike_export.artifacts.manifest import Manifest as Manifest
    from spike_export.artifacts.progress import Progress as Progress
    from spike_export.artifacts.recipe import Recipe as Recipe
    from spike_export.artifacts.recipe import load_recipe as load_recipe
    from spike_export.artifacts.recipe import save_recipe as save_recipe
    from spike_export.artifacts.results.check_document import Check as Check
    from spike_export.artifacts.results.task_document import TaskAccuracy as TaskAccuracy
    from spike_export.calibration.corpus.files import CorpusOptions as CorpusOptions
    from spike_export.calibration.methods.options import CalibrationOptions as CalibrationOptions
    from spike_export.calibration.revalidation import Revalidation as Revalidation
    from spike_export.engines.accuracy.clipping import Clipping as Clipping
    from spike_export.engines.accuracy.continuations import Continuations as Continuations
    from spike_export.engines.build.reuse import ProvidedEngine as ProvidedEngine
    from spike_export.engines.engine import Engine as Engine
    from spike_export.engines.generation.generated_text import Generation as Generation
    from spike_export.engines.generation.generated_text import Piece as Piece
    from spike_export.engines.generation.options import GenerationOptions as GenerationOptions
    from spike_export.engines.lint.finding import LintReport as LintReport
    from spike_export.engines.lint.linter import lint_model as lint_model
    from spike_export.engines.parity.chain import Parity as Parity
    from spike_export.engines.plan.build_options import BatchRange as BatchRange
    from spike_export.engines.plan.build_options import BuildOptions as BuildOptions
    from spike_export.engines.tensorrt.engines import RuntimeOptions as RuntimeOptions
    from spike_export.export.cache_options import CacheOptions as CacheOptions
    from spike_export.export.compressed_tensors.checkpoint_export import CompressedCheckpoint as CompressedCheckpoint
    from spike_export.export.compressed_tensors.checkpoint_export import (
        export_compressed_tensors as export_compressed_tensors,
    )
    from spike_export.export.model_export import export as export
    from spike_export.inspection.bundle import BundleInspection as BundleInspection
    from spike_export.inspection.difference import RunDifference as RunDifference
    from spike_export.inspection.difference import difference as difference
    from spike_export.inspection.plan import EngineInspection as EngineInspection
    from spike_export.inspection.plan import PlanInspection as PlanInspection
    from spike_export.inspection.run import RunInspection as RunInspection
    from spike_export.inspection.target import inspect as inspect
    from spike_export.pipeline.build import build as build
    from spike_export.pipeline.calibrate import CalibratedModel as CalibratedModel
    from spike_export.pipeline.calibrate import calibrate as calibrate
    from spike_export.pipeline.calibrate import measure_shard as measure_shard
    from spike_export.pipeline.checking.check import check as check
    from spike_export.pipeline.checking.clipping import clipping as clipping
    from spike_export.pipeline.checking.continuations import continuations as continuations
    from spike_export.pipeline.checking.parity import parity as parity
    from spike_export.pipeline.checking.tasks import task_accuracy as task_accuracy
    from spike_export.pipeline.cluster.cluster_options import ClusterOptions as ClusterOptions
    from spike_export.pipeline.cluster.shard_merge import merge_shards as merge_shards
    from spike_export.pipeline.evaluation_text import EvaluationText as EvaluationText
    from spike_export.pipeline.execution import ExecutionOptions as ExecutionOptions
    from spike_export.pipeline.job import Job as Job
    from spike_export.pipeline.revalidate import revalidate as revalidate
    from spike_export.pipeline.run_job import JobResult as JobResult
    from spike_export.pipeline.run_job import run_job as run_job
    from spike_export.pipeline.stage_display import StageCallback as StageCallback
    from spike_export.pipeline.stage_display import StageDisplay as StageDisplay
    from spike_export.report.page import write_report as write_report

_NAMES_OF = {
    "spike_export.artifacts.results.check_document": ("Check",),
    "spike_export.artifacts.errors": (
        "ArtifactError",
        "CalibrationError",
        "CheckpointError",
        "CorpusError",
        "EngineError",
        "RecipeError",
        "SpikeExportError",
    ),
    "spike_export.artifacts.manifest": ("Manifest",),
    "spike_export.artifacts.progress": ("Progress",),
    "spike_export.artifacts.recipe": (
        "Recipe",
        "load_recipe",
        "save_recipe",
    ),
    "spike_export.artifacts.results.task_document": ("TaskAccuracy",),
    "spike_export.calibration.corpus.files": ("CorpusOptions",),
    "spike_export.calibration.methods.options": ("CalibrationOptions",),
    "spike_export.calibration.revalidation": ("Revalidation",),
    "spike_export.engines.accuracy.clipping": ("Clipping",),
    "spike_export.engines.accuracy.continuations": ("Continuations",),
    "spike_export.engines.build.reuse": ("ProvidedEngine",),
    "spike_export.engines.engine": ("Engine",),
    "spike_export.engines.generation.generated_text": (
        "Generation",
        "Piece",
    ),
    "spike_export.engines.generation.options": ("GenerationOptions",),
    "spike_export.engines.lint.finding": ("LintReport",),
    "spike_export.engines.lint.linter": ("lint_model",),
    "spike_export.engines.parity.chain": ("Parity",),
    "spike_export.engines.plan.build_options": (
        "BatchRange",
        "BuildOptions",
    ),
    "spike_export.engines.tensorrt.engines": ("RuntimeOptions",),
    "spike_export.export.cache_options": ("CacheOptions",),
    "spike_export.export.compressed_tensors.checkpoint_export": (
        "CompressedCheckpoint",
        "export_compressed_tensors",
    ),
    "spike_export.export.model_export": ("export",),
    "spike_export.inspection.bundle": ("BundleInspection",),
    "spike_export.inspection.difference": (
        "RunDifference",
        "difference",
    ),
    "spike_export.inspection.plan": (
        "EngineInspection",
        "PlanInspection",
    ),
    "spike_export.inspection.run": ("RunInspection",),
    "spike_export.inspection.target": ("inspect",),
    "spike_export.pipeline.build": ("build",),
    "spike_export.pipeline.calibrate": (
        "CalibratedModel",
        "calibrate",
        "measure_shard",
    ),
    "spike_export.pipeline.checking.check": ("check",),
    "spike_export.pipeline.checking.clipping": ("clipping",),
    "spike_export.pipeline.cluster.cluster_options": ("ClusterOptions",),
    "spike_export.pipeline.checking.continuations": ("continuations",),
    "spike_export.pipeline.evaluation_text": ("EvaluationText",),
    "spike_export.pipeline.execution": ("ExecutionOptions",),
    "spike_export.pipeline.job": ("Job",),
    "spike_export.pipeline.checking.parity": ("parity",),
    "spike_export.pipeline.revalidate": ("revalidate",),
    "spike_export.pipeline.run_job": (
        "JobResult",
        "run_job",
    ),
    "spike_export.pipeline.cluster.shard_merge": ("merge_shards",),
    "spike_export.pipeline.stage_display": (
        "StageCallback",
        "StageDisplay",
    ),
    "spike_export.pipeline.checking.tasks": ("task_accuracy",),
    "spike_export.report.page": ("write_report",),
}
"""File → public names that come from it: the imports above, for a running program."""

_FILE_OF = {name: file for file, names in _NAMES_OF.items() for name in names}

__all__ = sorted(_FILE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # The folder export/ is the function of its name, whichever of the two is imported first.
    value = import_module("spike_export.export") if name == "export" else getattr(import_module(_FILE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
