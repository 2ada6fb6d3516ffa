from dataclasses import replace
from typing import get_args

import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.engines.plan.backend import (
    TENSORRT,
    TENSORRT_RTX,
    BackendChoice,
    BackendName,
    Gpu,
    Machine,
    PlanFeature,
    choose_backend,
    installed_version,
    require_features,
    resolve_targets,
)

H200 = Gpu("NVIDIA H200", "SM90")
RTX4090 = Gpu("NVIDIA GeForce RTX 4090", "SM89")


def machine(*installed: BackendName, gpu: Gpu | None = None) -> Machine:
    return Machine(frozenset(installed), gpu)


@pytest.mark.parametrize(
    ("there", "expected", "because"),
    [
        (machine("tensorrt", "tensorrt-rtx", gpu=H200), "tensorrt", "there is a GPU (NVIDIA H200)"),
        (machine("tensorrt", gpu=H200), "tensorrt", "there is a GPU (NVIDIA H200)"),
        (machine("tensorrt", "tensorrt-rtx"), "tensorrt-rtx", "no NVIDIA GPU"),
        (machine("tensorrt-rtx"), "tensorrt-rtx", "no NVIDIA GPU"),
        (machine("tensorrt-rtx", gpu=RTX4090), "tensorrt-rtx", "TensorRT is not installed"),
        (machine("tensorrt-rtx", gpu=H200), "tensorrt-rtx", "will not run on this machine's NVIDIA H200"),
    ],
)
def test_auto_takes_tensorrt_only_with_a_gpu(there: Machine, expected: str, because: str) -> None:
    chosen = choose_backend("auto", there)
    assert chosen.backend.name == expected
    assert because in chosen.reason


@pytest.mark.parametrize(
    ("choice", "there", "message"),
    [
        ("auto", machine(), "neither is installed; run: pip install 'spike-export[rtx]'"),
        ("auto", machine("tensorrt"), "there is no NVIDIA GPU; run: pip install 'spike-export[rtx]'"),
        ("tensorrt", machine("tensorrt-rtx"), "not installed; run: pip install 'spike-export[tensorrt]'"),
        ("tensorrt-rtx", machine("tensorrt"), "not installed; run: pip install 'spike-export[rtx]'"),
        ("tensorrt", machine("tensorrt"), "no NVIDIA GPU was found"),
    ],
)
def test_a_backend_that_cannot_build_is_refused_with_the_remedy(
    choice: BackendChoice, there: Machine, message: str
) -> None:
    with pytest.raises(EngineError) as caught:
        choose_backend(choice, there)
    assert message in str(caught.value)


def test_rtx_targets_have_a_default_and_ignore_case_and_duplicates() -> None:
    assert resolve_targets(TENSORRT_RTX, (), None) == ("SM80", "SM86", "SM89", "SM120")
    assert resolve_targets(TENSORRT_RTX, ("sm86", "SM75", "SM86"), H200) == ("SM86", "SM75")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("SM90", "cannot target SM90; build with --backend tensorrt on the machine with that GPU"),
        ("SM61", "unknown target 'SM61'; TensorRT-RTX knows SM75, SM80, SM86, SM89, SM120, SM121"),
    ],
)
def test_rtx_refuses_targets_it_does_not_have(target: str, message: str) -> None:
    with pytest.raises(EngineError) as caught:
        resolve_targets(TENSORRT_RTX, ("SM86", target), None)
    assert message in str(caught.value)


def test_tensorrt_builds_for_the_gpu_at_hand_only() -> None:
    assert resolve_targets(TENSORRT, (), H200) == ("SM90",)
    assert resolve_targets(TENSORRT, ("sm90",), H200) == ("SM90",)
    with pytest.raises(EngineError, match=r"builds for the GPU of this machine \(SM90\), not for SM86"):
        resolve_targets(TENSORRT, ("SM86",), H200)


@pytest.mark.parametrize(
    ("feature", "gpu", "message"),
    [
        ("timing_cache", RTX4090, "cannot build with --timing-cache: it builds without timing kernels"),
        ("hardware_compatible", RTX4090, "give several --target instead"),
        ("version_compatible", RTX4090, "build one plan per release"),
        ("refit", None, "cannot build with --refit: .* on a GPU only"),
        ("strip_weights", None, "cannot build with --strip-weights: .* on a GPU only"),
    ],
)
def test_rtx_refuses_what_it_cannot_do_with_the_reason(feature: PlanFeature, gpu: Gpu | None, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        require_features(TENSORRT_RTX, frozenset({feature, "weight_streaming"}), gpu)


def test_what_a_backend_can_do_is_not_refused() -> None:
    everything: frozenset[PlanFeature] = frozenset(get_args(PlanFeature))
    assert require_features(TENSORRT, everything, H200) is None
    assert require_features(TENSORRT_RTX, frozenset({"refit", "strip_weights"}), RTX4090) is None
    assert require_features(TENSORRT_RTX, frozenset({"weight_streaming"}), None) is None


def test_a_machine_knows_its_backend_s_versions() -> None:
    told = Machine(frozenset({"tensorrt"}), H200, {"tensorrt": "11.4.0.106"})
    assert told.version("tensorrt") == "11.4.0.106"
    nothing = replace(TENSORRT, module="no_such_bindings", packages=("no-such-package",))
    assert installed_version(nothing) is None
