"""Proof of precision: which products a plan really runs in INT8 or FP8, read from the program text inside the plan.

TensorRT-RTX 1.7 stores each program as text: declarations of tensors with their types, then operations that name
the ONNX nodes they stand for. The format is undocumented. A plan without such text is reported as such, and the
tests hold a sabotaged graph that must be found out, so that a change of format cannot pass for a success.
"""

import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spike_export.calibration.errors import EngineError
from spike_export.export.manifest import INT8_WEIGHTS

NOT_FOUND = "not found"
WEIGHT_ONLY = "int8 weights only"
"""The weight is stored in INT8 and dequantized before a floating-point product: within it, or by a kernel in front."""
FLOAT8_WEIGHT_ONLY = "fp8 weights only"
"""The same of FP8; nobody plans that, and it is what becomes of FP8 operands that the compiler cannot multiply."""

_QUANTIZED: Mapping[str, str] = {"int8": "int8", "fp8_e4m3": "fp8"}
"""The program's type of a quantized operand → its number format."""

_WEIGHT_ONLY: Mapping[str, str] = {"int8": WEIGHT_ONLY, "fp8_e4m3": FLOAT8_WEIGHT_ONLY}

_PROGRAM = b"descriptors {"
_NAME_SUFFIX = re.compile(r"(_U\d+)?( \[profile \d+\])?$")
_ACCELERATORS = re.compile(r"accelerators=\{([^}]*)\}")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_TENSOR = re.compile(r"^  (?:sub_)?tensor=\{(.*)\}$", re.MULTILINE)
_TENSOR_NAME = re.compile(r' name="([^"]*)"')
_TENSOR_TYPE = re.compile(r" type=(\w+)")
_PAYLOAD = re.compile(r"\bconst_payload_size=(\d+)")
_PRODUCT = re.compile(
    r'^  fully_connected=\{ name="([^"]*)" .*? input=\{([^}]*)\}(?:.* layers="([^"]*)")?', re.MULTILINE
)
_RESTORING = re.compile(r'^  (?:cast|mul)=\{ name="[^"]*" output=\{"([^"]*)"[^}]*\} input=\{([^}]*)\}', re.MULTILINE)
"""Operations by which an INT8 weight becomes a floating-point operand."""
_PRECOMPUTING = re.compile(
    r"^  (?:runtime_fusion|function)=\{.*? input_args=\{([^}]*)\}.*? output_args=\{([^}]*)\}", re.MULTILINE
)
_KERNEL = re.compile(r'^  (?:runtime_fusion|function)=\{.*? input_args=\{([^}]*)\}.* layers="([^"]*)"', re.MULTILINE)
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_QUOTED = re.compile(r'"([^"]*)"')

_PRECISIONS: Mapping[str, str] = {
    "int8": "int8",
    "half": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "float": "float32",
}


@dataclass(frozen=True, slots=True)
class ModuleAudit:
    """What became of one module.

    Attributes:
        planned: `int8`, `fp8`, a wider floating-point format, or such a format with `+int8-weights` (W8A16).
        found: Every precision its product has in some profile, sorted; `not found` where a profile lacks it.
    """

    module: str
    planned: str
    found: tuple[str, ...]

    @property
    def as_planned(self) -> bool:
        """Whether it holds in every profile: 8-bit operands, INT8 weights only, or no 8 bits at all."""
        if self.planned in _QUANTIZED.values():
            return self.found == (self.planned,)
        if self.planned.endswith(INT8_WEIGHTS):
            return self.found == (WEIGHT_ONLY,)
        return not {NOT_FOUND, *_QUANTIZED.values(), *_WEIGHT_ONLY.values()} & set(self.found)


@dataclass(frozen=True, slots=True)
class PlanAudit:
    """The verdict over a plan.

    Attributes:
        targets: Compute capabilities the programs name, e.g. `SM86`.
        profiles: Profiles with a program of their own; 0 when the plan holds no readable program.
        int8_products: Matrix products with two INT8 operands, all profiles together; merged modules are one.
        fp8_products: The same with two FP8 operands.
        other_products: All other matrix products, those of attention without a fused kernel included.
    """

    targets: tuple[str, ...]
    profiles: int
    int8_products: int
    fp8_products: int
    other_products: int
    modules: tuple[ModuleAudit, ...]

    @property
    def readable(self) -> bool:
        """Whether the plan holds program text at all; without it nothing is proved either way."""
        return self.profiles > 0

    @property
    def deviations(self) -> tuple[ModuleAudit, ...]:
        """Modules that do not run as planned."""
        return tuple(module for module in self.modules if not module.as_planned)


