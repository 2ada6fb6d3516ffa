"""Which products a program of TensorRT-RTX computes, in which precision, and which kernels do."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spike_export.engines.audit.module_names import modules_of
from spike_export.engines.audit.program_text import CHECKED_VERSION, Operation, Program, Tensor, read_plan_text
from spike_export.engines.audit.reading import (
    EIGHT_BITS,
    FLOAT8_WEIGHT_ONLY,
    NARROW_SUMS,
    WEIGHT_ONLY,
    Evidence,
    Kernel,
    PlanReading,
    Product,
    ProgramReading,
)

_QUANTIZED: Mapping[str, str] = {"int8": "int8", "fp8_e4m3": "fp8"}
"""The program's type of a quantized operand → its number format."""

_WEIGHT_ONLY: Mapping[str, str] = {"int8": WEIGHT_ONLY, "fp8_e4m3": FLOAT8_WEIGHT_ONLY}

_PRECISIONS: Mapping[str, str] = {
    **_QUANTIZED,
    "half": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "float": "float32",
}

_NARROW = frozenset({"half", "bf16", "bfloat16"})
"""Types of a product's output that do not hold the sums of 8-bit operands."""

_PRODUCT = "fully_connected"
_SPECIALISED = "runtime_fusion"
"""A kernel around a product that its own inner program names."""
_GENERATED = ("function", _SPECIALISED)
_RESTORING = ("cast", "mul")
"""Operations of inner programs by which an 8-bit weight becomes a floating-point operand."""


def read_program_text(plan: Path) -> PlanReading:
    """Read what a plan runs from the program text of TensorRT-RTX; without one the reading is empty, and says why.

    Raises:
        EngineError: The plan cannot be read.
    """
    text = read_plan_text(plan)
    outer = sorted((program for program in text.programs if program.targets), key=lambda program: program.profile)
    if not outer:
        kind = f"a plan of TensorRT-RTX {_dotted(text.version)}" if text.version else "no plan of TensorRT-RTX"
        return PlanReading(Evidence("none", caveat=f"{plan.name} is {kind} and holds no program text"))
    caveat = ""
    if text.version[: len(CHECKED_VERSION)] != CHECKED_VERSION:
        caveat = f"the format is undocumented and was checked with TensorRT-RTX {_dotted(CHECKED_VERSION)} only"
    evidence = Evidence("program-text", f"TensorRT-RTX {_dotted(text.version)}".strip(), caveat)
    inner = [program for program in text.programs if not program.targets]
    return PlanReading(
        evidence,
        tuple(_reading(program, [each for each in inner if each.profile == program.profile]) for program in outer),
    )


def _dotted(version: Sequence[int]) -> str:
    return ".".join(str(number) for number in version)


def _reading(outer: Program, inner: Sequence[Program]) -> ProgramReading:
    programs = (outer, *inner)
    products = {id(program): _products(program) for program in programs}
    separate = [product for program in programs for product in products[id(program)].values()]
    precisions: dict[str, str] = {}
    for product in separate:
        for module in product.modules:
            # A module computed twice counts with the product that is not of 8 bits.
            if module not in precisions or product.precision not in EIGHT_BITS:
                precisions[module] = product.precision
    in_kernels: dict[str, str] = {}
    # A kernel also names products whose results it merely scales: those have been found above.
    for mention in (mention for program in programs for mention in _mentions(program)):
        for module in mention.modules:
            known = precisions.get(module)
            if known is None:
                precisions[module] = in_kernels[module] = mention.precision
            # The inner program of a fused kernel sees only its operand, not the 8 bits that another made it of.
            elif mention.restored_weight and known not in EIGHT_BITS:
                precisions[module] = mention.precision
    within = tuple(Product((module,), precisions[module], in_kernel=True) for module in in_kernels)
    return ProgramReading(
        profile=outer.profile,
        targets=outer.targets,
        kernels=tuple(_kernels(outer, products[id(outer)])),
        products=(*separate, *within),
        precisions=precisions,
        weight_bytes=_weight_bytes(programs),
    )


