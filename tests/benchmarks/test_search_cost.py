"""The benchmark of the search on a tiny model: on what it compares, what the grid holds, and that it ends."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy.table import unquantized_perplexity
from benchmarks.stages import search_cost
from benchmarks.stages.search_cost import STRENGTHS, Unseen
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.methods.context import Calibration
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.checkpoint.modules import input_sites
from tests.support.tiny.families import tiny_family, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    content = tokens(rows=18, length=24)
    options = CalibrationOptions(samples=12, length=25, dtype="float32")
    return Calibration(tiny_family("llama").checkpoint, TokenWindows(content[:12], content[12:]), options)


def test_the_winners_are_judged_on_windows_that_no_step_saw(calibration: Calibration) -> None:
    unseen = Unseen.of(calibration)
    assert unseen.model is calibration.model
    np.testing.assert_array_equal(unseen.search_windows, calibration.windows.evaluation)
    perplexity = unseen.reference_perplexity(())
    assert perplexity == pytest.approx(unquantized_perplexity(calibration, ()), rel=1e-5)  # float32, other batches
    assert abs(perplexity / calibration.reference_perplexity(()) - 1) > 1e-3


def test_the_grid_is_every_combination_of_strengths(calibration: Calibration) -> None:
    transforms = list(search_cost.grid(calibration, calibration.measure(())))
    sites = input_sites(calibration.checkpoint.config)
    found = []
    for transform in transforms:
        assert len(transform.smoothing) == 4 * len(sites)
        parameters = {name: plan.parameter for name, plan in transform.smoothing.items()}
        norms, down, attention = (
            {parameter for name, parameter in parameters.items() if name.endswith(linears)}
            for linears in (("q_proj", "up_proj"), "down_proj", "o_proj")
        )
        found += itertools.product(norms, down, attention)
    assert len(found) == len(transforms) == 27
    assert set(found) == set(itertools.product(STRENGTHS, repeat=3))


def test_all_steps_are_run_and_told(
    tmp_path: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("smollm2_path", "open_checkpoint", "table_calibration"):
        monkeypatch.setattr(search_cost, name, lambda *_: None)
    monkeypatch.setattr(search_cost, "job_calibration", lambda *_: calibration)
    search_cost.main(["--json", str(tmp_path / "figures.json")])
    costs = json.loads((tmp_path / "figures.json").read_text())
    steps = ["calibration pass", "prefix", "smoothing", "modules", "naive grid of 27 smoothings"]
    assert [cost["step"] for cost in costs] == steps
    assert [line[:32].strip() for line in capsys.readouterr().out.splitlines()] == steps
    assert costs[0]["forward_tokens"] == 12 * 25
    assert all(cost["forward_tokens"] > 0 for cost in costs)
    for cost in costs:
        judged = cost["step"] in ("smoothing", "naive grid of 27 smoothings")
        assert [cost[key] is not None for key in ("chosen_by", "perplexity", "divergence")] == [judged] * 3
        assert not judged or min(cost["chosen_by"], cost["divergence"]) > 0
