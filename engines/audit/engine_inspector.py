"""What TensorRT's engine inspector tells of an engine: the same reading as that of a plan's program text.

The inspector needs a GPU, and an engine built with detailed profiling verbosity. Its JSON document is
`{"Layers": [...], "Bindings": [...]}`; a layer has `Name`, `LayerType`, `Inputs` and `Outputs` (each with
`Format/Datatype`), `TacticName` and `Metadata`, which lists the ONNX nodes. Layers of all profiles but the first have
`[profile N]` in a name. Weights of a matrix product are often not among its inputs: there, the name of its kernel
tells the types of both operands.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.files.json_document import first_fault
from spike_export.engines.audit.module_names import modules_of
from spike_export.engines.audit.reading import (
    FLOAT8_WEIGHT_ONLY,
    WEIGHT_ONLY,
    Evidence,
    Kernel,
    PlanReading,
    Product,
    ProgramReading,
)
from spike_export.engines.tensorrt.log import BuildLog, make_logger

_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_GRAPH = re.compile(r"_myl(\d+)_\d+$")
"""The compiled graph that a layer belongs to; a graph serves one profile."""

_NO_KERNEL = frozenset({"constant", "noop", "shape_call", "signal", "wait"})
"""Types of layers, in lower case, that launch nothing."""

_PRODUCTS = frozenset({"gemm", "matrixmultiply", "caskgemmmatrixmultiply"})
"""Types of layers, in lower case, that are a matrix-product kernel."""

_AROUND_A_PRODUCT = "fusion"
"""Type of a layer that may be such a kernel with other things around it, in any order of inputs."""

_OPERANDS = re.compile(r"gemm_((?:tf|bf|i|f)\d+|e[45]m[23])\w*?_((?:tf|bf|i|f)\d+|e[45]m[23])")
"""In a kernel's name: `gemm_`, the types of A and of the result, `_`, those of B and of the sum."""

_TACTIC_TYPES: Mapping[str, str] = {
    "i8": "int8",
    "e4m3": "fp8",
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
    "tf32": "float32",
}

_TYPES: Sequence[tuple[str, str]] = (
    ("int8", "int8"),
    ("fp8", "fp8"),
    ("bfloat16", "bfloat16"),
    ("bf16", "bfloat16"),
    ("half", "float16"),
    ("fp16", "float16"),
    ("float", "float32"),
    ("fp32", "float32"),
)
"""Word in a tensor's `Format/Datatype`, in lower case → number format; the first that fits counts."""

_WEIGHT_ONLY: Mapping[str, str] = {"int8": WEIGHT_ONLY, "fp8": FLOAT8_WEIGHT_ONLY}

_WITHOUT_TYPES = (
    "the engine inspector names its layers but not their types; build it with detailed profiling verbosity, as "
    "spike-export does"
)


class _TensorInfo(BaseModel):
    """An input or output of a layer."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: str = Field(default="", alias="Format/Datatype")


class _LayerInfo(BaseModel):
    """A layer; later releases may tell more."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str = Field(alias="Name")
    kind: str = Field(alias="LayerType")
    inputs: tuple[_TensorInfo, ...] = Field(default=(), alias="Inputs")
    tactic: str = Field(default="", alias="TacticName")
    metadata: str = Field(default="", alias="Metadata")

    @property
    def nodes(self) -> tuple[str, ...]:
        """The ONNX nodes it stands for."""
        return tuple(_NODE.findall(self.metadata))

    @property
    def multiplies(self) -> bool:
        """Whether a matrix-product kernel runs it."""
        kind = self.kind.lower()
        return kind in _PRODUCTS or (kind == _AROUND_A_PRODUCT and "gemm" in self.tactic)


