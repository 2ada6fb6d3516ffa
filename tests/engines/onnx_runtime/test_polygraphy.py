"""Polygraphy reduces a bundle's graph to the nodes that show a fault, on a CPU."""

import sys
from pathlib import Path

import onnx
import pytest

from spike_export.artifacts.manifest import GRAPH_FILE
from spike_export.checkpoint.modules import linears
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.tiny.models import tiny_llama, tiny_recipe

CULPRIT = "model.layers.1.mlp.down_proj.MatMul"


@pytest.mark.usefixtures("one_thread")
def test_reduce_finds_the_node_that_a_check_complains_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = pytest.importorskip("polygraphy.tools", reason="Polygraphy is not installed: pip install polygraphy")
    pytest.importorskip("onnx_graphsurgeon", reason="debug reduce needs it: pip install onnx-graphsurgeon")
    model = tiny_llama()
    recipe = tiny_recipe(model.checkpoint, dict.fromkeys(linears(model.checkpoint.config), 0.05))
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    complains = f"! grep -q {CULPRIT} polygraphy_debug.onnx"
    words = ["debug", "reduce", f"bundle/{GRAPH_FILE}", "-o", "reduced.onnx", "--mode", "bisect"]
    words += ["--data-loader-script", "bundle/data_loader.py"]
    monkeypatch.setattr(sys, "argv", ["polygraphy", *words, "--check", "sh", "-c", complains])
    assert tools.main() == 0
    whole = onnx.load(tmp_path / "bundle" / GRAPH_FILE, load_external_data=False).graph.node
    nodes = [node.name for node in onnx.load(tmp_path / "reduced.onnx", load_external_data=False).graph.node]
    assert CULPRIT in nodes
    assert len(nodes) < len(whole) / 4
