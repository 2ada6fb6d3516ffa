"""Opens a model by what the user names it with: a folder, a file, or a hub id."""

from spike_export.artifacts.errors import CheckpointError
from spike_export.artifacts.files.user_paths import user_path
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.gguf_file import open_gguf
from spike_export.checkpoint.hf_directory import download_snapshot, looks_like_hub_id, open_hf_directory


def open_checkpoint(source: str) -> Checkpoint:
    """Open a local HF directory, a `.gguf` file, or a hub id.

    Nothing is unpickled and no remote code runs. Only headers are read here; tensors are read when asked for.

    Raises:
        CheckpointError: The source does not exist, is damaged, or is not a supported architecture.
    """
    path = user_path(source, CheckpointError)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{source}: not a .gguf file; give an HF directory, a .gguf file or a hub id")
        return open_gguf(path)
    if path.is_dir():
        return open_hf_directory(path, path.resolve().name)
    if looks_like_hub_id(source):
        return open_hf_directory(download_snapshot(source), source)
    raise CheckpointError(f"{source}: no such file or directory; give an HF directory, a .gguf file or a hub id")
