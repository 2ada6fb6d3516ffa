"""Where and how a job runs its model: devices, precision, and whether the layers stay in memory."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from spike_export.artifacts.errors import CheckpointError
from spike_export.artifacts.process.host_memory import available_memory
from spike_export.artifacts.recipe import Dtype

if TYPE_CHECKING:
    from spike_export.calibration.decoder.layerwise import Execution
    from spike_export.checkpoint.checkpoint import Checkpoint

Residency = Literal["auto", "resident", "streamed"]
"""Whether a model's layers stay in memory: where they fit, always, or never."""

_DEVICES = ("cpu", "cuda")

_COPIES = 2.5
"""Copies of the weights that a search holds: the model, the transformed one, INT8 weights, and what is being read."""

_ACTIVATION_SHARE = 8
"""Part of the available memory that activations may take before they go to a file: one of so many."""

_LEAST_ACTIVATION_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """Where and how calibration runs the model.

    Attributes:
        devices: torch devices, such as `cuda:0`, which share the windows; empty for the CPU.
        compute_dtype: Precision of the forward passes.
        layers: Whether the model's layers stay in memory.
    """

    devices: tuple[str, ...] = ()
    compute_dtype: Dtype = "float32"
    layers: Residency = "auto"


def execution_of(checkpoint: "Checkpoint", options: ExecutionOptions, scratch: Path) -> "Execution":
    """Return how a checkpoint's model runs.

    Args:
        options: Where and how.
        scratch: Folder for activations that exceed their share of the memory.

    Raises:
        CheckpointError: A device is not there.
    """
    from spike_export.calibration.decoder.layerwise import Execution

    devices, dtype = options.devices or ("cpu",), options.compute_dtype
    for device in devices:
        _require_device(device)
    size = 4 if dtype == "float32" else 2
    weights = size * sum(math.prod(shape) for shape in checkpoint.tensors.shapes.values())
    available = available_memory()
    fits = available is None or _COPIES * weights < available
    resident = fits if options.layers == "auto" else options.layers == "resident"
    room = max(_LEAST_ACTIVATION_BYTES, (available or 8 << 30) // _ACTIVATION_SHARE)
    scratch.mkdir(parents=True, exist_ok=True)
    return Execution(devices, dtype, resident, room, scratch)


def _require_device(device: str) -> None:
    import torch

    try:
        known = torch.device(device)
    except RuntimeError as error:
        raise CheckpointError(f"--device {device}: torch knows no such device; give cpu, cuda or cuda:1") from error
    if known.type not in _DEVICES or (known.type == "cpu" and known.index):
        raise CheckpointError(f"--device {device}: calibration computes on a CPU or CUDA; give cpu, cuda or cuda:1")
    if known.type == "cuda" and (known.index or 0) >= torch.cuda.device_count():
        raise CheckpointError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices here; give cpu")