def audit_plan(plan_path: Path, planned: Mapping[str, str]) -> PlanAudit:
    """Compare a plan with what was asked for.

    Args:
        planned: HF module name → `int8`, `fp8`, `float16`, `bfloat16` or `float32`, or one of the last three with
            `+int8-weights`. The module's product is the ONNX node `<module>.MatMul`.

    Raises:
        EngineError: The plan cannot be read.
    """
    try:
        with plan_path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            programs = list(_programs(data))
    except (OSError, ValueError) as error:  # ValueError: mmap refuses an empty file
        raise EngineError(f"{plan_path}: cannot read the plan: {error}") from error
    profiles = sorted({program.profile for program in programs if program.targets})
    findings = [_findings([program for program in programs if program.profile == profile]) for profile in profiles]
    modules = tuple(ModuleAudit(name, planned[name], _found(name, findings)) for name in planned)
    products = [product.precision for program in programs for product in program.products.values()]
    kernels = sum(finding.in_kernel for found in findings for name, finding in found.items() if name in planned)
    int8, fp8 = products.count("int8"), products.count("fp8")
    targets = {target: None for program in programs for target in program.targets}
    return PlanAudit(tuple(targets), len(profiles), int8, fp8, len(products) - int8 - fp8 + kernels, modules)


@dataclass(frozen=True, slots=True)
class _Kernel:
    """A generated kernel.

    Attributes:
        precision: That of its largest constant.
        restored_weight: An operand is an 8-bit weight that another kernel has dequantized.
        modules: Those whose products it mentions.
    """

    precision: str
    restored_weight: bool
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Product:
    """A matrix product, the precision it runs in, and the modules it computes."""

    precision: str
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The tensors of one program.

    Attributes:
        declared: Name → (type, bytes when constant, else 0).
        made_of: Name → what it is computed from, where that may be the restoring of a weight.
    """

    declared: Mapping[str, tuple[str, int]]
    made_of: Mapping[str, Sequence[str]]

    def kind(self, name: str) -> str:
        """Return a tensor's type; `unknown` where it is not declared."""
        return self.declared.get(name, ("unknown", 0))[0]

    def restored(self, name: str) -> str | None:
        """Return the 8-bit type that a tensor is made of; None where it is made of none."""
        pending, seen = list(self.made_of.get(name, ())), set()
        while pending:
            source = pending.pop()
            if self.kind(source) in _QUANTIZED:
                return self.kind(source)
            if source not in seen:
                seen.add(source)
                pending += self.made_of.get(source, ())
        return None


@dataclass(frozen=True, slots=True)
class _Program:
    """One program of the plan.

    Attributes:
        targets: Empty for the inner program of a fused kernel, which its caller's targets hold for.
        profile: Index of the optimization profile.
        products: By name.
    """

    targets: tuple[str, ...]
    profile: int
    products: Mapping[str, _Product]
    kernels: tuple[_Kernel, ...]


@dataclass(frozen=True, slots=True)
class _Finding:
    """A module's precision in one profile; `in_kernel` when a generated kernel, not a product, computes it."""

    precision: str
    in_kernel: bool


def _found(module: str, findings: Sequence[Mapping[str, _Finding]]) -> tuple[str, ...]:
    precisions = {found[module].precision if module in found else NOT_FOUND for found in findings}
    return tuple(sorted(precisions or {NOT_FOUND}))


def _programs(data: mmap.mmap) -> Iterator[_Program]:
    # Looking for the marker and parsing from there on takes a second where a pattern over gigabytes takes a minute.
    start = data.find(_PROGRAM)
    while start >= 0:
        end = data.find(b"\0", start)
        end = len(data) if end < 0 else end
        header = data[data.rfind(b"\0", 0, start) + 1 : start].decode(errors="replace")
        yield _parse(header, data[start:end].decode(errors="replace"))
        start = data.find(_PROGRAM, end)


