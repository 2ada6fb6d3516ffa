"""The first screen: what quantization cost, whether the limits are kept, how much is in 8 bit, and how large it is."""

from collections.abc import Mapping
from typing import Any

from spike_export.artifacts.results.check_document import Check, CheckCost
from spike_export.artifacts.visible_text import visible
from spike_export.report.check_table import NOT_MEASURED, number, percent, with_margin
from spike_export.report.facts import Facts
from spike_export.report.loaded import Loaded


def costs_by_text(check: Check | None) -> dict[str, CheckCost]:
    """Return what the shipped variant costs by the name of the text, the calibration's kind first."""
    shipped = None if check is None else check.shipped
    if check is None or shipped is None or shipped.cost is None:
        return {}
    found = {visible(check.corpus.name): shipped.cost}
    return found | {visible(text.corpus.name): text.cost for text in check.texts}


def verdict(check: Check | None) -> tuple[bool, str] | None:
    """Return whether the limits are kept, in a sentence; None where nothing was checked."""
    if check is None:
        return None
    missed = [gate for gate in check.gates if not gate.passed]
    if missed:
        names = ", ".join(visible(gate.name) for gate in missed)
        return False, f"{len(missed)} of {len(check.gates)} limits are missed: {names}."
    if check.gates:
        return True, f"All limits are kept ({len(check.gates)})."
    costs = costs_by_text(check)
    if not costs:
        return None
    most = max(cost.increase.high for cost in costs.values())
    return True, (
        "No limit was set. On every text the 95 % interval of the perplexity's increase ends at "
        f"{100 * most:+.2f} % or below."
    )


def cards(loaded: Loaded) -> Facts:
    """Return the figures that decide whether to ship, as (name, value)."""
    costs = costs_by_text(loaded.check)
    found = [(f"Perplexity, {name}", with_margin(cost.increase)) for name, cost in costs.items()]
    found += [(f"Same next token, {name}", percent(cost.top1_agreement.mean)) for name, cost in costs.items()]
    manifest = loaded.manifest or {}
    found += [("Multiply-accumulates", clause) for clause in (_shares(manifest.get("linears")),) if clause]
    for speed in loaded.speeds:
        clients = f"{speed.concurrency} client{'' if speed.concurrency == 1 else 's'}"
        found.append((f"Speed, {clients}", f"{number(speed.tokens_per_second)} tokens/s"))
    if loaded.bundle_bytes is not None:
        found.append(("Bundle", _megabytes(loaded.bundle_bytes)))
    for name, sidecar in (loaded.engine or {}).items():
        size = _plan_bytes(sidecar)
        found += [(f"Plan {visible(name)}", _megabytes(size))] if size is not None else []
    return found


def _shares(linears: Any) -> str:
    """Return how the decoder linears' multiply-accumulates are computed; empty where the manifest does not say."""
    if not isinstance(linears, dict):
        return ""
    clauses = []
    for name, share in linears.items():
        if not isinstance(share, dict) or not isinstance(share.get("mac_share"), float):
            return ""
        per_token = share.get("per_token_share") or 0.0
        kinds = f" ({per_token:.0%} with a scale per token)" if per_token else ""
        clauses.append(f"{share['mac_share']:.1%} {visible(name)}{kinds}")
    return ", ".join(clauses) or NOT_MEASURED


def _plan_bytes(sidecar: Mapping[str, Any]) -> int | None:
    plan = sidecar.get("plan")
    size = plan.get("size") if isinstance(plan, dict) else None
    return size if isinstance(size, int) else None


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
