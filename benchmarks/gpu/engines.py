"""Bundles, plans and sessions that the GPU harness measures, and what their logits are compared with."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.report import Parity, Timed
from benchmarks.gpu.torch_products import WARM_UP, gpu_seconds
from benchmarks.gpu.work import Call, Model, Peaks, Variant, bound, work
from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.manifest import Manifest, load_manifest
from spike_export.artifacts.recipe import ModulePlan, Recipe, recipe_sha256
from spike_export.engines.plan.backend import BACKENDS, FLOAT8_TARGETS, BackendName, Machine
from spike_export.engines.plan.build_options import BatchRange, BuildOptions
from spike_export.engines.plan.safety import CheckedPlan
from spike_export.engines.tensorrt.decoding import TensorRtDecoding

if TYPE_CHECKING:
    from spike_export.checkpoint.checkpoint import Checkpoint

TOLERANCES = {"FP16": 2e-2, "W8A16": 2e-2}
"""Of the logits' scale: roundings of float16 in another order."""

LEAST_AGREEMENTS = {"W8A8": 0.5, "FP8": 0.5}
"""Share of equal tokens. Where inputs are quantized, a difference in the last bit moves values over a rounding point
and grows from layer to layer, so that no bound on the logits would hold; what multiplies something else agrees by
chance only, in one token of the vocabulary."""

CONTINUED = 8
"""Tokens that are fed one by one to compare logits."""

CAPACITY_STEP = 256


@dataclass(frozen=True)
class Bundle:
    """An exported variant."""

    variant: Variant
    folder: Path
    manifest: Manifest


@dataclass
class Harness:
    """What all measurements share.

    Attributes:
        scratch: Where bundles and plans are written.
        repeats: Calls per figure.
        timed: What was measured.
        skipped: What was not → why.
    """

    model: Model
    peaks: Peaks
    machine: Machine
    scratch: Path
    repeats: int
    timed: list[Timed] = field(default_factory=list)
    parity: list[Parity] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def measure_plans(self, bundles: Sequence[Bundle], calls: Sequence[Call]) -> None:
        """Build a plan per variant and batch size with each backend, compare its logits, time it."""
        for name, bundle, batch in self._builds(bundles, sorted({call.batch for call in calls})):
            wanted = [call for call in calls if call.batch == batch]
            label = f"{name}, {bundle.variant.name}, batch {batch}"
            try:
                plan = self._build(name, bundle, batch, wanted)
                with TensorRtDecoding([plan]) as runtime:
                    self.parity.append(_compare(runtime, name, bundle, batch))
                    for call in wanted:
                        self._add(name, bundle.variant, call, _plan_seconds(runtime, call, self.repeats))
            except EngineError as error:
                self.skipped[label] = str(error)

    def measure_onnx_runtime(self, bundles: Sequence[Bundle], calls: Sequence[Call]) -> None:
        """Time ONNX Runtime's CUDA provider, where it is."""
        import onnxruntime as ort

        if "CUDAExecutionProvider" not in ort.get_available_providers():
            self.skipped["onnxruntime-gpu"] = "this onnxruntime has no CUDA; run: pip install 'spike-export[gpu]'"
            return
        for bundle in bundles:
            for call in calls:
                label = f"onnxruntime-gpu, {bundle.variant.name}, {call.name}"
                try:
                    run = _bound_cuda_call(bundle, call)
                    self._add("onnxruntime-gpu", bundle.variant, call, _host_seconds(run, self.repeats))
                except Exception as error:  # ONNX Runtime's exceptions have no common type
                    self.skipped[label] = str(error).splitlines()[0]

    def _builds(self, bundles: Sequence[Bundle], batches: Sequence[int]) -> Iterator[tuple[BackendName, Bundle, int]]:
        for name, backend in BACKENDS.items():
            if reason := obstacle(name, self.machine):
                self.skipped[backend.title] = reason
                continue
            for bundle in bundles:
                for batch in batches:
                    yield name, bundle, batch

    def _build(self, name: BackendName, bundle: Bundle, batch: int, calls: Sequence[Call]) -> CheckedPlan:
        from spike_export.engines.build.reuse import provide_engine

        assert self.machine.gpu is not None
        prompt = max(call.tokens for call in calls)
        options = BuildOptions(
            backend=name,
            targets=(self.machine.gpu.target,),
            batch=BatchRange(1, batch, batch),
            typical_prompt=prompt,
            max_prompt=prompt,
        )
        path = self.scratch / f"{name}-{bundle.variant.name.lower()}-{batch}.plan"
        engine = provide_engine(bundle.folder, path, options)
        return CheckedPlan(engine.plans[0], engine.sidecars[0])

    def _add(self, engine: str, variant: Variant, call: Call, seconds: Sequence[float]) -> None:
        needed = work(self.model, variant, call)
        median = statistics.median(seconds)
        limit = bound(needed, self.peaks)
        self.timed.append(Timed(engine, variant.name, call, median, min(seconds), len(seconds), needed, limit))


