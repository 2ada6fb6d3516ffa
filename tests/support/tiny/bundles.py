"""A decoder bundle of a few kilobytes with the shipped graph's inputs, outputs, node names and Q/DQ pattern.

Hand-made so that the tests of the engine builders do not depend on the exporter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from spike_export.artifacts.manifest import BundlePrefix, Manifest, SourceModel, save_manifest
from spike_export.artifacts.recipe import Dtype

MAX_POSITIONS = 128

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True)
class TinyModel:
    """What the graph looks like; `kept` linears stay in `dtype`.

    Sabotaged ones: `wrong_axis` are dequantized along K, `half_scales` have FP16 scales and so an FP16 product, and
    `runtime_scale` ones quantize their input with a scale made at run time.
    """

    layers: int = 1
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    inner: int = 128
    vocab: int = 96
    prefix: int = 3
    dtype: Dtype = "float16"
    kept: tuple[str, ...] = ()
    wrong_axis: tuple[str, ...] = ()
    half_scales: tuple[str, ...] = ()
    runtime_scale: tuple[str, ...] = ()
    seed: int = 0

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(f"model.layers.{layer}.{name}" for layer in range(self.layers) for name in LINEARS)

    @property
    def planned(self) -> dict[str, str]:
        return {name: self.dtype if name in self.kept else "int8" for name in self.modules}


@dataclass
class _Graph:
    model: TinyModel
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.model.seed)

    @property
    def elem(self) -> int:
        return int({"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}[self.model.dtype])

    def op(self, kind: str, inputs: Sequence[str], name: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [f"{name}:0"], name=name, **attributes))
        return f"{name}:0"

    def const(self, name: str, value: object, dtype: object = np.int64) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        values = self.random.normal(0, 0.05, shape)
        return self.const(name, values, np.float32 if self.model.dtype == "float32" else np.float16)

    def int8(self, name: str, x: str, rows: int, columns: int) -> str:
        """Pattern P1: an FP32 island around an INT8 product."""
        axis = 0 if name in self.model.wrong_axis else 1
        scales = np.full(rows if axis == 0 else columns, 0.001)
        values: NDArray[np.int8] = self.random.integers(-127, 128, (rows, columns), dtype=np.int8)
        half = name in self.model.half_scales
        scale_type = np.float16 if half else np.float32
        zero = self.const(f"{name}.input_zero_point", 0, np.int8)
        weight = self.const(f"{name}.weight", values, np.int8)
        weight_scale = self.const(f"{name}.weight_scale", scales, scale_type)
        weight_zero = self.const(f"{name}.weight_zero_point", np.zeros_like(scales), np.int8)
        if not half:
            x = self.op("Cast", [x], f"{name}.Cast_in", to=TensorProto.FLOAT)
        scale = self.input_scale(name, x, scale_type)
        x = self.op("QuantizeLinear", [x, scale, zero], f"{name}.Quantize")
        x = self.op("DequantizeLinear", [x, scale, zero], f"{name}.Dequantize")
        w = self.op("DequantizeLinear", [weight, weight_scale, weight_zero], f"{name}.DequantizeWeight", axis=axis)
        y = self.op("MatMul", [x, w], f"{name}.MatMul")
        return y if half else self.op("Cast", [y], f"{name}.Cast_out", to=self.elem)

    def input_scale(self, name: str, x: str, scale_type: type[np.floating[Any]]) -> str:
        if name not in self.model.runtime_scale:
            return self.const(f"{name}.input_scale", 0.03, scale_type)
        amax = self.op("ReduceMax", [self.op("Abs", [x], f"{name}.Abs")], f"{name}.Amax", keepdims=0)
        return self.op("Div", [amax, self.const(f"{name}.steps", 127, np.float32)], f"{name}.Scale")

    def linear(self, name: str, x: str, rows: int, columns: int) -> str:
        if name in self.model.kept:
            return self.op("MatMul", [x, self.weight(f"{name}.weight", rows, columns)], f"{name}.MatMul")
        return self.int8(name, x, rows, columns)

    def heads(self, name: str, x: str, heads: int) -> str:
        shape = self.const(f"{name}.shape", [0, 0, heads, self.model.head_dim])
        x = self.op("Reshape", [x, shape], f"{name}.Reshape")
        return self.op("Transpose", [x], f"{name}.Transpose", perm=[0, 2, 1, 3])

    def norm(self, name: str, x: str) -> str:
        weight = self.const(f"{name}.weight", np.ones(self.model.hidden), np.dtype(self.model.dtype))
        return self.op("RMSNormalization", [x, weight], f"{name}.RMSNormalization", axis=-1, epsilon=1e-5)

    def visible_prefix(self) -> str:
        """P for a fresh sequence, else 0, as a 1-D tensor."""
        past = self.op("Shape", ["past_key_values.0.key"], "past_length", start=2, end=3)
        fresh = self.op("Equal", [past, self.const("zero", [0])], "is_fresh")
        fresh = self.op("Cast", [fresh], "fresh", to=TensorProto.INT64)
        return self.op("Mul", [fresh, self.const("prefix_length", [self.model.prefix])], "visible_prefix")

    def present(self, name: str, past: str, new: str, visible: str) -> str:
        """[batch, kv_heads, P on a fresh sequence + past + sequence, head_dim]."""
        m = self.model
        prefix = self.weight(f"{name}.prefix", 1, m.kv_heads, m.prefix, m.head_dim)
        part = self.op("Slice", [prefix, "zero", visible, "two"], f"{name}.Slice")
        batch = self.op("Shape", [new], f"{name}.batch", start=0, end=1)
        shape = self.op("Concat", [batch, "one", visible, "one"], f"{name}.prefix_shape", axis=0)
        part = self.op("Expand", [part, shape], f"{name}.Expand")
        self.nodes.append(helper.make_node("Concat", [part, past, new], [name], name=f"{name}.Concat", axis=2))
        return name

    def mask(self) -> str:
        """Boolean [batch, 1, sequence, P + total]: causal, own padding hidden, prefix visible."""
        batch = self.op("Shape", ["input_ids"], "batch", start=0, end=1)
        ones_shape = self.op("Concat", [batch, "prefix_length"], "ones_shape", axis=0)
        ones = self.op("Expand", [self.const("visible", [[1]]), ones_shape], "prefix_mask")
        own = self.op("Concat", [ones, "attention_mask"], "own_mask", axis=1)
        own = self.op("Cast", [own], "own_mask_bool", to=TensorProto.BOOL)
        own = self.op("Unsqueeze", [own, self.const("mask_axes", [1, 2])], "own_mask_4d")
        total = self.op("Shape", ["own_mask:0"], "total", start=1, end=2)
        sequence = self.op("Shape", ["input_ids"], "sequence", start=1, end=2)
        start = self.op("Sub", [total, sequence], "first_position")
        zero, one = self.const("scalar_zero", 0), self.const("scalar_one", 1)
        no_axes = self.const("axis_0", [0])
        keys = self.op("Range", [zero, self.op("Squeeze", [total, no_axes], "total_scalar"), one], "keys")
        steps = self.op("Range", [zero, self.op("Squeeze", [sequence, no_axes], "sequence_scalar"), one], "steps")
        queries = self.op("Unsqueeze", [self.op("Add", [steps, start], "queries"), "one"], "queries_column")
        causal = self.op("LessOrEqual", [keys, queries], "causal")
        return self.op("And", [own, causal], "mask")

    def attention(self, layer: int, x: str, mask: str, visible: str) -> str:
        m, name = self.model, f"model.layers.{layer}.self_attn"
        q = self.heads(f"{name}.q", self.linear(f"{name}.q_proj", x, m.hidden, m.heads * m.head_dim), m.heads)
        k = self.heads(f"{name}.k", self.linear(f"{name}.k_proj", x, m.hidden, m.kv_heads * m.head_dim), m.kv_heads)
        v = self.heads(f"{name}.v", self.linear(f"{name}.v_proj", x, m.hidden, m.kv_heads * m.head_dim), m.kv_heads)
        k = self.present(f"present.{layer}.key", f"past_key_values.{layer}.key", k, visible)
        v = self.present(f"present.{layer}.value", f"past_key_values.{layer}.value", v, visible)
        y = self.op("Attention", [q, k, v, mask], f"{name}.Attention")
        y = self.op("Transpose", [y], f"{name}.merge", perm=[0, 2, 1, 3])
        y = self.op("Reshape", [y, self.const(f"{name}.merged", [0, 0, m.heads * m.head_dim])], f"{name}.merged_out")
        return self.linear(f"{name}.o_proj", y, m.heads * m.head_dim, m.hidden)

    def mlp(self, layer: int, x: str) -> str:
        m, name = self.model, f"model.layers.{layer}.mlp"
        gate = self.linear(f"{name}.gate_proj", x, m.hidden, m.inner)
        up = self.linear(f"{name}.up_proj", x, m.hidden, m.inner)
        gate = self.op("Mul", [gate, self.op("Sigmoid", [gate], f"{name}.Sigmoid")], f"{name}.silu")
        return self.linear(f"{name}.down_proj", self.op("Mul", [gate, up], f"{name}.glu"), m.inner, m.hidden)


def tiny_graph(model: TinyModel) -> onnx.ModelProto:
    """Return the decoder graph, weights inside."""
    g = _Graph(model)
    g.const("one", [1])
    g.const("two", [2])
    visible, mask = g.visible_prefix(), g.mask()
    x = g.op("Gather", [g.weight("model.embed_tokens.weight", model.vocab, model.hidden), "input_ids"], "embed")
    for layer in range(model.layers):
        name = f"model.layers.{layer}"
        attended = g.attention(layer, g.norm(f"{name}.input_layernorm", x), mask, visible)
        x = g.op("Add", [x, attended], f"{name}.attention_residual")
        x = g.op("Add", [x, g.mlp(layer, g.norm(f"{name}.post_attention_layernorm", x))], f"{name}.mlp_residual")
    head = g.weight("lm_head.weight", model.hidden, model.vocab)
    g.nodes.append(helper.make_node("MatMul", [g.norm("model.norm", x), head], ["logits"], name="lm_head.MatMul"))
    graph = helper.make_graph(g.nodes, "tiny", _inputs(model, g.elem), _outputs(model, g.elem), g.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def _inputs(model: TinyModel, elem: int) -> list[onnx.ValueInfoProto]:
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
    ]
    shape = ["batch", model.kv_heads, "past", model.head_dim]
    return inputs + [
        helper.make_tensor_value_info(f"past_key_values.{layer}.{kind}", elem, shape)
        for layer in range(model.layers)
        for kind in ("key", "value")
    ]


def _outputs(model: TinyModel, elem: int) -> list[onnx.ValueInfoProto]:
    outputs = [helper.make_tensor_value_info("logits", elem, ["batch", "sequence", model.vocab])]
    shape = ["batch", model.kv_heads, "present", model.head_dim]
    return outputs + [
        helper.make_tensor_value_info(f"present.{layer}.{kind}", elem, shape)
        for layer in range(model.layers)
        for kind in ("key", "value")
    ]


def write_bundle(folder: Path, model: TinyModel | None = None, proto: onnx.ModelProto | None = None) -> Path:
    """Write model.onnx, model.onnx.data and manifest.json; return the folder."""
    model = model or TinyModel()
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        proto or tiny_graph(model),
        folder / "model.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="model.onnx.data",
        size_threshold=256,
    )
    save_manifest(tiny_manifest(model), folder)
    return folder


def tiny_manifest(model: TinyModel) -> Manifest:
    length = model.prefix
    prefix = BundlePrefix(token_ids=(1,) * length, text="", length=length, holds_bos=True) if length else None
    return Manifest(
        model=SourceModel(source="tiny", architecture="llama", checkpoint_sha256="0", recipe_sha256=None),
        tools={},
        dtype=model.dtype,
        bos_token_id=1,
        eos_token_ids=(2,),
        prefix=prefix,
        linears={},
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        sliding_window=None,
        inputs=(),
        outputs=(),
    )
