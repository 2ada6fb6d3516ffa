"""`inspect PLAN`: what a plan really runs, in tables."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import Console

from spike_export.cli.inspection.module_rows import layer_and_name, rows_over_layers
from spike_export.cli.terminal.text_table import counts_in_words, print_facts, print_table, size_in_words
from spike_export.engines.audit.kernel_count import layer_kernels
from spike_export.engines.audit.reading import Kernel, ProgramReading
from spike_export.engines.plan.program_audit import ProgramAudit
from spike_export.inspection.plan import UNKNOWN, PlanInspection

_PRODUCT = "matrix product"
"""Stands for kernels that are named after their products."""

_NODES_SHOWN = 5
"""Nodes named per kernel of a table; the JSON document has them all."""


def print_plan(inspection: PlanInspection, console: Console) -> None:
    """Print the tables of a plan."""
    audit = inspection.audit
    print_facts(console, list(_facts(inspection)))
    tables = (
        ("programs", ("program", "targets", "kernels", "per layer", "attention"), _program_rows(inspection)),
        ("inputs: smallest, tuned for, largest", ("program", "input", "shapes"), _shape_rows(inspection)),
        ("weights and other constants", ("program", "format", "bytes"), _weight_rows(inspection)),
        ("linears", ("linear", "planned", "runs in", "layers", "one product with"), _linear_rows(inspection)),
        (_layer_title(inspection), ("kernel", "computes"), _kernel_rows(inspection)),
    )
    for title, columns, rows in tables:
        if rows:
            print_table(console, title, columns, rows)
    for module in audit.deviations:
        print_facts(console, [("NOT AS PLANNED", f"{module.module}: {module.planned} runs in {_joined(module.found)}")])
    print_facts(console, [("verdict", _verdict(inspection))])


def _facts(inspection: PlanInspection) -> Iterator[tuple[str, str]]:
    sidecar, audit = inspection.sidecar, inspection.audit
    yield "plan", f"{inspection.plan}, bytes: {size_in_words(inspection.size)}"
    yield "evidence", audit.evidence.sentence
    if inspection.note:
        yield "note", inspection.note
    if sidecar:
        yield "built by", f"{sidecar.backend.name} {sidecar.backend.version} ({sidecar.backend.reason})"
        yield "bundle", f"sha256 {sidecar.bundle_sha256}"
        yield "sequences", f"up to {sidecar.max_context} own tokens behind a prefix of {sidecar.prefix}"
    yield "targets", ", ".join(audit.targets or (sidecar.targets if sidecar else ())) or UNKNOWN
    if audit.readable:
        yield "products", f"{audit.int8_products} INT8, {audit.fp8_products} FP8, {audit.other_products} wider"


def _verdict(inspection: PlanInspection) -> str:
    modules, deviations = inspection.audit.modules, inspection.audit.deviations
    if not inspection.audit.readable:
        return f"nothing is proved of {len(modules)} linears" if modules else "nothing is proved"
    if not modules:
        return "what was planned is not known; see above what runs"
    if deviations:
        return f"{len(deviations)} of {len(modules)} linears do not run as planned"
    return f"all {len(modules)} linears run as planned"


def _program_rows(inspection: PlanInspection) -> list[tuple[str, ...]]:
    return [
        (
            inspection.profile_name(program.profile),
            ", ".join(program.targets),
            str(program.kernels),
            counts_in_words(program.layer_kernels),
            _attention_in_words(program),
        )
        for program in inspection.audit.programs
    ]


def _attention_in_words(program: ProgramAudit) -> str:
    fused = [f"{count} x {name}" for name, count in program.attention.items()]
    unfused = [f"{len(program.unfused_attention)} taken apart"] if program.unfused_attention else []
    return ", ".join([*fused, *unfused])


def _shape_rows(inspection: PlanInspection) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for profile in inspection.sidecar.profiles if inspection.sidecar else ():
        shapes = {
            name: "  ".join(str(list(shape)) for shape in (each.min, each.opt, each.max))
            for name, each in profile.inputs.items()
        }
        # All caches have one shape, and there are dozens.
        alike = [(shape, list(names)) for shape, names in groupby(shapes, key=lambda name: shapes[name])]
        for shape, names in alike:
            several = f"{names[0]} ... {names[-1]}" if len(names) > 2 else ", ".join(names)
            rows.append((profile.name, several, shape))
    return rows


def _weight_rows(inspection: PlanInspection) -> list[tuple[str, ...]]:
    return [
        (inspection.profile_name(program.profile), name, size_in_words(size))
        for program in inspection.audit.programs
        for name, size in sorted(program.weight_bytes.items(), key=lambda item: -item[1])
    ]


def _linear_rows(inspection: PlanInspection) -> list[tuple[str, ...]]:
    """Return one row for linears of one name with one plan and one fate, whatever their layers."""
    companions = _companions(inspection)
    facts = {
        module.module: (module.planned, _joined(module.found), companions.get(module.module, ""))
        for module in inspection.modules
    }
    return [
        (name, planned, found, layers, beside) for name, (planned, found, beside), layers in rows_over_layers(facts)
    ]


def _joined(found: Sequence[str]) -> str:
    return " and ".join(found)


def _companions(inspection: PlanInspection) -> Mapping[str, str]:
    """Return for each module that shares a product the names of the others, by program where those differ."""
    told: dict[str, dict[str, str]] = {}
    for program in inspection.audit.programs:
        for group in program.fused:
            for module in group:
                others = ", ".join(layer_and_name(other)[1].rpartition(".")[2] for other in group if other != module)
                told.setdefault(module, {})[inspection.profile_name(program.profile)] = others
    total = len(inspection.audit.programs)
    return {
        module: next(iter(by.values()))
        if len(by) == total and len(set(by.values())) == 1
        else "; ".join(f"{name}: {others}" for name, others in by.items())
        for module, by in told.items()
    }


def _layer_title(inspection: PlanInspection) -> str:
    if inspection.sample is None:
        return ""
    program, layer = inspection.sample
    count = len(layer_kernels(program.kernels)[layer])
    on = f" on {', '.join(program.targets)}" if program.targets else ""
    return f"kernels of layer {layer}, {inspection.profile_name(program.profile)}{on}: {count}"


def _kernel_rows(inspection: PlanInspection) -> list[tuple[str, ...]]:
    if inspection.sample is None:
        return []
    program, layer = inspection.sample
    return [
        (_PRODUCT if kernel.name.startswith(tuple(kernel.computes)) else kernel.name, _work_of(kernel, program))
        for kernel in layer_kernels(program.kernels)[layer]
    ]


def _work_of(kernel: Kernel, program: ProgramReading) -> str:
    if kernel.computes:
        names = " + ".join(layer_and_name(module)[1] for module in kernel.computes)
        return f"{names} ({program.precisions[kernel.computes[0]]})"
    nodes = list(dict.fromkeys(layer_and_name(node)[1] for node in kernel.nodes))
    more = f" and {len(nodes) - _NODES_SHOWN} more" if len(nodes) > _NODES_SHOWN else ""
    return ", ".join(nodes[:_NODES_SHOWN]) + more