class _EngineInfo(BaseModel):
    """The document; where verbosity is low its layers are mere names."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    layers: tuple[_LayerInfo | str, ...] = Field(alias="Layers")


def inspect_engine(trt: Any, plan: Path) -> PlanReading:
    """Load an engine on this machine's GPU and ask its inspector; the plan is executed, so it must be trusted.

    Args:
        trt: The bindings that built it.
        plan: The engine.

    Raises:
        EngineError: The engine cannot be loaded, or its description is not what this module knows.
    """
    log = BuildLog()
    logger = make_logger(trt, log)
    runtime = trt.Runtime(logger)
    try:
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    except OSError as error:
        raise EngineError(f"{plan}: cannot read the plan: {error}") from error
    if engine is None:
        raise EngineError(f"{plan}: cannot be loaded here: {log.errors[0] if log.errors else 'no reason is given'}")
    inspector = engine.create_engine_inspector()
    described = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return read_layer_information(described, f"{trt.__name__} {trt.__version__}")


def read_layer_information(document: str, compiler: str = "") -> PlanReading:
    """Read the inspector's JSON document of an engine.

    Args:
        document: What `get_engine_information` returns.
        compiler: Name and version of what built the engine.

    Returns:
        One program per profile; a reading without programs where the engine was built to tell names only.

    Raises:
        EngineError: It is another kind of document.
    """
    try:
        layers = _EngineInfo.model_validate(json.loads(document)).layers
    except ValidationError as error:
        raise EngineError(f"the engine inspector's description has an unknown form: {first_fault(error)}") from error
    except ValueError as error:
        raise EngineError(f"the engine inspector's description is not JSON: {error}") from error
    detailed = [layer for layer in layers if isinstance(layer, _LayerInfo)]
    if not detailed or len(detailed) < len(layers):
        return PlanReading(Evidence("none", compiler, _WITHOUT_TYPES))
    profiles: dict[int, list[_LayerInfo]] = {}
    for layer, profile in zip(detailed, _profiles(detailed), strict=True):
        profiles.setdefault(profile, []).append(layer)
    programs = tuple(_program(profile, profiles[profile]) for profile in sorted(profiles))
    return PlanReading(Evidence("engine-inspector", compiler), programs)


def _profiles(layers: Sequence[_LayerInfo]) -> list[int]:
    """Return each layer's profile; generated kernels bear no profile, but the number of their graph."""
    graphs: dict[str, int] = {}
    for layer in layers:
        marked, graph = _PROFILE.search(layer.name), _GRAPH.search(layer.name)
        if marked and graph:
            graphs[graph.group(1)] = int(marked.group(1))
    profiles = []
    for layer in layers:
        marked, graph = _PROFILE.search(layer.name), _GRAPH.search(layer.name)
        known = graphs.get(graph.group(1), 0) if graph else 0
        profiles.append(int(marked.group(1)) if marked else known)
    return profiles


def _program(profile: int, layers: Sequence[_LayerInfo]) -> ProgramReading:
    launched = [layer for layer in layers if layer.kind.lower() not in _NO_KERNEL]
    products = [_product(layer) for layer in launched if layer.multiplies]
    found: dict[str, str] = {}
    for product in products:
        for module in product.modules:
            # A module computed twice counts with the product that is not of 8 bits.
            if module not in found or product.precision not in _WEIGHT_ONLY:
                found[module] = product.precision
    kernels, within = [], []
    for layer in launched:
        computes = _product(layer).modules if layer.multiplies else ()
        if not computes:
            # The first kernel to name a product that no matrix-product kernel computes.
            computes = tuple(module for module in modules_of(layer.nodes) if module not in found)
            for module in computes:
                found[module] = _in_kernel(layer)
                within.append(Product((module,), found[module], in_kernel=True))
        kernels.append(Kernel(layer.name, layer.nodes, computes))
    return ProgramReading(profile, (), tuple(kernels), (*products, *within), found)


def _product(layer: _LayerInfo) -> Product:
    return Product(modules_of(layer.name.split("+")) or modules_of(layer.nodes), _precision(layer))


def _precision(layer: _LayerInfo) -> str:
    """Return a matrix product's precision, by its kernel's name, or else by the types of its inputs."""
    inputs = [_number_format(tensor.kind) for tensor in layer.inputs]
    operands = _OPERANDS.search(layer.tactic)
    if operands:
        types = [_TACTIC_TYPES.get(operand, "unknown") for operand in operands.groups()]
    else:
        # The first input is A, and 8 bits are multiplied with 8 bits only: what follows may be a residual.
        types = inputs[:2] if layer.kind.lower() == _AROUND_A_PRODUCT else inputs[:1]
    if types and types[0] in _WEIGHT_ONLY and len(set(types)) == 1:
        return types[0]
    # An 8-bit weight beside a wider operand is dequantized within the kernel.
    stored = next((kind for kind in (*types, *inputs) if kind in _WEIGHT_ONLY), None)
    if stored is not None:
        return _WEIGHT_ONLY[stored]
    return types[0] if types else "unknown"


def _in_kernel(layer: _LayerInfo) -> str:
    """Return the precision of a product inside a generated kernel, which is never taken for one of 8-bit operands."""
    inputs = [_number_format(tensor.kind) for tensor in layer.inputs]
    stored = next((kind for kind in inputs if kind in _WEIGHT_ONLY), None)
    return _WEIGHT_ONLY[stored] if stored else next(iter(inputs), "unknown")


def _number_format(kind: str) -> str:
    word = kind.lower()
    return next((name for known, name in _TYPES if known in word), "unknown")
