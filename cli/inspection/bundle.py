"""`inspect BUNDLE`: what a bundle holds, for reading and as JSON."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console

from spike_export.artifacts.manifest import DATA_FILE, GRAPH_FILE, INT8_WEIGHTS, Manifest, load_manifest
from spike_export.cli.inspection.module_rows import rows_over_layers
from spike_export.cli.terminal.text_table import counts_in_words, print_facts, print_table, size_in_words
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
        nodes.setdefault(layer_of([node.name]), []).append(node)
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


def document(inspection: BundleInspection) -> dict[str, Any]:
    """Return the inspection as JSON values."""
    return {
        "bundle": str(inspection.folder),
        "manifest": inspection.manifest.model_dump(mode="json"),
        "files": dict(inspection.files),
        "modules": {
            module: {"precision": linear.precision, "scheme": linear.scheme or None}
            for module, linear in inspection.linears.items()
        },
        "nodes": {
            "layers": list(inspection.layer_nodes),
            "outside": inspection.other_nodes,
            "operators": dict(inspection.operators),
        },
    }


def print_bundle(inspection: BundleInspection, as_json: bool, console: Console) -> None:
    """Print tables, or the JSON document."""
    if as_json:
        console.print_json(json.dumps(document(inspection)))
        return
    print_facts(console, list(_facts(inspection)))
    print_table(console, "formats", ("format", "linears", "MACs"), _format_rows(inspection.manifest))
    print_table(console, "linears", ("linear", "precision", "scheme", "layers"), _linear_rows(inspection))
    print_table(console, "nodes of a layer", ("operator", "nodes"), _operator_rows(inspection))
    print_table(console, "files", ("file", "bytes"), _file_rows(inspection))


def _facts(inspection: BundleInspection) -> Iterator[tuple[str, str]]:
    manifest, prefix = inspection.manifest, inspection.manifest.prefix
    yield "bundle", str(inspection.folder)
    yield "model", f"{manifest.model.source} ({manifest.model.architecture})"
    yield "checkpoint", f"sha256 {manifest.model.checkpoint_sha256}"
    yield "recipe", f"sha256 {manifest.model.recipe_sha256}" if manifest.model.recipe_sha256 else "none"
    yield "written by", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    yield "where not quantized", manifest.dtype
    if prefix:
        bos = "feed no BOS, it holds it" if prefix.holds_bos else "BOS is the caller's to feed"
        place = "cache" if prefix.in_cache else "attention"
        yield "prefix", f"{list(prefix.token_ids)} {prefix.text!r}, in the {place}; {bos}"
    else:
        yield "prefix", "none"
    room = f" of {manifest.capacity} tokens ({manifest.cache_slots} slots)" if manifest.capacity else ""
    yield "cache", f"{manifest.kv_cache}{room}"
    yield "logits", manifest.logits
    window = f", each seeing {manifest.sliding_window}" if manifest.sliding_window else ""
    yield "positions", f"{manifest.max_position_embeddings}{window}"
    yield "engines", "; ".join(manifest.engines)
    for runtime, reason in manifest.unsupported.items():
        yield f"not for {runtime}", reason
    counts = inspection.layer_nodes
    yield "nodes", f"per layer {counts_in_words(counts)}; {inspection.other_nodes} outside the {len(counts)} layers"


def _format_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (name, str(share.modules), f"{share.mac_share:.1%}") for name, share in manifest.linears.items()
    ]
    if manifest.head:
        rows.append((f"{manifest.head.format} (head)", "1", f"{manifest.head.mac_share:.1%} of all with the head"))
    return rows


def _linear_rows(inspection: BundleInspection) -> list[tuple[str, ...]]:
    """Return one row for linears of one name, precision and scheme, whatever their layers."""
    return [
        (name, linear.precision, linear.scheme, layers) for name, linear, layers in rows_over_layers(inspection.linears)
    ]


def _operator_rows(inspection: BundleInspection) -> list[tuple[str, ...]]:
    return [(operator, str(count)) for operator, count in inspection.operators.items()]


def _file_rows(inspection: BundleInspection) -> list[tuple[str, ...]]:
    return [(name, "MISSING" if size is None else size_in_words(size)) for name, size in inspection.files.items()]