def obstacle(name: BackendName, machine: Machine) -> str | None:
    """Return why a backend cannot build and run a plan here; None where it can."""
    backend = BACKENDS[name]
    if name not in machine.installed:
        return f"not installed; run: {backend.install}"
    assert machine.gpu is not None, "without a GPU nothing is measured"
    if backend.targets and machine.gpu.target not in backend.targets:
        return f"has no target {machine.gpu.target} ({machine.gpu.name})"
    return None


def wanted_variants(variants: Sequence[Variant], target: str) -> tuple[tuple[Variant, ...], dict[str, str]]:
    """Return the variants that the GPU can multiply, and why others are left out."""
    lacking = {
        variant.name: f"{target} does not multiply FP8"
        for variant in variants
        if variant.product == "fp8" and target not in FLOAT8_TARGETS
    }
    return tuple(variant for variant in variants if variant.name not in lacking), lacking


def recipe_for(variant: Variant, recipe: Recipe) -> Recipe | None:
    """Return the recipe of a variant; None for the one without.

    The prefix is left out: with one, rows enter a static cache one by one, which times something else.

    Args:
        variant: What is to be exported.
        recipe: Static W8A8 of every linear.
    """
    if variant.name == "FP16":
        return None
    recipe = recipe.model_copy(update={"prefix": None})
    if variant.name != "W8A16":
        return recipe
    kept = ModulePlan(precision="float16", weights="int8")
    return recipe.model_copy(update={"modules": dict.fromkeys(recipe.modules, kept)})


def export_variants(
    checkpoint: "Checkpoint", recipe: Recipe, variants: Sequence[Variant], capacity: int, folder: Path
) -> list[Bundle]:
    """Export each variant with a static cache of so many tokens and logits of the last token only.

    A bundle that is there already is used again where it is of the same weights, recipe and capacity.
    """
    from spike_export.export.bundle import ExportOptions, export_bundle
    from spike_export.export.cache_options import CacheOptions

    bundles = []
    weights = checkpoint.tensors.sha256()
    for variant in variants:
        place, own = folder / variant.name.lower(), recipe_for(variant, recipe)
        options = ExportOptions(
            "float16",
            number_format="fp8" if variant.product == "fp8" else "int8",
            cache=CacheOptions("static", capacity),
            logits="last",
        )
        wanted = (weights, None if own is None else recipe_sha256(own), capacity)
        if _origin(place) != wanted:
            export_bundle(checkpoint, own, options, place)
        bundles.append(Bundle(variant, place, load_manifest(place)))
    return bundles


def _origin(place: Path) -> tuple[str, str | None, int | None] | None:
    """Return weights, recipe and capacity of the bundle at a place; None where there is none."""
    try:
        manifest = load_manifest(place)
    except ArtifactError:
        return None
    return manifest.model.checkpoint_sha256, manifest.model.recipe_sha256, manifest.capacity


