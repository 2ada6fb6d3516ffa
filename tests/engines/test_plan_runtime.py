"""A plan is opened like a bundle: with its bundle's tokenizer, and after all questions to it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import load_manifest
from spike_export.engines import plan_runtime
from spike_export.engines.engine import Engine
from spike_export.engines.plan.backend import Machine, find_gpu
from spike_export.engines.plan.paths import plan_paths
from spike_export.engines.plan.safety import CheckedPlan
from spike_export.engines.plan_runtime import is_plan
from spike_export.engines.tensorrt import decoding as trt_decoding
from spike_export.engines.tensorrt import engines as trt_engines
from spike_export.engines.tensorrt.decoding import TensorRtDecoding
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.engines.test_engine import exported
from tests.support.tiny.cli_models import call
from tests.support.tiny.models import TinyModel, tiny_llama
from tests.support.trt_simulation import Simulation, simulate

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["AB", "SOMETHING LONGER", "C"]
SAMPLED = {
    "max_new_tokens": 12,
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 40,
    "repetition_penalty": 1.3,
    "seed": 5,
}


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_llama(max_positions=96)


@pytest.fixture(scope="module")
def bundle(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a plan, where the main job has it."""
    folder = tmp_path_factory.mktemp("job") / "engine.plan.run"
    folder.mkdir()
    return exported(model, folder, prefix=(1, 7))


def pretended(monkeypatch: pytest.MonkeyPatch, bundle: Path, context: int = 64) -> tuple[Simulation, CheckedPlan]:
    """A plan beside its run that may be loaded, and a GPU that pretends."""
    simulation = simulate(monkeypatch, bundle.parent.parent)
    plan = simulation.plan(bundle, "prefill", "decode", context=context, prompt=32)
    asked: list[tuple[Path, Path]] = []

    def usable(engine: Path, given: Path, machine: Machine, progress: Any) -> tuple[CheckedPlan, ...]:
        asked.append((engine, given))
        return (plan,)

    monkeypatch.setattr(plan_runtime, "usable_engine", usable)
    monkeypatch.setattr(trt_decoding, "CudaDevice", lambda _: simulation.device)
    return simulation, plan


