"""What a plan says it runs, whichever way that was learned: programs of kernels, and products with their precision."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

NOT_FOUND = "not found"
WEIGHT_ONLY = "int8 weights only"
"""The weight is stored in INT8 and dequantized before a floating-point product: within it, or by a kernel in front."""
FLOAT8_WEIGHT_ONLY = "fp8 weights only"
"""The same of FP8; nobody plans that, and it is what becomes of FP8 operands that the compiler cannot multiply."""

EIGHT_BITS = ("int8", "fp8")
"""Precisions of a product whose two operands have 8 bits."""

NARROW_SUMS: Mapping[str, str] = {name: f"{name}, sums in 16 bit" for name in EIGHT_BITS}
"""Such a product whose sums are stored in 16 bit before they are scaled, as FP16 scales make it: an input channel adds
up to 127 * 127 to an INT8 sum, FP16 ends at 65,504, and what is beyond becomes infinite."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """How a plan's programs are known, and how far that goes.

    Attributes:
        source: `none` when nothing could be read: then nothing is proved either way.
        compiler: Name and version of what wrote the plan, e.g. `TensorRT-RTX 1.7.1.116`; empty when unknown.
        caveat: What restricts the proof, or why there is none; empty where nothing does.
    """

    source: Literal["program-text", "engine-inspector", "none"]
    compiler: str = ""
    caveat: str = ""

    @property
    def sentence(self) -> str:
        """One line for the reader."""
        if self.source == "none":
            return f"not provable: {self.caveat}"
        origin = "read from the program text of" if self.source == "program-text" else "told by the engine inspector of"
        return f"{origin} {self.compiler or 'an unknown compiler'}" + (f"; {self.caveat}" if self.caveat else "")


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product, the precision it runs in, and the modules it computes: several where they were merged.

    Attributes:
        in_kernel: A generated kernel computes it beside other things, not a matrix-product kernel.
    """

    modules: tuple[str, ...]
    precision: str
    in_kernel: bool = False


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch.

    Attributes:
        nodes: ONNX nodes it stands for, some of them only in part.
        computes: Modules whose products it computes; empty for attention, norms and the like.
    """

    name: str
    nodes: tuple[str, ...]
    computes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ProgramReading:
    """What runs in one profile.

    Attributes:
        targets: Compute capabilities it holds for; empty when it does not say.
        kernels: In the order of their launch.
        products: Those of attention without a fused kernel included, which have no modules.
        precisions: Module → precision of its product.
        weight_bytes: Number format → bytes of constants, of norms, tables and scales too; empty when it does not say.
    """

    profile: int
    targets: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    products: tuple[Product, ...]
    precisions: Mapping[str, str]
    weight_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlanReading:
    """All programs of a plan, and how they are known."""

    evidence: Evidence
    programs: tuple[ProgramReading, ...] = ()

    @property
    def found(self) -> dict[str, tuple[str, ...]]:
        """Module → every precision its product has in some program, sorted; `not found` where one lacks it."""
        modules = dict.fromkeys(module for program in self.programs for module in program.precisions)
        return {module: self.found_of(module) for module in modules}

    def found_of(self, module: str) -> tuple[str, ...]:
        """Return what `found` holds, for a module that no program may mention."""
        precisions = {program.precisions.get(module, NOT_FOUND) for program in self.programs}
        return tuple(sorted(precisions or {NOT_FOUND}))
