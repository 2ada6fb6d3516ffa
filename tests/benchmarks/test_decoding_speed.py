"""What the benchmarks of decoding compare computes what they say, over a small bundle."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed import batches, lowering, weight_only_products
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.tiny.models import input_scales, tiny_llama, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread", "denormals_as_before")

SMALL = ("--rounds", "1", "--steps", "2", "--threads", "1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = tiny_llama(), tmp_path_factory.mktemp("speed") / "bundle"
    scales = input_scales(model, np.random.default_rng(0).integers(3, 99, (2, 12)))
    options = ExportOptions("float32", logits="last", cache=CacheOptions("static", 40))
    export_bundle(model.checkpoint, tiny_recipe(model.checkpoint, scales), options, folder)
    return folder


def test_graphs_are_compared_by_their_steps(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lowering.main([str(bundle), "--rows", "1", "2", "--contexts", "5", *SMALL])
    assert len(re.findall(r"decode \d+\.\d\d x, \d+\.\d\d x", capsys.readouterr().out)) == 2
    weight_only_products.main([str(bundle), "--rows", "2", "--context", "5", "--blocks", "16", *SMALL])
    assert re.match(r"  2 rows \| INT8: .* ms, 1\.00 x \| blocks of 16: .* x\n$", capsys.readouterr().out)


def test_batches_of_several_bundles(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches.main([str(bundle), str(bundle), "--rows", "1", "3", "--context", "6", *SMALL])
    assert len(re.findall(r"^ +[13] \| bundle \| ", capsys.readouterr().out, re.MULTILINE)) == 4
    assert batches.lengths(3, 6) == [3, 6, 9]
