"""The figures of the GPU harness: for reading, and for programs."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu.work import Bound, Call, Peaks, Work


@dataclass(frozen=True)
class MachineName:
    """Where it was measured.

    Attributes:
        target: Compute capability, e.g. `SM90`.
        memory: Of the GPU, in bytes.
        packages: Name → version of those that matter.
    """

    gpu: str
    target: str
    memory: int
    driver: str
    cpu: str
    packages: dict[str, str]


@dataclass(frozen=True)
class Timed:
    """One kind of call of one variant in one engine.

    Attributes:
        seconds: Median.
        least: The shortest.
        calls: How many were measured.
        bound: None where the GPU was not seen to multiply the format.
    """

    engine: str
    variant: str
    call: Call
    seconds: float
    least: float
    calls: int
    work: Work
    bound: Bound | None


@dataclass(frozen=True)
class TimedProduct:
    """One product of the model's shapes in torch.

    Attributes:
        rows: Of the left operand.
        linear: (out_features, in_features).
        kind: Format of the operands.
    """

    kind: str
    rows: int
    linear: tuple[int, int]
    seconds: float

    @property
    def rate(self) -> float:
        """Return operations per second."""
        return 2 * self.rows * self.linear[0] * self.linear[1] / self.seconds


@dataclass(frozen=True)
class Parity:
    """A plan's logits beside ONNX Runtime's on the same bundle.

    Attributes:
        error: Largest difference, as a part of the largest logit; infinite where a logit is not a number.
        agreement: Share of tokens whose most probable successor is the same, 0 to 1.
        tolerance: Of the error; None where it is told and not held against anything.
        least_agreement: Of the agreement.
    """

    engine: str
    variant: str
    error: float
    agreement: float
    tolerance: float | None
    least_agreement: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all logits are numbers, the error is within the tolerance and enough tokens are the same."""
        within = math.isfinite(self.error) and (self.tolerance is None or self.error <= self.tolerance)
        return within and self.agreement >= self.least_agreement


@dataclass
class Report:
    """All that was measured, and what was not, with the reason."""

    machine: MachineName
    model: str
    peaks: Peaks
    timed: list[Timed] = field(default_factory=list)
    products: list[TimedProduct] = field(default_factory=list)
    parity: list[Parity] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every plan agrees with ONNX Runtime."""
        return all(parity.passed for parity in self.parity)


def result_path(folder: Path, gpu: str, day: date) -> Path:
    """Return the place of the JSON: `NVIDIA H200` → `nvidia-h200-2026-11-22.json`."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return folder / f"{name}-{day.isoformat()}.json"


def text(report: Report) -> str:
    """Return the tables for reading."""
    machine, peaks = report.machine, report.peaks
    rates = ", ".join(f"{product} {rate / 1e12:.0f} TOP/s" for product, rate in peaks.operations.items())
    lines = [
        f"{machine.gpu} ({machine.target}, {machine.memory / 1e9:.0f} GB), {report.model}",
        f"seen at most: copy {peaks.bandwidth / 1e9:.0f} GB/s, {rates}",
        *_timed_lines(report.timed),
        *_product_lines(report.products),
        *(
            f"parity of {parity.variant} in {parity.engine}: error {parity.error:.4f}"
            + (f" (at most {parity.tolerance})" if parity.tolerance is not None else "")
            + f", same token {parity.agreement:.1%}"
            + (f" (at least {parity.least_agreement:.0%})" if parity.least_agreement else "")
            + ("" if parity.passed else " MISSED")
            for parity in report.parity
        ),
        *(f"skipped: {what}: {why}" for what, why in report.skipped.items()),
    ]
    return "\n".join(lines)


def document(report: Report) -> dict[str, Any]:
    """Return the JSON: seconds, bytes, operations."""
    result = asdict(report)
    for entry, timed in zip(result["timed"], report.timed, strict=True):
        entry["work"]["moved"] = timed.work.moved
        if timed.bound is not None:
            entry["bound"] |= {"seconds": timed.bound.seconds, "by": timed.bound.by}
        ratio = speed_up(report.timed, timed)
        entry["to_fp16"] = None if ratio is None else round(ratio, 3)
    for entry in result["parity"]:
        if not math.isfinite(entry["error"]):  # JSON has no such number
            entry["error"] = None
    return result


def write(report: Report, path: Path) -> None:
    """Write the JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def speed_up(timed: Sequence[Timed], one: Timed) -> float | None:
    """Return how many times faster than FP16 in the same engine and call, by medians; None where that is missing."""
    for other in timed:
        if (other.engine, other.variant, other.call) == (one.engine, "FP16", one.call):
            return other.seconds / one.seconds
    return None


def _timed_lines(timed: Sequence[Timed]) -> list[str]:
    if not timed:
        return []
    lines = [
        f"{'engine':16} {'variant':7} {'call':18} | {'ms':>9} {'least':>9} {'tok/s':>9} {'to FP16':>7} | {'GB/s':>6} "
        f"{'TOP/s':>6} | {'bound ms':>9} {'by':10} {'reached':>7}"
    ]
    for one in timed:
        ratio, tokens = speed_up(timed, one), one.call.batch * one.call.tokens
        limit = "" if one.bound is None else f"{one.bound.seconds * 1e3:9.3f} {one.bound.by:10} "
        rate = sum(one.work.operations.values()) / one.seconds
        reached = "" if one.bound is None else f"{one.bound.seconds / one.seconds:7.1%}"
        lines.append(
            f"{one.engine:16} {one.variant:7} {one.call.name:18} | {one.seconds * 1e3:9.3f} {one.least * 1e3:9.3f} "
            f"{tokens / one.seconds:9.0f} {'' if ratio is None else f'{ratio:6.2f}x':>7} | "
            f"{one.work.moved / one.seconds / 1e9:6.0f} {rate / 1e12:6.1f} | "
            f"{limit}{reached}".rstrip()
        )
    return lines


def _product_lines(products: Sequence[TimedProduct]) -> list[str]:
    return [
        f"torch {one.kind:8} {one.rows:6} x {one.linear[1]} x {one.linear[0]}: {one.seconds * 1e6:9.1f} us "
        f"{one.rate / 1e12:7.1f} TOP/s"
        for one in products
    ]