def _kernels(program: Program, products: Mapping[str, Product]) -> Iterator[Kernel]:
    computed = {module for product in products.values() for module in product.modules}
    specialised = {
        module
        for operation in program.operations
        if operation.kind == _SPECIALISED
        for module in modules_of(operation.nodes)
    }
    for operation in program.operations:
        if not operation.launches:
            continue
        if operation.kind == _PRODUCT:
            computes = products[operation.name].modules
        else:
            # The first to name a product that none has computed yet; around an inner program, the specialised one.
            taken = computed if operation.kind == _SPECIALISED else computed | specialised
            computes = tuple(module for module in modules_of(operation.nodes) if module not in taken)
            computed.update(computes)
        yield Kernel(operation.name, operation.nodes, computes)


def _weight_bytes(programs: Iterable[Program]) -> dict[str, int]:
    stored: dict[str, int] = {}
    for program in programs:
        for tensor in {tensor.place: tensor for tensor in program.tensors.values() if tensor.payload}.values():
            name = _PRECISIONS.get(tensor.kind, tensor.kind)
            stored[name] = stored.get(name, 0) + tensor.payload
    return stored


@dataclass(frozen=True, slots=True)
class _Mention:
    """A generated kernel that names products.

    Attributes:
        precision: That of its largest constant.
        restored_weight: An operand is an 8-bit weight that another kernel has dequantized.
    """

    precision: str
    restored_weight: bool
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Operands:
    """The tensors of one program; `made_of` says what one is computed from, where that may restore a weight."""

    tensors: Mapping[str, Tensor]
    made_of: Mapping[str, Sequence[str]]

    def kind(self, name: str) -> str:
        """Return a tensor's type; `unknown` where it is not declared."""
        return self.tensors[name].kind if name in self.tensors else "unknown"

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


def _operands(program: Program) -> _Operands:
    made_of: dict[str, Sequence[str]] = {}
    for operation in program.operations:
        constant = all(name in program.tensors and program.tensors[name].payload for name in operation.inputs)
        # A kernel of constants alone: a weight that is dequantized in front of its product.
        precomputing = operation.kind in _GENERATED and operation.inputs and constant
        if operation.kind in _RESTORING or precomputing:
            made_of.update(dict.fromkeys(operation.outputs, operation.inputs))
    return _Operands(program.tensors, made_of)


def _products(program: Program) -> dict[str, Product]:
    """Return a program's products by their names."""
    operands = _operands(program)
    return {
        operation.name: Product(
            # A product that was taken apart at the slices behind it and put together again has an invented name.
            modules_of(operation.name.split("+")) or modules_of(operation.nodes),
            _product_precision(operation, operands),
        )
        for operation in program.operations
        if operation.kind == _PRODUCT
    }


def _product_precision(product: Operation, operands: _Operands) -> str:
    names = product.inputs
    types = [operands.kind(name) for name in names[:2]]
    if len(types) == 2 and types[0] == types[1] and types[0] in _QUANTIZED:
        precision = _QUANTIZED[types[0]]
        narrow = any(operands.kind(name) in _NARROW for name in product.outputs)
        return NARROW_SUMS[precision] if narrow else precision
    weight = names[1] if len(names) > 1 else ""
    stored = operands.kind(weight) if operands.kind(weight) in _QUANTIZED else operands.restored(weight)
    if stored is not None:
        return _WEIGHT_ONLY[stored]
    wider = next((kind for kind in types if kind not in _QUANTIZED), "unknown")
    return _PRECISIONS.get(wider, wider)


def _mentions(program: Program) -> Iterator[_Mention]:
    operands = _operands(program)
    for operation in program.operations:
        modules = modules_of(operation.nodes) if operation.kind in _GENERATED else ()
        if modules:
            yield _mention(operation, modules, operands)


def _mention(operation: Operation, modules: tuple[str, ...], operands: _Operands) -> _Mention:
    """A product inside a kernel is never one of 8-bit operands; its weight is the largest constant."""
    declared = (operands.tensors[name] for name in operation.inputs if name in operands.tensors)
    largest = max(declared, key=lambda tensor: tensor.payload, default=None)
    kind = largest.kind if largest else "unknown"
    restored = next((stored for name in operation.inputs if (stored := operands.restored(name))), None)
    precision = _WEIGHT_ONLY.get(restored or kind) or _PRECISIONS.get(kind, kind)
    return _Mention(precision, restored is not None, modules)
