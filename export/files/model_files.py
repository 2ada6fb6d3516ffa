"""The bundle's JSON files that other tools read: `config.json`, `generation_config.json`, `genai_config.json`."""

from typing import Any

from spike_export.artifacts.manifest import GRAPH_FILE
from spike_export.artifacts.recipe import Dtype
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.export.graph_plan import GraphPlan

GENAI = "onnxruntime-genai"


def hf_config(checkpoint: Checkpoint, dtype: Dtype) -> dict[str, Any]:
    """Return the content of `config.json`: HF's configuration with `architectures`, and no trace of local paths."""
    config = {key: value for key, value in checkpoint.config.hf.items() if key not in ("_name_or_path", "torch_dtype")}
    if not config.get("architectures"):
        config["architectures"] = [checkpoint.config.family.architecture]
    return {**config, "dtype": dtype}


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of `generation_config.json`: the checkpoint's, or its special tokens."""
    if checkpoint.generation_config:
        return dict(checkpoint.generation_config)
    return {"bos_token_id": checkpoint.bos_token_id, "eos_token_id": _eos(checkpoint)}


def genai_config(checkpoint: Checkpoint, obstacle: str | None) -> dict[str, Any]:
    """Return the content of `genai_config.json`, which onnxruntime-genai reads to drive the graph.

    `position_ids` is not among the inputs: the graph counts positions itself. A graph that onnxruntime-genai cannot
    drive has the reason in place of its type, which onnxruntime-genai repeats when it refuses the type; evaluation
    tools that take the other entries still find them.

    Args:
        checkpoint: The model.
        obstacle: What `genai_obstacle` says of the graph.
    """
    config, eos = checkpoint.config, _eos(checkpoint)
    pad = checkpoint.generation_config.get("pad_token_id")
    first_eos = eos[0] if isinstance(eos, list) else eos
    decoder = {
        # Entries it does not know are passed on to ONNX Runtime. Denormals: docs/decisions/denormals.md.
        "session_options": {
            "log_id": "onnxruntime-genai",
            "session.set_denormal_as_zero": "1",
            "provider_options": [],
        },
        "filename": GRAPH_FILE,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
    }
    model = {
        "type": config.family.model_type if obstacle is None else f"none: {obstacle}",
        "bos_token_id": checkpoint.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": first_eos if pad is None else pad,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "decoder": decoder,
    }
    # The graph's past and present differ in length, so that they cannot share one buffer.
    search = {"max_length": config.max_position_embeddings, "past_present_share_buffer": False}
    return {"model": model, "search": search}


def genai_obstacle(plan: GraphPlan) -> str | None:
    """Return why onnxruntime-genai cannot drive a graph, and the remedy; None where it can."""
    if plan.cache.kind == "static":
        return "onnxruntime-genai knows no `write_indices` and no `fresh`; export with --kv-cache dynamic"
    if plan.kv_cache:
        return "onnxruntime-genai takes no cache in INT8 on a CPU; export with --kv-cache-dtype unquantized"
    if plan.prefix and plan.prefix_in == "cache":
        return (
            "onnxruntime-genai allocates `present` for the tokens it fed, and this graph's is longer by the prefix; "
            "export with --prefix-in attention"
        )
    return None


def _eos(checkpoint: Checkpoint) -> int | list[int] | None:
    ids = list(checkpoint.config.eos_token_ids)
    return None if not ids else ids[0] if len(ids) == 1 else ids
