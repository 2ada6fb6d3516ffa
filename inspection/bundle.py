"""What a bundle holds."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from spike_export.artifacts.manifest import DATA_FILE, GRAPH_FILE, INT8_WEIGHTS, Manifest, load_manifest
from spike_export.engines.audit.module_names import layer_of
from spike_export.engines.plan.graph import load_structure, planned_precisions


@dataclass(frozen=True)
class BundledLinear:
    """A product with a stored weight.

    Attributes:
        precision: As the manifest names formats: `int8`, `fp8`, `float16`, `float16+int8-weights`, ...
        scheme: How weight and input are scaled, in words; empty where neither is quantized.
    """

    precision: str
    scheme: str


@dataclass(frozen=True)
class BundleInspection:
    """A bundle and what is in it.

    Attributes:
        files: Name → size in bytes; None where a file that belongs to it is missing.
        linears: By HF module name, in the graph's order.
        layer_nodes: Nodes of each layer, from the first on; those in branches count, as plans are built of them.
        other_nodes: Nodes of no layer.
        operators: Operator → nodes in the layer in the middle.
    """

    folder: Path
    manifest: Manifest
    files: Mapping[str, int | None]
    linears: Mapping[str, BundledLinear]
    layer_nodes: tuple[int, ...]
    other_nodes: int
    operators: Mapping[str, int]

    def document(self) -> dict[str, Any]:
        """Return the inspection as JSON values."""
        return {
            "bundle": str(self.folder),
            "manifest": self.manifest.model_dump(mode="json"),
            "files": dict(self.files),
            "modules": {
                module: {"precision": linear.precision, "scheme": linear.scheme or None}
                for module, linear in self.linears.items()
            },
            "nodes": {
                "layers": list(self.layer_nodes),
                "outside": self.other_nodes,
                "operators": dict(self.operators),
            },
        }


def inspect_bundle(folder: Path) -> BundleInspection:
    """Read manifest and graph; the weights stay in their file, which may even be missing.

    Raises:
        ArtifactError: The manifest cannot be read.
        EngineError: The graph cannot be read.
    """
    manifest = load_manifest(folder)
    model = load_structure(folder / GRAPH_FILE)
    nodes: dict[int | None, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        layer = layer_of([node.name])
        # A graph changed by hand may name any layer: those that the model does not have are outside of it.
        nodes.setdefault(layer if layer is None or layer < manifest.num_hidden_layers else None, []).append(node)
    layers = sorted(layer for layer in nodes if layer is not None)
    middle = nodes[layers[len(layers) // 2]] if layers else []
    return BundleInspection(
        folder=folder,
        manifest=manifest,
        files=dict(_files(folder)),
        linears=dict(_linears(model)),
        layer_nodes=tuple(len(nodes.get(layer, ())) for layer in range(layers[-1] + 1 if layers else 0)),
        other_nodes=len(nodes.get(None, ())),
        operators=dict(Counter(node.op_type for node in middle).most_common()),
    )


def _files(folder: Path) -> Iterator[tuple[str, int | None]]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    yield from ((str(path.relative_to(folder)), path.stat().st_size) for path in found)
    yield from ((name, None) for name in (GRAPH_FILE, DATA_FILE) if not (folder / name).is_file())


def _linears(model: onnx.ModelProto) -> Iterator[tuple[str, BundledLinear]]:
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    names = {node.name for node in model.graph.node}
    for module, precision in planned_precisions(model).items():
        weights = "per channel" if ranks.get(f"{module}.weight_scale", 0) else "per tensor"
        if precision.endswith(INT8_WEIGHTS):
            scheme = f"weights {weights}"
        elif f"{module}.weight_scale" in ranks:
            inputs = "per token" if f"{module}.token_rescale" in names else "per tensor, static"
            scheme = f"weights {weights}, inputs {inputs}"
        else:
            scheme = ""
        yield module, BundledLinear(precision, scheme)
