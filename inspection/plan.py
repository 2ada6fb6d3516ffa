"""What a plan really runs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spike_export.artifacts.errors import ArtifactError
from spike_export.engines.audit.kernel_count import layer_kernels
from spike_export.engines.audit.reader import read_plan
from spike_export.engines.audit.reading import PlanReading, ProgramReading
from spike_export.engines.audit.verdict import ModuleAudit, PlanAudit, covering, judge
from spike_export.engines.plan.backend import Machine
from spike_export.engines.plan.sidecar import PlanSidecar, load_sidecar, sidecar_path

UNKNOWN = "unknown"


@dataclass(frozen=True)
class PlanInspection:
    """A plan and all that is known of it.

    Attributes:
        sidecar: None where it is missing or belongs to another plan; `note` says so.
    """

    plan: Path
    size: int
    sidecar: PlanSidecar | None
    note: str
    reading: PlanReading
    audit: PlanAudit

    @property
    def modules(self) -> tuple[ModuleAudit, ...]:
        """Every linear the sidecar or the programs know; without a sidecar what was planned is `unknown`."""
        if self.audit.modules:
            return self.audit.modules
        return tuple(ModuleAudit(name, UNKNOWN, found) for name, found in self.reading.found.items())

    @property
    def proved(self) -> bool:
        """Whether nothing deviates from what was planned; so it is where no sidecar says what that was."""
        return not self.audit.deviations and (self.sidecar is not None or not sidecar_path(self.plan).exists())

    def profile_name(self, index: int) -> str:
        """Return `prefill`, `decode`, or the number where the sidecar does not tell."""
        known = self.sidecar is not None and index < len(self.sidecar.profiles)
        return self.sidecar.profiles[index].name if self.sidecar and known else f"profile {index}"

    @property
    def sample(self) -> tuple[ProgramReading, int] | None:
        """A program and the layer in its middle: of decode where there is one, else of the last profile."""
        layers = {
            program.profile: sorted(layer for layer in layer_kernels(program.kernels) if layer is not None)
            for program in self.reading.programs
        }
        programs = [program for program in self.reading.programs if layers[program.profile]]
        decode = [program for program in programs if self.profile_name(program.profile) == "decode"]
        if not programs:
            return None
        program = (decode or programs)[-1]
        return program, layers[program.profile][len(layers[program.profile]) // 2]

    def document(self) -> dict[str, Any]:
        """Return the inspection as JSON values."""
        audit, sidecar, sample = self.audit, self.sidecar, self.sample
        return {
            "plan": str(self.plan),
            "size": self.size,
            "evidence": asdict(audit.evidence) | {"sentence": audit.evidence.sentence},
            "note": self.note or None,
            "backend": sidecar.backend.model_dump(mode="json") if sidecar else None,
            "bundle_sha256": sidecar.bundle_sha256 if sidecar else None,
            "targets": list(audit.targets or (sidecar.targets if sidecar else ())),
            "profiles": [profile.model_dump(mode="json") for profile in sidecar.profiles] if sidecar else None,
            "products": {"int8": audit.int8_products, "fp8": audit.fp8_products, "other": audit.other_products},
            "programs": [{"name": self.profile_name(each.profile)} | asdict(each) for each in audit.programs],
            "modules": {
                module.module: {
                    "planned": None if module.planned == UNKNOWN else module.planned,
                    "found": list(module.found),
                    "as_planned": None if module.planned == UNKNOWN else module.as_planned,
                }
                for module in self.modules
            },
            "deviations": [module.module for module in audit.deviations],
            "layer": None if sample is None else _layer_document(self, *sample),
        }


@dataclass(frozen=True)
class EngineInspection:
    """An engine: one plan, or one for prefill and one for decode."""

    plans: tuple[PlanInspection, ...]

    @property
    def proved(self) -> bool:
        """Whether no plan deviates from what was planned; so it is where no sidecar says what that was."""
        return all(plan.proved for plan in self.plans)

    def document(self) -> dict[str, Any] | list[dict[str, Any]]:
        """Return the inspection as JSON values: of one plan, or a list of those of several."""
        documents = [plan.document() for plan in self.plans]
        return documents if len(documents) > 1 else documents[0]


def inspect_plan(plan: Path, machine: Machine, *, trusted: bool = False) -> PlanInspection:
    """Read a plan, and its sidecar where there is one.

    Args:
        trusted: Load a plan of TensorRT that was not built here, too, where reading needs that.

    Raises:
        EngineError: The file cannot be read, is no plan, or would have to be loaded and is a foreign one.
    """
    reading = read_plan(plan, machine, trusted=trusted)
    sidecar, note = None, ""
    try:
        sidecar = load_sidecar(plan)
    except ArtifactError as error:
        missing = not sidecar_path(plan).exists()
        note = f"no {sidecar_path(plan).name} beside it" if missing else str(error)
        note += "; what was planned, and the profiles' names and shapes, are unknown"
    planned = {name: module.planned for name, module in sidecar.audit.modules.items()} if sidecar else {}
    reading = covering(reading, len(sidecar.profiles)) if sidecar else reading
    return PlanInspection(plan, plan.stat().st_size, sidecar, note, reading, judge(reading, planned))


def _layer_document(inspection: PlanInspection, program: ProgramReading, layer: int) -> dict[str, Any]:
    return {
        "program": inspection.profile_name(program.profile),
        "targets": list(program.targets),
        "layer": layer,
        "kernels": [asdict(kernel) for kernel in layer_kernels(program.kernels)[layer]],
    }