@pytest.mark.parametrize("options", [{"max_new_tokens": 12}, SAMPLED], ids=["greedy", "sampled"])
def test_a_plan_says_what_its_bundle_says(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    _, plan = pretended(monkeypatch, bundle)
    expected = Engine.open(bundle, threads=1).generate(PROMPTS, **options)
    with Engine.open(plan.path, bundle=bundle) as engine:
        assert isinstance(engine.decoding, TensorRtDecoding)
        found = engine.generate(PROMPTS, **options)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert [each.text for each in found] == [each.text for each in expected]


def test_the_command_takes_the_bundle_beside_the_plan(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    _, plan = pretended(monkeypatch, bundle)
    engine = bundle.parent.parent / "engine.plan"
    engine.write_bytes(plan.path.read_bytes())
    arguments = ("--prompt", "AB", "--max-new-tokens", "5", "--ignore-eos")
    told = call("generate", engine, *arguments)
    assert (told.code, told.err) == (0, "")
    assert told.out == call("generate", bundle, "--threads", "1", *arguments).out


def test_a_stale_plan_is_rebuilt_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    _, plan = pretended(monkeypatch, bundle)
    rebuilt: list[Path] = []

    def again(engine: Path, given: Path, progress: Any) -> tuple[CheckedPlan, ...]:
        rebuilt.append(given)
        return (plan,)

    monkeypatch.setattr("spike_export.engines.build.rebuild.usable_or_rebuilt_engine", again)
    Engine.open(plan.path, bundle=bundle)
    assert rebuilt == []
    Engine.open(plan.path, bundle=bundle, rebuild=True)
    assert rebuilt == [bundle]


def test_the_backend_is_asked_before_a_plan_is_loaded(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    simulation, plan = pretended(monkeypatch, bundle)

    def invalid(*_: Any) -> None:
        raise EngineError("cuda driver too old")

    monkeypatch.setattr(trt_engines, "require_valid_header", invalid)
    with pytest.raises(EngineError, match="driver too old"):
        Engine.open(plan.path, bundle=bundle)
    assert simulation.trt.engines == []


def test_weights_that_were_left_out_are_put_back_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    _, plan = pretended(monkeypatch, bundle)
    put: list[tuple[Path, int]] = []

    def put_back(trt: Any, engine: Any, logger: Any, source: Path, sidecar: Any) -> bool:
        put.append((source, len(engine.contexts)))
        return True

    monkeypatch.setattr(trt_engines, "put_weights_back", put_back)
    Engine.open(plan.path, bundle=bundle)
    assert put == [(bundle, 0)]


def test_a_batch_that_the_plan_was_not_built_for(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    simulation, plan = pretended(monkeypatch, bundle)
    engine = Engine.open(plan.path, bundle=bundle)
    with pytest.raises(EngineError, match="a batch of 5 was given and the plan was built for 1 to 4 sequences"):
        engine.generate(["A"] * 5)
    with pytest.raises(EngineError, match=r"takes a context of 65, and the plan was built for 64"):
        engine.generate(np.full(2, 7), max_new_tokens=64)
    assert simulation.trt.runs == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threads", "2"), "threads was given, but {plan} runs in TensorRT; leave it out"),
        (("--provider", "cpu"), "provider was given, but {plan} runs in TensorRT; leave it out"),
        (("--speculate", "ngram"), "speculate was given, but {plan} runs in TensorRT; leave it out"),
        (("--weights-copy", "auto"), "a copy of the weights was given, but {plan} runs in TensorRT; leave it out"),
        (("--no-lowering",), "lowering was given, but {plan} runs in TensorRT; leave it out"),
        ((), "the plan needs the tokenizer of the bundle that it was built from, and {plan}.run/bundle is not there"),
        (("--bundle", "nowhere"), "nowhere"),
        (("--bundle", "{bundle}"), "not a TensorRT or TensorRT-RTX plan"),
    ],
    ids=str,
)
def test_bad_input(bundle: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    plan = tmp_path / "other.plan"
    plan.write_bytes(b"no plan" * 30)
    given = (each.format(bundle=bundle) for each in arguments)
    assert message.format(plan=plan) in call("generate", plan, "--prompt", "a", *given).error


@pytest.mark.parametrize("name", ["e.plan", "e.engine", "e"])
def test_an_engine_is_told_from_a_bundle_whatever_its_ending(tmp_path: Path, name: str) -> None:
    engine = tmp_path / name
    assert is_plan(engine) == (engine.suffix == ".plan")
    halves = plan_paths(engine, split=True)
    halves[1].write_bytes(b"")
    assert is_plan(engine)
    assert f"{halves[0].name} is missing" in call("inspect", engine).error
    halves[1].unlink()
    engine.write_bytes(b"")
    assert is_plan(engine)
    engine.unlink()
    engine.mkdir()
    assert not is_plan(engine)


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    assert "no such plan" in call("generate", tmp_path / "engine.plan", "--prompt", "a").error


def test_options_of_plans_mean_nothing_to_a_bundle(bundle: Path) -> None:
    for option in (
        ("--rebuild",),
        ("--bundle", str(bundle)),
        ("--gpu", "0"),
        ("--weight-budget", "auto"),
        ("--no-cuda-graphs",),
        ("--plan-also", "other.plan"),
    ):
        outcome = call("generate", bundle, "--prompt", "A", *option)
        assert (outcome.code, outcome.out) == (2, "")
        assert f"was given, but {bundle} is no engine plan; leave it out" in outcome.err.splitlines()[-1]


def test_how_a_plan_is_run_can_be_said(
    monkeypatch: pytest.MonkeyPatch, model: TinyModel, tmp_path: Path, bundle: Path
) -> None:
    cache = CacheOptions("static", 32)
    static = tmp_path / "job" / "bundle"
    export_bundle(model.checkpoint, None, ExportOptions("float32", cache=cache), static)
    for file in bundle.iterdir():
        if not (static / file.name).exists():  # all that the tokenizer needs
            shutil.copy(file, static)
    simulation, plan = pretended(monkeypatch, static, context=32)
    simulation.trt.streamable = 500
    arguments = (plan.path, "--bundle", static, "--prompt", "A", "--max-new-tokens", "4")
    for options, budget, captures in (
        ((), 500, 1),
        (("--weight-budget", "100", "--no-cuda-graphs"), 100, 0),
        (("--weight-budget", "auto"), 250, 1),
    ):
        simulation.device.log.clear()
        outcome = call("generate", *arguments, "--ignore-eos", *options)
        assert (outcome.code, outcome.err) == (0, "")
        assert simulation.trt.engines[-1].weight_streaming_budget_v2 == budget
        assert simulation.device.log.count("capture") == captures
    assert "weight_budget is -5; expected 0 bytes or more" in call("generate", *arguments, "--weight-budget=-5").error
    assert "--rebuild builds on the first GPU" in call("generate", *arguments, "--rebuild", "--gpu", "99").err
    assert "there is no GPU number 99" in call("generate", *arguments, "--gpu", "99").error


def test_of_several_plans_the_smallest_that_has_room_runs(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, tmp_path: Path
) -> None:
    simulation, _ = pretended(monkeypatch, bundle)
    contexts = {"long.plan": 64, "short.plan": 16}
    paths = [tmp_path / name for name in (*contexts, "broken.plan")]
    for path in paths:
        path.write_bytes(b"")

    def usable(engine: Path, given: Path, machine: Machine, progress: Any) -> tuple[CheckedPlan, ...]:
        if engine.name not in contexts:
            raise EngineError("broken")
        return (simulation.plan(given, "prefill", "decode", context=contexts[engine.name], prompt=8),)

    monkeypatch.setattr(plan_runtime, "usable_engine", usable)
    free = simulation.device.free_bytes()
    with Engine.open(paths[:2], bundle=bundle) as engine:
        long, short = simulation.trt.engines
        for count, used, idle in ((4, short, long), (30, long, short)):
            used.runs = idle.runs = 0
            engine.generate("AB", max_new_tokens=count, ignore_eos=True)
            assert (used.runs, idle.runs) == (count, 0)
    assert simulation.device.free_bytes() == free
    with pytest.raises(EngineError, match="broken"):
        Engine.open(paths, bundle=bundle)
    assert simulation.device.free_bytes() == free
    told = call("generate", paths[0], "--plan-also", paths[1], "--bundle", bundle, "--prompt", "AB", "--ignore-eos")
    assert "the plan was built for 64" in told.error


def test_a_plan_without_a_gpu(monkeypatch: pytest.MonkeyPatch, model: TinyModel, tmp_path: Path) -> None:
    """A real plan, on a machine that cannot run it: one line, from the command too."""
    if find_gpu() is not None:
        pytest.skip("there is a GPU")
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'spike-export[rtx]'")
    folder = tmp_path / "engine.plan.run" / "bundle"
    folder.parent.mkdir()
    cache = CacheOptions("static", 32)
    export_bundle(model.checkpoint, None, ExportOptions("float16", cache=cache), folder)
    assert load_manifest(folder).capacity == 32
    # The tokenizer is asked for first, so that a plan without one is not even hashed.
    built = call("build", folder, "--out", tmp_path / "engine.plan", "--target", "SM86", "--allow-fallback")
    assert built.code == 0, built.err
    assert "tokenizer.json: this file is missing" in call("generate", tmp_path / "engine.plan", "--prompt", "a").error
    from spike_export.engines.plan_runtime import open_plans

    with pytest.raises(EngineError, match="needs an NVIDIA GPU, and there is none here"):
        open_plans([tmp_path / "engine.plan"], folder)
