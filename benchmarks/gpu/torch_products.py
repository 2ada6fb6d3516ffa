"""What torch reaches on this GPU: a copy and products as large as it likes, and the model's own products."""

import statistics
from collections.abc import Callable, Sequence
from itertools import cycle, pairwise

import torch

from benchmarks.gpu.report import TimedProduct
from benchmarks.gpu.work import Model, Peaks, Product

WARM_UP, _REPEATS = 3, 11
"""Calls before the first that counts, and those that do."""

_COPY_BYTES = 1 << 30
_SIDE = 8192
"""Of the square products that show the peak."""

_LEAST_INT8_ROWS = 32
"""`torch._int_mm` takes more than 16 rows."""

_FAR_APART = 512 << 20
"""Bytes of weights between two uses of one, so that it is not found in the GPU's cache again."""

_MOST_COPIES = 64

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gpu_seconds(work: Callable[[], object], repeats: int = _REPEATS) -> list[float]:
    """Return how long each of several calls took on the GPU, in seconds; launches of the next overlap."""
    for _ in range(WARM_UP):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    marks[-1].synchronize()
    return [first.elapsed_time(second) / 1e3 for first, second in pairwise(marks)]


def peaks(device: torch.device) -> tuple[Peaks, dict[str, str]]:
    """Measure bandwidth and arithmetic; return also which formats could not be multiplied, and why."""
    free, _ = torch.cuda.mem_get_info(device)
    size = min(_COPY_BYTES, free // 4)
    copy = _copy_seconds(size, device)
    rates: dict[Product, float] = {}
    missing: dict[str, str] = {}
    for kind in MULTIPLIERS:
        try:
            seconds = product_seconds(kind, _SIDE, (_SIDE, _SIDE), device)
        except RuntimeError as error:  # the GPU or this torch cannot
            missing[f"torch products in {kind}"] = str(error).splitlines()[0]
            continue
        rates[kind] = 2 * _SIDE**3 / seconds
    return Peaks(2 * size / copy, rates), missing


def _copy_seconds(size: int, device: torch.device) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return min(gpu_seconds(lambda: target.copy_(source)))


def model_products(
    model: Model, rows: Sequence[int], kinds: Sequence[Product], device: torch.device
) -> tuple[list[TimedProduct], dict[str, str]]:
    """Time each different linear of the model for every number of rows; return also what torch refused, and why."""
    timed: list[TimedProduct] = []
    refused: dict[str, str] = {}
    for linear in dict.fromkeys(model.linears):
        for count in rows:
            for kind in kinds:
                used = max(count, _LEAST_INT8_ROWS) if kind == "int8" else count
                try:
                    timed.append(TimedProduct(kind, used, linear, product_seconds(kind, used, linear, device)))
                except RuntimeError as error:  # a shape that this kernel does not take, or too little memory
                    refused[f"torch {kind}, {used} x {linear[1]} x {linear[0]}"] = str(error).splitlines()[0]
    return timed, refused


def product_seconds(kind: Product, rows: int, linear: tuple[int, int], device: torch.device) -> float:
    """Return the median time of [rows, in_features] times a weight of [out_features, in_features].

    Raises:
        RuntimeError: The GPU, or this torch, cannot.
    """
    make, multiply = MULTIPLIERS[kind]
    outputs, inputs = linear
    left = make((rows, inputs), device)
    # Weights lie as a checkpoint has them; the transpose is what cuBLAS wants for 8-bit operands.
    first = make((outputs, inputs), device)
    copies = min(-(-_FAR_APART // (first.numel() * first.element_size())), _MOST_COPIES)
    rights = cycle([first.t(), *(first.clone().t() for _ in range(copies - 1))])
    return statistics.median(gpu_seconds(lambda: multiply(left, next(rights))))


def _half(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float16, device=device)


def _int8(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


def _fp8(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device).to(torch.float8_e4m3fn)


def _scaled(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    one = torch.ones((), device=left.device)
    result: torch.Tensor = torch._scaled_mm(left, right, one, one, out_dtype=torch.float16)
    return result


MULTIPLIERS: dict[Product, tuple[Callable[[tuple[int, int], torch.device], torch.Tensor], Multiply]] = {
    "float16": (_half, torch.matmul),
    "int8": (_int8, torch._int_mm),
    "fp8": (_fp8, _scaled),
}
"""Format → how an operand is made, and how two are multiplied."""