def _parse(header: str, text: str) -> _Program:
    accelerators = _ACCELERATORS.search(header)
    targets = accelerators.group(1).split() if accelerators else []
    profile = _PROFILE.search(text)
    tensors = _tensors(text)
    products = {
        match.group(1): _Product(
            _product_precision(_QUOTED.findall(match.group(2)), tensors),
            # A product that was taken apart at the slices behind it and put together again has an invented name.
            _modules(match.group(1).split("+")) or _modules(_LAYER.findall(match.group(3) or "")),
        )
        for match in _PRODUCT.finditer(text)
    }
    kernels = tuple(
        _kernel(_QUOTED.findall(match.group(1)), _modules(_LAYER.findall(match.group(2))), tensors)
        for match in _KERNEL.finditer(text)
    )
    return _Program(
        targets=tuple(target.upper() for target in targets if target != "*"),
        profile=int(profile.group(1)) if profile else 0,
        products=products,
        kernels=tuple(kernel for kernel in kernels if kernel.modules),
    )


def _tensors(text: str) -> _Tensors:
    declared = dict(_declarations(text))
    made_of = {match.group(1): _QUOTED.findall(match.group(2)) for match in _RESTORING.finditer(text)}
    for match in _PRECOMPUTING.finditer(text):
        inputs = _QUOTED.findall(match.group(1))
        # A kernel of constants alone: a weight that is dequantized in front of its product.
        if inputs and all(declared.get(name, ("", 0))[1] for name in inputs):
            made_of.update(dict.fromkeys(_QUOTED.findall(match.group(2)), inputs))
    return _Tensors(declared, made_of)


def _declarations(text: str) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield name → (type, bytes when constant, else 0)."""
    for match in _TENSOR.finditer(text):
        name, kind = _TENSOR_NAME.search(match.group(1)), _TENSOR_TYPE.search(match.group(1))
        payload = _PAYLOAD.search(match.group(1))
        if name and kind:
            yield name.group(1), (kind.group(1), int(payload.group(1)) if payload else 0)


def _product_precision(operands: Sequence[str], tensors: _Tensors) -> str:
    types = [tensors.kind(name) for name in operands[:2]]
    if len(set(types)) == 1 and types[0] in _QUANTIZED:
        return _QUANTIZED[types[0]]
    weight = operands[1] if len(operands) > 1 else ""
    stored = tensors.kind(weight) if tensors.kind(weight) in _QUANTIZED else tensors.restored(weight)
    if stored is not None:
        return _WEIGHT_ONLY[stored]
    wider = next((kind for kind in types if kind not in _QUANTIZED), "unknown")
    return _PRECISIONS.get(wider, wider)


def _kernel(operands: Sequence[str], modules: tuple[str, ...], tensors: _Tensors) -> _Kernel:
    """A product inside a kernel is never one of 8-bit operands; its weight is the largest constant."""
    declared = (tensors.declared[name] for name in operands if name in tensors.declared)
    kind, _ = max(declared, key=lambda tensor: tensor[1], default=("unknown", 0))
    restored = next((stored for name in operands if (stored := tensors.restored(name))), None)
    precision = _WEIGHT_ONLY.get(restored or kind) or _PRECISIONS.get(kind, kind)
    return _Kernel(precision, restored is not None, modules)


def _modules(nodes: Sequence[str]) -> tuple[str, ...]:
    """Return the modules whose products are among these ONNX nodes, suffixes of TensorRT removed."""
    names = (_NAME_SUFFIX.sub("", node) for node in nodes)
    return tuple(dict.fromkeys(name.removesuffix(".MatMul") for name in names if name.endswith(".MatMul")))


def _findings(programs: Sequence[_Program]) -> dict[str, _Finding]:
    """Return what one profile's programs say of each module they mention."""
    found: dict[str, _Finding] = {}
    for program in programs:
        for product in program.products.values():
            for module in product.modules:
                # A module computed twice counts with the product that is not of 8 bits.
                if module not in found or product.precision not in _QUANTIZED.values():
                    found[module] = _Finding(product.precision, in_kernel=False)
    # A kernel also names products whose results it merely scales: those have been found above.
    for program in programs:
        for kernel in program.kernels:
            for module in kernel.modules:
                known = found.setdefault(module, _Finding(kernel.precision, in_kernel=True))
                # The inner program of a fused kernel sees only its operand, not the 8 bits that another made it of.
                if kernel.restored_weight and known.precision not in _QUANTIZED.values():
                    found[module] = _Finding(kernel.precision, known.in_kernel)
    return found
