"""The main job on a mixture of experts, from a directory to a plan and a report; the planted expert is kept."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.recipe import load_recipe
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.statistics.measure import measure_spikes
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import is_router
from spike_export.engines.plan.backend import TENSORRT_RTX
from spike_export.engines.plan.sidecar import load_sidecar
from spike_export.report.figures.spike_map import spike_map
from spike_export.report.spiking_tokens import spiking_tokens
from tests.calibration.methods.test_planted_mixture import EXPERTS, PLANTED, SPIKING, planted_mixture
from tests.support.tiny.checkpoints import PLANTED_LAYER, VOCAB, write_tokenizer, write_weights
from tests.support.tiny.cli_models import SMALL, Outcome, call, write_corpus
from tests.support.tiny.families import MIXTURES, tiny_family, tokens, with_unreached_expert

pytestmark = pytest.mark.usefixtures("one_thread")


def write_mixture(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write an HF directory; return it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(checkpoint.config.hf)))
    write_tokenizer(folder)
    names = checkpoint.tensors.shapes
    write_weights(folder, {name: torch.from_numpy(checkpoint.tensor(name).copy()) for name in names})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixture")


@pytest.fixture(scope="module")
def finished(folder: Path) -> Outcome:
    write_mixture(folder / "model", planted_mixture())
    corpus = write_corpus(folder / "corpus.txt")
    options = ("--no-qfep", "--no-smoothing", "--max-fp16-modules", "1", "--activation-range", "max")
    build = ("--backend", "tensorrt-rtx", "--target", "SM86")
    return call(folder / "model", "--out", folder / "e.plan", "--corpus", corpus, *SMALL, *options, *build)


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)


@needs_compiler
def test_the_job_keeps_the_planted_expert_all_the_way_to_the_plan(folder: Path, finished: Outcome) -> None:
    assert finished.code == 0, finished.err
    recipe = load_recipe(folder / "e.plan.run" / "recipe.json")
    assert recipe.kept_linears() == (PLANTED,)
    assert recipe.modules[PLANTED].precision == "float16"
    routers = [plan.precision for name, plan in recipe.modules.items() if is_router(name)]
    assert routers == ["float32"] * 3
    linears = load_manifest(folder / "e.plan.run" / "bundle").linears
    assert {kind: share.modules for kind, share in linears.items()} == {
        "float16": 1,
        "float32": 3,
        "int8": 3 * (4 + 3 * EXPERTS) - 1,
    }
    # A third of a layer's experts' work is in the down projections, of which a token needs two of four.
    down, attention, router = 96 * 64, 64 * (64 + 32 + 32 + 64), 64 * EXPERTS
    whole = 3 * (attention + router + 2 * 3 * down)
    assert linears["float16"].mac_share == pytest.approx(down / 2 / whole)
    audit = load_sidecar(folder / "e.plan").audit
    assert audit is not None
    assert audit.modules[PLANTED].found == ("float16",)
    others = {module.found for name, module in audit.modules.items() if ".experts." in name and name != PLANTED}
    assert others == {("int8",)}


@needs_compiler
def test_inspect_and_report_speak_of_experts(folder: Path, finished: Outcome) -> None:
    assert finished.code == 0, finished.err
    run = folder / "e.plan.run"
    text = call("inspect", run).out
    assert PLANTED in text
    explained = call("inspect", run, "--explain", PLANTED.replace("w2", "w1"))
    assert explained.code == 0
    assert "does not exceed alpha" in explained.out
    assert "largest tokens" in explained.out  # those of w3, which stands for w1
    router = call("inspect", run, "--explain", f"model.layers.{PLANTED_LAYER}.block_sparse_moe.gate")
    assert "never quantized" in router.out
    report = (run / "report.html").read_text(encoding="utf-8")
    assert PLANTED in report
    assert ">nan<" not in report


def test_the_figures_of_a_mixture_leave_out_what_an_expert_did_not_see() -> None:
    checkpoint = tiny_family("mixtral").checkpoint
    statistics = measure_spikes(Decoder(checkpoint), tokens())
    drawn = spike_map(statistics)
    assert drawn is not None
    assert np.isfinite(drawn.amax).all()
    downs = [f"model.layers.1.block_sparse_moe.experts.{expert}.w2" for expert in range(4)]
    whole = np.stack([np.nan_to_num(statistics.modules[name].token_amax) for name in downs]).max(axis=(0, 1))
    np.testing.assert_array_equal(drawn.amax[1], whole)
    listed = spiking_tokens(statistics)
    assert listed
    assert np.isfinite([token.ratio for token in listed]).all()


def test_the_report_names_the_planted_experts_token() -> None:
    checkpoint = planted_mixture()
    windows = np.random.default_rng(0).integers(3, VOCAB, (4, 24))
    windows[:, 0], windows[:, 9] = 0, SPIKING
    first = spiking_tokens(measure_spikes(Decoder(checkpoint), windows))[0]
    assert (first.module, first.token_id, first.position) == (PLANTED, SPIKING, 9)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_directory_is_exported_without_a_recipe(tmp_path: Path, name: str) -> None:
    model = write_mixture(tmp_path / "model", tiny_family(name, vocab_size=VOCAB, num_hidden_layers=1).checkpoint)
    outcome = call("export", model, "--no-quantize", "--out", tmp_path / "b")
    assert outcome.code == 0, outcome.err
    manifest = load_manifest(tmp_path / "b")
    assert manifest.model.architecture == name
    assert manifest.linears["float32"].modules == 1  # the router


def test_calibrate_says_that_an_expert_saw_no_token(tmp_path: Path) -> None:
    checkpoint = tiny_family("mixtral", vocab_size=VOCAB, num_hidden_layers=2, num_experts_per_tok=1).checkpoint
    corpus = ("--corpus", write_corpus(tmp_path / "corpus.txt"), *SMALL)
    method = ("--no-qfep", "--no-smoothing", "--no-qfem", "--activations", "static")
    notes, counts = {}, {}
    for name, model in {"all": checkpoint, "one less": with_unreached_expert(checkpoint, 1)}.items():
        folder = write_mixture(tmp_path / f"{name} model", model)
        outcome = call("calibrate", folder, "--work-dir", tmp_path / name, *corpus, *method)
        assert outcome.code == 0, outcome.err
        lines = outcome.out.splitlines()
        notes[name] = [line for line in lines if line.startswith("note: ")]
        counts[name] = next(line for line in lines if " linears in " in line)
    note = "note: 3 linears of experts stay in float32: calibration routed no token to them; give more samples"
    assert notes == {"all": [], "one less": [note]}
    assert counts == {
        "all": "0 of 34 linears in float16, no prefix, activations static",
        "one less": "0 of 34 linears in float16, 3 of 34 linears in float32, no prefix, activations static",
    }
