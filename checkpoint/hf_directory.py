"""Checkpoints in Hugging Face's layout: `config.json`, safetensors (sharded or not), tokenizer files."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import CheckpointError, one_line
from spike_export.artifacts.files.documents import read_document, require_file, require_files
from spike_export.artifacts.files.inner_paths import leads_outside
from spike_export.checkpoint.checkpoint import Checkpoint, validate_shapes
from spike_export.checkpoint.decoder_config import decoder_config
from spike_export.checkpoint.file_hash import HashedSource
from spike_export.checkpoint.row_blocks import BlockReader, row_blocks
from spike_export.checkpoint.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Element types in safetensors files → their names in torch."""


@dataclass(frozen=True)
class SafetensorsSource(HashedSource):
    """Tensors of one or more safetensors files.

    Attributes:
        files: Tensor name → the file that holds it.
    """

    files: Mapping[str, Path]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """HF tensor name → shape, from the files' headers."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file in self.weight_files:
            with _open_safetensors(file) as handle:
                held = set(handle.keys())
                for name in (name for name, place in self.files.items() if place == file):
                    if name not in held:
                        raise CheckpointError(f"{file}: tensor {name} is missing from this shard; download it again")
                    view = handle.get_slice(name)
                    if view.get_dtype() not in _DTYPES:
                        raise CheckpointError(
                            f"{file}: tensor {name} has type {view.get_dtype()}; supported: {', '.join(_DTYPES)}"
                        )
                    shapes[name] = tuple(view.get_shape())
        return shapes

    def read(self, name: str) -> NDArray[np.float32]:
        """Read one tensor as float32."""
        with self._opened(name) as handle:
            return _widened(handle.get_tensor(name))

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read these rows as float32; memory holds no others."""
        import torch

        inside = name in self.files and len(rows) and rows[0] >= 0 and rows[-1] < self.shapes[name][0]
        if inside and (np.diff(rows) == 1).all():
            return self._read_block(name, slice(int(rows[0]), int(rows[-1]) + 1))
        with self._opened(name) as handle:
            return _widened(handle.get_tensor(name).index_select(0, torch.from_numpy(rows)))

    def _read_block(self, name: str, rows: slice) -> NDArray[np.float32]:
        row_shape = self.shapes[name][1:]
        out = np.empty((rows.stop - rows.start, *row_shape), np.float32)
        with self.block_reader(name) as read:
            for part in row_blocks((len(out), math.prod(row_shape))):
                read(slice(rows.start + part.start, rows.start + part.stop), out[part])
        return out

    @contextmanager
    def block_reader(self, name: str) -> Iterator[BlockReader]:
        """Open a tensor for plain reads into the same memory over and over.

        Mapping the file anew for each block, or memory of its own for each, costs more than the reading.
        """
        import torch

        file, row_shape = self._place(name), self.shapes[name][1:]
        data_start, header = self._layouts[file]
        element = getattr(torch, _DTYPES[header[name]["dtype"]])
        row_bytes = math.prod(row_shape) * element.itemsize
        begin = data_start + header[name]["data_offsets"][0]
        stored = np.empty(0, np.uint8)
        with _shard_errors(file):
            stream = file.open("rb", buffering=0)
        with stream:

            def read(rows: slice, out: NDArray[Any]) -> None:
                nonlocal stored
                size = len(out) * row_bytes
                if stored.size < size:
                    stored = np.empty(size, np.uint8)
                found = stored[:size]
                with _shard_errors(file):
                    stream.seek(begin + rows.start * row_bytes)
                    count = stream.readinto(found)  # type: ignore[arg-type]
                if count < size:
                    raise CheckpointError(f"{file}: the file ends within tensor {name}; download it again")
                _as_torch(out).copy_(torch.from_numpy(found).view(element).reshape(out.shape))

            yield read

    @cached_property
    def _layouts(self) -> Mapping[Path, tuple[int, Any]]:
        """File → where its tensors' bytes begin, and its header: tensor name → dtype, shape, data_offsets."""
        layouts = {}
        for file in set(self.files.values()):
            with _shard_errors(file), file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                layouts[file] = (8 + size, json.loads(stream.read(size)))
        return layouts

    def _opened(self, name: str) -> Any:
        return _open_safetensors(self._place(name))

    def _place(self, name: str) -> Path:
        file = self.files.get(name)
        if file is None:
            raise CheckpointError(f"tensor {name} is not in the checkpoint")
        return file

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files in the order of their names."""
        return tuple(sorted(set(self.files.values())))


@contextmanager
def _shard_errors(file: Path) -> Iterator[None]:
    """Name the shard that cannot be read: whoever writes meanwhile would take the error for one of the writing."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: this shard is missing; download it again") from error
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror or error}); check the disk, or download it again"
        ) from error


