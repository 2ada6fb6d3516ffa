"""A checkpoint of any format as an HF directory in float32, for the tools that read nothing else."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spike_export.checkpoint.checkpoint import Checkpoint


def write_hf_directory(checkpoint: "Checkpoint", folder: Path) -> None:
    """Write weights, configurations and tokenizer; the weights are all in memory at once."""
    from safetensors.numpy import save_file

    from spike_export.export.files.model_files import generation_config, hf_config
    from spike_export.export.files.tokenizer_files import save_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", hf_config(checkpoint, "float32")),
        ("generation_config.json", generation_config(checkpoint)),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    if checkpoint.tokenizer is not None:
        save_tokenizer(checkpoint.tokenizer, folder, prefix_holds_bos=False)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensors.shapes}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
