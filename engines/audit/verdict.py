"""The verdict over a plan: which products really run in INT8 or FP8, against what was planned.

A plan of TensorRT-RTX is read from its program text, one of TensorRT from the engine inspector
(`engine_inspector`), whose reading is given to `judge`. A plan that neither tells about is reported as such, and the
tests hold sabotaged graphs that must be found out, so that a change of format cannot pass for a success.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from spike_export.artifacts.manifest import INT8_WEIGHTS
from spike_export.engines.audit.kernel_count import attention_kernels, layer_kernels, unfused_attention
from spike_export.engines.audit.reading import (
    EIGHT_BITS,
    FLOAT8_WEIGHT_ONLY,
    NARROW_SUMS,
    NOT_FOUND,
    WEIGHT_ONLY,
    Evidence,
    PlanReading,
    Product,
    ProgramReading,
)
from spike_export.engines.plan.program_audit import ProgramAudit

_NOT_WIDE = frozenset({NOT_FOUND, *EIGHT_BITS, *NARROW_SUMS.values(), WEIGHT_ONLY, FLOAT8_WEIGHT_ONLY})
"""What is found of a module that does not run in a floating-point format with a weight of such a format."""

_NOTHING_READ = Evidence("none", caveat="the plan was not read")


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
        if self.planned in EIGHT_BITS:
            return self.found == (self.planned,)
        if self.planned.endswith(INT8_WEIGHTS):
            return self.found == (WEIGHT_ONLY,)
        return not _NOT_WIDE & set(self.found)


@dataclass(frozen=True, slots=True)
class PlanAudit:
    """The verdict over a plan.

    Attributes:
        targets: Compute capabilities the programs name, e.g. `SM86`.
        profiles: Profiles with a program of their own; 0 when nothing could be read.
        int8_products: Matrix products with two INT8 operands, all profiles together; merged modules are one.
        fp8_products: The same with two FP8 operands.
        other_products: All other matrix products, those of attention without a fused kernel included.
        programs: One for each profile (and each set of targets that has a program of its own).
        evidence: How all this is known.
    """

    targets: tuple[str, ...]
    profiles: int
    int8_products: int
    fp8_products: int
    other_products: int
    modules: tuple[ModuleAudit, ...]
    programs: tuple[ProgramAudit, ...] = ()
    evidence: Evidence = _NOTHING_READ

    @property
    def readable(self) -> bool:
        """Whether the plan could be read at all; if not, nothing is proved either way."""
        return self.profiles > 0

    @property
    def deviations(self) -> tuple[ModuleAudit, ...]:
        """Modules that do not run as planned."""
        return tuple(module for module in self.modules if not module.as_planned)


def covering(reading: PlanReading, profiles: int) -> PlanReading:
    """Return the reading of a plan where it has a program of every profile, else one that proves nothing.

    A program that is not recognised must not leave the verdict to the others.

    Args:
        profiles: How many the plan was built with.
    """
    read = {program.profile for program in reading.programs}
    missing = [profile for profile in range(profiles) if profile not in read]
    if not read or not missing:
        return reading
    reason = f"no program of profile {missing[0]} was found in the plan"
    return PlanReading(Evidence("none", reading.evidence.compiler, reason))


def judge(reading: PlanReading, planned: Mapping[str, str]) -> PlanAudit:
    """Compare the reading of a plan with what was asked for.

    Args:
        planned: HF module name → `int8`, `fp8`, `float16`, `bfloat16` or `float32`, or one of the last three with
            `+int8-weights`. The module's product is the ONNX node `<module>.MatMul`.
    """
    programs = reading.programs
    products = Counter(
        product.precision for program in programs for product in program.products if _counts(product, planned)
    )
    int8, fp8 = (products.pop(precision, 0) for precision in EIGHT_BITS)
    return PlanAudit(
        targets=tuple(dict.fromkeys(target for program in programs for target in program.targets)),
        profiles=len({program.profile for program in programs}),
        int8_products=int8,
        fp8_products=fp8,
        other_products=products.total(),
        modules=tuple(ModuleAudit(name, planned[name], reading.found_of(name)) for name in planned),
        programs=tuple(_summary(program) for program in programs),
        evidence=reading.evidence,
    )


def _counts(product: Product, planned: Mapping[str, str]) -> bool:
    # A kernel that computes a product beside other things may just as well compute one of attention.
    return not product.in_kernel or product.modules[0] in planned


def _summary(program: ProgramReading) -> ProgramAudit:
    layers = layer_kernels(program.kernels)
    last = max((layer for layer in layers if layer is not None), default=-1)
    return ProgramAudit(
        profile=program.profile,
        targets=program.targets,
        kernels=len(program.kernels),
        layer_kernels=tuple(len(layers.get(layer, ())) for layer in range(last + 1)),
        attention=dict(attention_kernels(program.kernels)),
        unfused_attention=unfused_attention(program.kernels),
        fused=tuple(product.modules for product in program.products if len(product.modules) > 1),
        weight_bytes=dict(program.weight_bytes),
    )
