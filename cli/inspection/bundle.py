"""`inspect BUNDLE`: what a bundle holds, in tables."""

from collections.abc import Iterator

from rich.console import Console

from spike_export.artifacts.manifest import LinearShare, Manifest
from spike_export.cli.inspection.module_rows import rows_over_layers
from spike_export.cli.terminal.text_table import counts_in_words, print_facts, print_table, size_in_words
from spike_export.inspection.bundle import BundleInspection


def print_bundle(inspection: BundleInspection, console: Console) -> None:
    """Print the tables of a bundle."""
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
    yield "cache", f"{manifest.kv_cache}{room}, {manifest.cache_type}"
    yield "logits", manifest.logits
    window = f", each seeing {manifest.sliding_window}" if manifest.sliding_window else ""
    yield "positions", f"{manifest.max_position_embeddings}{window}"
    yield "engines", "; ".join(manifest.engines)
    for runtime, reason in manifest.unsupported.items():
        yield f"not for {runtime}", reason
    counts = inspection.layer_nodes
    yield "nodes", f"per layer {counts_in_words(counts)}; {inspection.other_nodes} outside the {len(counts)} layers"


def _format_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [(name, str(share.modules), _macs(share)) for name, share in manifest.linears.items()]
    if manifest.head:
        rows.append((f"{manifest.head.format} (head)", "1", f"{manifest.head.mac_share:.1%} of all with the head"))
    return rows


def _macs(share: LinearShare) -> str:
    own = f"; inputs scaled per token: {share.per_token_share:.1%}" if share.per_token_share else ""
    return f"{share.mac_share:.1%}{own}"


def _linear_rows(inspection: BundleInspection) -> list[tuple[str, ...]]:
    """Return one row for linears of one name, precision and scheme, whatever their layers."""
    return [
        (name, linear.precision, linear.scheme, layers) for name, linear, layers in rows_over_layers(inspection.linears)
    ]


def _operator_rows(inspection: BundleInspection) -> list[tuple[str, ...]]:
    return [(operator, str(count)) for operator, count in inspection.operators.items()]


def _file_rows(inspection: BundleInspection) -> list[tuple[str, ...]]:
    return [(name, "MISSING" if size is None else size_in_words(size)) for name, size in inspection.files.items()]
