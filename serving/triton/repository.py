"""Writes the model repository: configuration, a `model.py` of a few lines, and the bundle or plan beside it."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.files.atomic_write import atomic_path
from spike_export.artifacts.files.sole_writer import sole_writer
from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.ownership import require_replaceable
from spike_export.engines.plan.sidecar import sidecar_path
from spike_export.engines.plan_runtime import bundle_of, is_plan
from spike_export.serving.triton.model_settings import BUNDLE, ModelSettings
from spike_export.serving.triton.tensors import INPUTS, OUTPUTS, TensorSpec

CONFIG_FILE, MODEL_FILE, VERSION = "config.pbtxt", "model.py", "1"

_MARK = "# Written by spike-export triton."

MODEL_SOURCE = f"""{_MARK}
# The code is in the package spike_export, which Triton's Python has to have.
import triton_python_backend_utils

from spike_export.serving.triton.python_model import model_class

TritonPythonModel = model_class(triton_python_backend_utils)
"""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def write_repository(
    path: Path,
    repository: Path,
    name: str,
    settings: ModelSettings,
    *,
    bundle: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model into a repository; other models there stay.

    Files of the bundle are hard links where the file system allows: nothing here changes a file that was written.

    Args:
        path: A bundle or a plan.
        repository: Folder of models; made where it is missing.
        name: The model's name in Triton.
        settings: How it is run; `engine` is filled in here.
        bundle: Bundle of a plan that does not lie in `PLAN.run`.
        overwrite: Replace also what spike-export did not write.

    Returns:
        The model's folder.

    Raises:
        ArtifactError: There is no bundle, or the place holds something else or cannot be written.
        EngineError: The name is none that Triton takes, or there is no such plan.
    """
    if not _NAME.fullmatch(name):
        raise EngineError(f"--model-name {name!r}: a model's name has letters, digits, dots, dashes and underscores")
    plan = is_plan(path)
    if bundle is not None and not plan:
        raise EngineError(f"bundle was given, but {path} is no engine plan; leave it out")
    source = bundle_of(path, bundle) if plan else path
    load_manifest(source)
    destination = repository / name
    engine = path.name if plan else BUNDLE
    with sole_writer(destination):
        require_replaceable(destination, "a model", _is_written, overwrite=overwrite)
        with atomic_path(destination) as folder:
            version = folder / VERSION
            version.mkdir(parents=True)
            _bring(source, version / BUNDLE)
            for file in (path, sidecar_path(path)) if plan else ():
                _bring(file, version / file.name)
            (version / MODEL_FILE).write_text(MODEL_SOURCE, encoding="utf-8")
            content = model_config(name, replace(settings, engine=engine), on_gpu=plan)
            (folder / CONFIG_FILE).write_text(content, encoding="utf-8")
    return destination


def _is_written(folder: Path) -> bool:
    try:
        return (folder / VERSION / MODEL_FILE).read_text(encoding="utf-8").startswith(_MARK)
    except (OSError, UnicodeDecodeError):
        return False


def _bring(source: Path, destination: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, destination, copy_function=_linked)
    elif source.is_file():
        _linked(str(source), str(destination))
    else:
        raise ArtifactError(f"{source}: there is no such file; build the plan again")


def _linked(source: str, destination: str) -> str:
    try:
        os.link(source, destination)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, destination)
    return destination


def model_config(name: str, settings: ModelSettings, *, on_gpu: bool) -> str:
    """Return the content of `config.pbtxt`.

    Args:
        name: The model's name.
        settings: How it is run.
        on_gpu: Whether Triton assigns a GPU.
    """
    lines = [
        _MARK,
        f"name: {json.dumps(name)}",
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        f"instance_group [ {{ count: 1 kind: {'KIND_GPU' if on_gpu else 'KIND_CPU'} }} ]",
        *(_tensor("input", spec) for spec in INPUTS),
        *(_tensor("output", spec) for spec in OUTPUTS),
        *(
            f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}"
            for key, value in settings.parameters().items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _tensor(kind: str, spec: TensorSpec) -> str:
    optional = " optional: true" if spec.optional else ""
    return f'{kind} {{ name: "{spec.name}" data_type: {spec.type} dims: [ {spec.size} ]{optional} }}'