def capacity_for(prompt: int, repeats: int) -> int:
    """Return the smallest multiple of `CAPACITY_STEP` with room for a prompt and all steps that are measured."""
    return -(-(prompt + WARM_UP + repeats) // CAPACITY_STEP) * CAPACITY_STEP


def _compare(runtime: TensorRtDecoding, engine: str, bundle: Bundle, batch: int) -> Parity:
    """Compare logits with ONNX Runtime's, which multiplies on the CPU."""
    from spike_export.engines.onnx_runtime.session import open_bundle

    rows = min(batch, 4)
    tokens = np.random.default_rng(0).integers(0, bundle.manifest.vocab_size, (rows, 32 + CONTINUED))
    actual = runtime.logits(tokens[:, :32], tokens[:, 32:])
    sequences = open_bundle(bundle.folder).begin(rows)
    columns = [sequences.step(tokens[:, :32]), *(sequences.step(tokens[:, [i]]) for i in range(32, tokens.shape[1]))]
    return compare(engine, bundle.variant.name, actual, np.concatenate([each[:, -1:] for each in columns], axis=1))


def compare(engine: str, variant: str, actual: NDArray[Any], expected: NDArray[Any]) -> Parity:
    """Compare logits [rows, tokens, vocab]; what is not a number counts as an error without end."""
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    scale = float(np.abs(expected).max())
    error = float(np.abs(actual - expected).max()) / scale if np.isfinite(actual).all() else float("inf")
    agreement = float((actual.argmax(-1) == expected.argmax(-1)).mean())
    return Parity(engine, variant, error, agreement, TOLERANCES.get(variant), LEAST_AGREEMENTS.get(variant, 0.0))


def _plan_seconds(runtime: TensorRtDecoding, call: Call, repeats: int) -> list[float]:
    prefill = call.phase == "prefill"
    tokens = np.random.default_rng(0).integers(0, runtime.vocab, (call.batch, call.tokens if prefill else call.past))
    prompts, added = list(tokens), 1 if prefill else WARM_UP + repeats + 1
    with runtime.queued(prompts, added) as steps:
        if prefill:
            return gpu_seconds(lambda: steps.begin(prompts, added), repeats)
        drawn = steps.begin(prompts, added).argmax(dim=-1)
        return gpu_seconds(lambda: steps.step(drawn), repeats)


def _bound_cuda_call(bundle: Bundle, call: Call) -> Callable[[], None]:
    """Return a call whose inputs and outputs stay on the GPU; it ends when the GPU has."""
    import onnxruntime as ort

    from benchmarks.speed.table import _inputs
    from spike_export.artifacts.manifest import GRAPH_FILE
    from spike_export.engines.onnx_runtime.session import session_options

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    # With its fallback ONNX Runtime would time the CPU under the GPU's name.
    session = ort.InferenceSession(
        bundle.folder / GRAPH_FILE, session_options(), providers=providers, enable_fallback=0
    )
    if session.get_providers()[0] != providers[0]:
        raise EngineError("ONNX Runtime could not start its CUDAExecutionProvider; are the CUDA libraries there?")
    binding = session.io_binding()
    binding.bind_output("logits", "cuda")
    for name, value in _inputs(session, bundle.manifest, call.tokens, call.past).items():
        rows = value if name == "fresh" else np.repeat(value, call.batch, axis=0)
        placed = ort.OrtValue.ortvalue_from_numpy(rows, "cuda", 0)
        binding.bind_ortvalue_input(name, placed)
        if name.startswith("past_key_values."):
            binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), placed)
    return lambda: session.run_with_iobinding(binding)


def _host_seconds(run: Callable[[], None], repeats: int) -> list[float]:
    for _ in range(WARM_UP):
        run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds
