"""Decoding with INT8 products beside ONNX Runtime's products of INT8 weights alone (`MatMulNBits`), in turns.

The second graph has a `MatMulNBits` of 8 bits in place of each quantizer and product of the first, and no nodes that
compute scales of tokens: that operator rounds its input by itself, in blocks of channels with a scale each (accuracy
level 4), or not at all (level 0). Weights and their scales are the same. On a machine that has other work,
`--processor-time --threads 1` measures the processor time of the one thread.

Run: python -m benchmarks.speed.weight_only_products BUNDLE; of a bundle with a static cache.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from benchmarks.speed.lowering import Measured, gain, opened, play
from spike_export.artifacts.manifest import DATA_FILE, load_manifest
from spike_export.engines.onnx_runtime.generation_graph import GenerationGraph, generation_graph
from spike_export.engines.onnx_runtime.lowering.given_weights import WeightFile, given
from spike_export.engines.onnx_runtime.lowering.graph_index import GraphIndex, remove_unused

ZERO = 128
"""The zero point of weights as unsigned bytes."""


def blocks(weight: NDArray[Any], size: int) -> NDArray[np.uint8]:
    """Return weights [inputs, outputs] as MatMulNBits reads them, [outputs, blocks, size]; the last block is padded.

    Args:
        weight: INT8, or as unsigned bytes that are 128 higher.
        size: Inputs of a block.
    """
    inputs, outputs = weight.shape
    count = -(-inputs // size)
    padded = np.full((count * size, outputs), ZERO, np.uint8)
    padded[:inputs] = weight if weight.dtype == np.uint8 else weight.view(np.uint8) ^ np.uint8(ZERO)
    return np.ascontiguousarray(padded.T).reshape(outputs, count, size)


def weight_only(graph: GenerationGraph, bundle: Path, size: int, level: int) -> GenerationGraph:
    """Return the graph with MatMulNBits in place of its INT8 products, the head's left as it is."""
    model = onnx.load_from_string(graph.serialized)
    index, packed = GraphIndex(model.graph), dict(graph.weights)
    for node in list(model.graph.node):
        if node.op_type != "MatMul" or node.name.startswith("lm_head"):
            continue
        activation, weight = (index.producer(name, "DequantizeLinear") for name in node.input)
        if activation is None or weight is None:
            continue
        values, scales = (
            packed[name] if name in packed else WeightFile(bundle / DATA_FILE).values(index.initializers[name])
            for name in weight.input[:2]
        )
        source, result = _ends(index, node, activation)
        names = (f"{node.name}.blocks", f"{node.name}.scales")
        spread = np.repeat(scales.astype(np.float32), -(-len(values) // size))
        packed |= dict(zip(names, (blocks(values, size), spread), strict=True))
        model.graph.initializer.extend(given(name, packed[name]) for name in names)
        output, result.output[0] = result.output[0], f"{result.output[0]}.unused"
        shape = {"K": values.shape[0], "N": values.shape[1], "bits": 8, "block_size": size, "accuracy_level": level}
        product = helper.make_node("MatMulNBits", [source, *names], [output], domain="com.microsoft", **shape)
        place = next(number for number, each in enumerate(model.graph.node) if each.name == node.name)
        model.graph.node.insert(place, product)
    remove_unused(model.graph)
    used = {tensor.name for tensor in model.graph.initializer}
    kept = {name: values for name, values in packed.items() if name in used}
    return GenerationGraph(model.SerializeToString(), graph.prefix, weights=kept)


def _ends(index: GraphIndex, node: onnx.NodeProto, activation: onnx.NodeProto) -> tuple[str, onnx.NodeProto]:
    """Return what is rounded, and the node that gives the result: behind a token's scale where there is one."""
    quantizer = index.producer(activation.input[0], "QuantizeLinear")
    assert quantizer is not None, "a dequantizer of activations stands behind a quantizer"
    scaled, rescaled = index.producer(quantizer.input[0], "Div"), index.only_user(node.output[0], "Mul")
    if scaled is None or rescaled is None:
        return str(quantizer.input[0]), node
    return str(scaled.input[0]), rescaled


def table(times: Mapping[str, Measured], rows: int) -> str:
    """Return medians and shortest steps, and how many times as fast as the first graph."""
    first = next(iter(times.values()))
    parts = (
        f"{name}: {median(each.decodes) * 1e3:.2f} ({min(each.decodes) * 1e3:.2f}) ms, {gain(first, each):.2f} x"
        for name, each in times.items()
    )
    return f"{rows:3} rows | " + " | ".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="folder that export wrote with --kv-cache static")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--level", type=int, default=4, help="accuracy level of MatMulNBits")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true", help="of the calling thread, in place of the clock")
    chosen = parser.parse_args(arguments)
    clock = time.thread_time if chosen.processor_time else time.perf_counter
    graph = generation_graph(chosen.bundle, load_manifest(chosen.bundle))
    graphs = {"INT8": graph}
    graphs |= {f"blocks of {size}": weight_only(graph, chosen.bundle, size, chosen.level) for size in chosen.blocks}
    sessions = {name: opened(chosen.bundle, each, chosen.threads) for name, each in graphs.items()}
    for rows in chosen.rows:
        times = {name: Measured(session) for name, session in sessions.items()}
        for _ in range(chosen.rounds):
            play(list(times.values()), rows, chosen.context, chosen.steps, clock)
        print(table(times, rows), flush=True)


if __name__ == "__main__":
    main()
