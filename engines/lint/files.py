"""Rules about where a model's bytes are, and about its inputs' sizes."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from onnx import TensorProto

from spike_export.engines.lint.finding import Hit, Rule
from spike_export.engines.lint.view import GraphModel

LARGEST_MESSAGE = (1 << 31) - 1
"""Bytes of a protobuf message."""

_PAGE = 4096
"""Bytes; what is to be mapped must begin at a multiple."""

_WORTH_MAPPING = 1 << 20
"""Bytes from which on a tensor is worth a page of its own."""


def _external(model: GraphModel) -> Iterator[tuple[TensorProto, dict[str, str]]]:
    for scope in model.scopes:
        for tensor in scope.initializers.values():
            if tensor.data_location == TensorProto.EXTERNAL:
                yield tensor, {entry.key: entry.value for entry in tensor.external_data}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _too_large(model: GraphModel) -> Iterator[Hit]:
    if model.file.size > LARGEST_MESSAGE:
        yield Hit(
            f"the file has {model.file.size} bytes and no protobuf parser reads more than {LARGEST_MESSAGE}",
            subject=model.file.path.name,
        )


def _missing(model: GraphModel) -> Iterator[Hit]:
    tensors: dict[str, int] = {}
    for _, place in _external(model):
        location = place.get("location", "")
        tensors[location] = tensors.get(location, 0) + 1
    for location, count in tensors.items():
        if _size(model.file.path.parent / location) is None:
            yield Hit(f"it is missing, and {count} tensors are in it", subject=location or "(no location)")


def _short(model: GraphModel) -> Iterator[Hit]:
    sizes: dict[str, int | None] = {}
    for tensor, entries in _external(model):
        place, location = model.file.place(tensor), entries.get("location", "")
        assert place is not None
        if location not in sizes:
            sizes[location] = _size(place.file)
        size, end = sizes[location], place.offset + (place.length or 0)
        if size is not None and end > size:
            yield Hit(f"it ends at byte {end} of {location!r}, which has {size}", subject=tensor.name)


def _misaligned(model: GraphModel) -> Iterator[Hit]:
    found: dict[str, list[str]] = {}
    for tensor, entries in _external(model):
        place = model.file.place(tensor)
        assert place is not None
        if (place.length or 0) >= _WORTH_MAPPING and place.offset % _PAGE:
            found.setdefault(entries.get("location", ""), []).append(tensor.name)
    for location, names in found.items():
        yield Hit(
            f"{len(names)} large tensors, such as {names[0]!r}, do not begin at a multiple of {_PAGE} bytes; they are "
            "read, not mapped",
            subject=location,
        )


def _outside(model: GraphModel) -> Iterator[Hit]:
    locations = {entries.get("location", "") for _, entries in _external(model)}
    for location in sorted(locations):
        path = PurePosixPath(location.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            yield Hit("it lies outside the model's folder, where ONNX Runtime reads nothing", subject=location)


def _fixed(model: GraphModel) -> Iterator[Hit]:
    stored = model.main.initializers
    for name, kind in model.main.inputs.items():
        if name not in stored and kind.shape and all(isinstance(size, int) for size in kind.shape):
            yield Hit(f"its shape is fixed to {list(kind.shape)}: one batch and length only", subject=name)


FILE_RULES: tuple[Rule, ...] = (
    Rule(
        "model-too-large",
        "error",
        "A model file that cannot be parsed",
        "store the weights in an external data file",
        _too_large,
    ),
    Rule("data-missing", "warning", "A data file that is not there", "put it beside the model", _missing),
    Rule("data-short", "warning", "A data file that is too short", "copy or export the model again", _short),
    Rule("data-misaligned", "warning", "Large tensors that cannot be mapped", "align them to 4 KiB", _misaligned),
    Rule("data-outside", "warning", "A data file outside the model's folder", "move it beside the model", _outside),
    Rule("fixed-shape", "note", "An input of fixed size", "give batch and sequence a name instead of a number", _fixed),
)
