"""Threads of the command: how many, for every stage, and that they wait asleep unless the user says how."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from spike_export.artifacts.process.threads import VARIABLE
from spike_export.cli.repeatable import VARIABLE as REPEATABLE
from spike_export.cli.waiting import USERS_OWN, wait_asleep
from spike_export.engines.onnx_runtime.session import session_options
from tests.support.tiny.cli_models import call

PROCESSORS = os.cpu_count() or 1

TOLD = """
import os, sys
import spike_export.cli.main as command
command.run = lambda arguments: print(
    *(os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "MKL_CBWR")), "torch" in sys.modules
) or 0
command.main()
"""


@pytest.mark.parametrize("threads", ["0", "-1", "100000"])
@pytest.mark.parametrize(
    "command",
    [
        ("model", "--out", "engine.plan"),
        ("calibrate", "model", "--work-dir", "run"),
        ("export", "model", "--no-quantize", "--out", "bundle"),
        ("check", "bundle", "--reference", "model"),
        ("build", "bundle", "--out", "engine.plan"),
        ("generate", "bundle", "--prompt", "a"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_refuses_what_the_machine_cannot_run(
    command: tuple[str, ...], threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    error = call(*command, "--threads", threads).error
    assert error == (
        f"spike-export: error: {threads} threads: this machine has {PROCESSORS} processors; "
        f"give --threads 1 to {PROCESSORS}"
    )


def told(environment: dict[str, str]) -> str:
    """Return the policies that the command's libraries find, and whether torch was loaded before."""
    inherited = {name: value for name, value in os.environ.items() if name not in (*USERS_OWN, REPEATABLE)}
    return subprocess.run(
        [sys.executable, "-c", TOLD], env=inherited | environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_policy_is_there_before_torch_is() -> None:
    assert told({}) == "2000 PASSIVE AUTO,STRICT False"
    assert told({"OMP_WAIT_POLICY": "ACTIVE", REPEATABLE: "AVX2"}) == "None ACTIVE AVX2 False"


@pytest.mark.parametrize("name", USERS_OWN)
def test_the_users_own_variable_stays_alone(name: str) -> None:
    environment = {name: "5"}
    wait_asleep(environment)
    assert environment == {name: "5"}


def placed(values: torch.Tensor, offset: int) -> torch.Tensor:
    """Return float32 values at an address that is `offset` bytes behind a multiple of 64."""
    memory = np.empty(values.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    view = memory[start : start + values.nbytes].view(np.float32).reshape(values.shape)
    view[...] = values
    return torch.from_numpy(view)


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 31])  # a prefix has few: MKL divides the sums of up to seven
def test_neither_threads_nor_places_in_memory_change_a_product(rows: int) -> None:
    random, before = torch.Generator().manual_seed(rows), torch.get_num_threads()
    values, weight = (torch.randn(shape, generator=random) for shape in ((rows, 64), (64, 64)))
    products = []
    try:
        for threads in {1, PROCESSORS}:
            torch.set_num_threads(threads)
            products += [
                torch.nn.functional.linear(placed(values, left), placed(weight, right))
                for left, right in ((0, 0), (4, 0), (0, 8), (16, 48))
            ]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(product, products[0]) for product in products)


def test_sessions_use_as_many_threads_as_the_process_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    assert session_options().intra_op_num_threads == 1
    assert session_options(2).intra_op_num_threads == 2
    monkeypatch.delenv(VARIABLE)
    assert session_options().intra_op_num_threads == 0  # ONNX Runtime's own default
    assert session_options().get_session_config_entry("session.intra_op.spin_duration_us") == "50"


def test_the_help_of_every_stage_tells_of_it() -> None:
    for command in ("calibrate", "export", "check", "build", "generate"):
        assert "--threads" in call(command, "--help").out, command