def _widened(tensor: "torch.Tensor") -> NDArray[np.float32]:
    """Return float32 values, exactly; through torch, because numpy has no bfloat16."""
    values: NDArray[np.float32] = tensor.float().numpy()
    return values


def _as_torch(out: NDArray[Any]) -> "torch.Tensor":
    """Return the same memory for torch, which cannot see numpy's bfloat16, and rounds to 16 bit faster than numpy."""
    import torch

    if out.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(out)


def _open_safetensors(file: Path) -> Any:
    """Open a safetensors file for reading through torch; the data stay on the disk."""
    from safetensors import safe_open

    try:
        require_file(file)
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: this shard is missing; download it again") from error
    except Exception as error:  # safetensors' own error type, and OSError
        raise CheckpointError(f"{file}: damaged safetensors file ({one_line(error)}); download it again") from error


def _weight_files(directory: Path) -> Mapping[str, Path]:
    index = directory / _INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: has no weight_map; download it again")
        outside = next((str(file) for file in weight_map.values() if leads_outside(str(file))), None)
        if outside is not None:
            raise CheckpointError(f"{index}: {outside!r} lies outside of the model's folder; download the index again")
        return {name: directory / str(file) for name, file in weight_map.items()}
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        pickled = next(
            iter(sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")])), None
        )
        remedy = (
            f"only {pickled.name}, which is a pickle and never loaded: convert it to safetensors"
            if pickled
            else "expected model.safetensors"
        )
        raise CheckpointError(f"{directory}: no safetensors weights ({remedy})")
    files: dict[str, Path] = {}
    for file in found:
        with _open_safetensors(file) as handle:
            files.update(dict.fromkeys(handle.keys(), file))
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing, not JSON, or not an object.
    """
    try:
        content = json.loads(read_document(path))
        json.dumps(content, ensure_ascii=False).encode()  # JSON's escapes can spell half of a character
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: this file is missing; is {path.parent} a model directory?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def _tokenizer(directory: Path) -> "PreTrainedTokenizerBase | None":
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    load = partial(AutoTokenizer.from_pretrained, directory, local_files_only=True, trust_remote_code=False)
    return load_tokenizer(load, directory, CheckpointError)


def open_hf_directory(directory: Path, name: str) -> Checkpoint:
    """Open a directory in HF's layout.

    Raises:
        CheckpointError: A file is missing or damaged, a tensor is missing or of a wrong shape, or the architecture
            is not supported.
    """
    require_files(directory.iterdir(), CheckpointError)
    config_file = directory / "config.json"
    config = decoder_config(read_json(config_file), str(config_file))
    source = SafetensorsSource(_weight_files(directory))
    validate_shapes(config, source, str(directory))
    generation = directory / "generation_config.json"
    return Checkpoint(
        name=name,
        config=config,
        tensors=source,
        tokenizer=_tokenizer(directory),
        generation_config=read_json(generation) if generation.exists() else {},
    )


def looks_like_hub_id(source: str) -> bool:
    """Return whether `source` has the form `organization/name`."""
    return _HUB_ID.fullmatch(source) is not None


def download_snapshot(hub_id: str) -> Path:
    """Return the local folder of a hub model, downloading what is needed (safetensors and JSON only).

    Raises:
        CheckpointError: The hub cannot be reached, or has no such model.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id, allow_patterns=["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt"]
            )
        )
    except Exception as error:  # network, authentication, no such repository: each has its own type
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id}: no such local path, and the hub download failed ({reason}); "
            "give a local directory or a .gguf file to work offline"
        ) from error
