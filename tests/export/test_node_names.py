"""The names of nodes and stored tensors are an interface.

Audits of plans, refits and the rewriting of bundles look nodes and weights up by name; so do users of a profiler.
node_names.txt lists them all. Change the file where a name is to change, and say so in the changelog.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from spike_export.artifacts.recipe import AttentionPlan, ModulePlan
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import is_router, linears
from spike_export.export.cache_options import CacheOptions
from spike_export.export.decoder.decoder_graph import build_decoder
from spike_export.export.graph_plan import GraphPlan
from tests.support.ropes import ROPES
from tests.support.tiny.families import MIXTURES, NAMES, tiny_family
from tests.support.tiny.models import tiny_llama

LISTED = Path(__file__).parent / "node_names.txt"

HALF = ModulePlan(precision="float16")
STATIC = ModulePlan(precision="int8", activation_scale=0.1)
PER_TOKEN = ModulePlan(precision="int8", activations="per-token")
WEIGHTS = ModulePlan(precision="float16", weights="int8")
FLOAT8 = ModulePlan(precision="fp8", activation_scale=0.1)
FLOAT8_PER_TOKEN = ModulePlan(precision="fp8", activations="per-token")

PREFIX: Mapping[str, Any] = {"prefix": [(np.zeros((2, 3, 16), np.float32),) * 2] * 2}
ATTENTION = AttentionPlan(query=0.1, key=0.1, value=0.1)

OPTIONS: tuple[Mapping[str, Any], ...] = (
    {"head": "int8-weights", "logits": "last"},
    {"head": "int8-per-token-dynamic", "head_scales": np.ones(48, np.float32)},
    {"attention": {f"model.layers.{layer}.self_attn": ATTENTION for layer in range(2)}},
    PREFIX,
    {**PREFIX, "prefix_in": "attention"},
    {**PREFIX, "cache": CacheOptions("static", 8)},
)
"""Of a dense model, each with what is not the default."""

_ALIKE = {
    r"^(integers?|float\d+)\.[-.\de]+$": r"\1.VALUE",
    r"\b(layers|experts)\.\d+": r"\1.N",
    r"\.(qkv|[qkvo]|gate_up|gate|up|down)_proj\.|(?<=experts\.N)\.w[123]\.": ".LINEAR.",
    r"\.\w+_layernorm\.|\.[qk]_norm\.": ".NORM.",
    r".+(?=_to_(float|float16)$|_token_(fp8_)?\w+$)": "NODE",
}
"""Names that differ only in a constant's value, layer, linear, norm, or in what a cast or a token's scale reads."""


def test_names_are_unique_begin_with_their_module_and_are_the_listed_ones() -> None:
    models = list(_models())
    for checkpoint, model in models:
        nodes = [node for graph in model.graphs() for node in graph]
        assert len({node.name for node in nodes}) == len(nodes)
        assert all(str(node.name).startswith(f"{node.metadata_props['module']}.") for node in nodes)
        for node in nodes:
            if node.metadata_props["module"] in linears(checkpoint.config):
                assert "precision" in node.metadata_props, node.name
    found = sorted({line for _, model in models for line in _lines(model)})
    assert found == LISTED.read_text(encoding="utf-8").splitlines()


def _models() -> Iterator[tuple[Checkpoint, ir.Model]]:
    for name in NAMES:
        for plan in (HALF, PER_TOKEN) if name in MIXTURES else (HALF,):
            yield _model(tiny_family(name, num_hidden_layers=2).checkpoint, plan)
    for family, changes in ROPES.values():
        yield _model(tiny_family(family, num_hidden_layers=2, **changes).checkpoint, HALF)
    biased, windowed = (tiny_llama(**changes).checkpoint for changes in ({"biases": True}, {"sliding_window": 9}))
    for plan in (STATIC, PER_TOKEN, WEIGHTS, FLOAT8, FLOAT8_PER_TOKEN):
        yield _model(biased, plan)
    for options in OPTIONS:
        yield _model(windowed, STATIC, **options)


def _model(checkpoint: Checkpoint, plan: ModulePlan, **options: Any) -> tuple[Checkpoint, ir.Model]:
    router = ModulePlan(precision="float32", reason="router")
    modules = {name: router if is_router(name) else plan for name in linears(checkpoint.config)}
    return checkpoint, build_decoder(checkpoint, GraphPlan(modules, "int8-per-channel", "float16", **options))


def _lines(model: ir.Model) -> Iterator[str]:
    """Yield the name and kind of every node and stored tensor."""
    for graph in model.graphs():
        for node in graph:
            yield f"{_pattern(node.name)} {node.op_type}"
        for name, value in graph.initializers.items():
            yield f"{_pattern(name)} {value.dtype}"


def _pattern(name: str | None) -> str:
    for found, pattern in _ALIKE.items():
        name = re.sub(found, pattern, str(name))
    return str(name)
