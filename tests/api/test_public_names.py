"""What `from spike_export import ...` offers, what that costs, and what type checkers see of it."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spike_export

INTERFACE = Path(__file__).resolve().parents[2] / "api" / "__init__.py"

FUNCTIONS = {
    "build",
    "calibrate",
    "check",
    "clipping",
    "continuations",
    "difference",
    "export",
    "export_compressed_tensors",
    "inspect",
    "lint_model",
    "load_recipe",
    "measure_shard",
    "merge_shards",
    "parity",
    "revalidate",
    "run_job",
    "save_recipe",
    "task_accuracy",
    "write_report",
}
OPTIONS = {
    "BatchRange",
    "BuildOptions",
    "CacheOptions",
    "CalibrationOptions",
    "ClusterOptions",
    "CorpusOptions",
    "EvaluationText",
    "ExecutionOptions",
    "GenerationOptions",
    "Job",
    "RuntimeOptions",
}
RESULTS = {
    "BundleInspection",
    "CalibratedModel",
    "Check",
    "Clipping",
    "CompressedCheckpoint",
    "Continuations",
    "Engine",
    "EngineInspection",
    "Generation",
    "JobResult",
    "LintReport",
    "Manifest",
    "Parity",
    "Piece",
    "PlanInspection",
    "ProvidedEngine",
    "Recipe",
    "Revalidation",
    "RunDifference",
    "RunInspection",
    "TaskAccuracy",
}
PROGRESS = {"Progress", "StageCallback", "StageDisplay"}
ERRORS = {
    "ArtifactError",
    "CalibrationError",
    "CheckpointError",
    "CorpusError",
    "EngineError",
    "RecipeError",
    "SpikeExportError",
}


def python(code: str) -> str:
    """Run code in a new process; return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_public_names_are_these() -> None:
    assert set(spike_export.__all__) == FUNCTIONS | OPTIONS | RESULTS | PROGRESS | ERRORS
    assert set(spike_export.__all__) <= set(dir(spike_export))


def imports_for_type_checkers() -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(INTERFACE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spike_export."):
            yield from ((alias.asname or "", node.module or "") for alias in node.names)


def test_a_running_program_gets_what_type_checkers_see() -> None:
    assert dict(imports_for_type_checkers()) == spike_export._FILE_OF


@pytest.mark.parametrize("name", sorted(spike_export._FILE_OF))
def test_every_name_is_there_and_says_what_it_is_for(name: str) -> None:
    value = getattr(spike_export, name)
    if name != "Progress":  # an alias of a callable's type
        assert value.__doc__, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'spike_export' has no attribute 'quantise'"):
        spike_export.quantise  # noqa: B018


def test_the_import_loads_nothing_large() -> None:
    loaded = python("import sys, spike_export, spike_export as s; print(*sys.modules)").split()
    assert "spike_export" in loaded
    assert set(loaded).isdisjoint({"torch", "transformers", "onnx", "onnxruntime", "numpy", "pydantic", "tokenizers"})


def test_options_and_errors_load_no_torch() -> None:
    names = ", ".join(sorted(ERRORS | {"CalibrationOptions", "CorpusOptions", "BuildOptions", "Engine", "inspect"}))
    assert "torch" not in python(f"import sys; from spike_export import {names}; print(*sys.modules)").split()


IMPORT_ORDERS = (
    "from spike_export import export; import spike_export.export.bundle",
    "import spike_export.export.bundle; from spike_export import export",
    "from spike_export.export.files.weight_file import write_weights; from spike_export import export",
    "from spike_export import *; import spike_export.export.model_export",
    "import spike_export; export = spike_export.export",
)
"""The name first, the folder first, a file first, everything, an attribute."""

TRIED = """
import os, traceback
import onnx, onnx_ir, torch
for imports in {orders!r}:
    if os.fork() == 0:
        try:
            exec(imports)
            import inspect, spike_export, spike_export.export.files.weight_file as weight_file
            from spike_export.export.model_export import export as function
            assert callable(export) and export is spike_export.export
            assert inspect.signature(export) == inspect.signature(function)
            assert spike_export.export.files.weight_file is weight_file
            try: export('no/such/model', 'bundle')
            except spike_export.CheckpointError as error: print(error, flush=True)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    assert os.wait()[1] == 0, imports
"""


def test_export_is_the_function_whatever_was_imported_before() -> None:
    """Each order in a process forked for it, which has other libraries than this project's already."""
    said = python(TRIED.format(orders=IMPORT_ORDERS)).splitlines()
    assert ["no/such/model" in line for line in said] == [True] * len(IMPORT_ORDERS), said


def test_pytest_can_patch_a_file_of_the_folder_that_is_also_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from spike_export.export.files import weight_file

    monkeypatch.setattr("spike_export.export.files.weight_file._INLINE_BYTES", 16)
    assert weight_file._INLINE_BYTES == 16


def test_the_functions_neither_print_nor_exit() -> None:
    """They are the commands' own; tables, lines and exit codes are the commands' business."""
    root = INTERFACE.parents[1]
    files = {spike_export._FILE_OF[name].removeprefix("spike_export.").replace(".", "/") for name in FUNCTIONS}
    for file in files:
        source = (root / f"{file}.py").read_text(encoding="utf-8")
        assert "Console" not in source, file
        assert "sys.exit" not in source, file
        assert not any(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            for node in ast.walk(ast.parse(source))
        ), file


def test_the_signature_of_export_is_read_by_help() -> None:
    assert list(inspect.signature(spike_export.export).parameters)[:3] == ["model", "out", "recipe"]
