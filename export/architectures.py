"""The architectures whose decoder this package writes as a graph: some of those that it calibrates."""

from collections.abc import Mapping

from spike_export.calibration.decoder_config import DecoderConfig
from spike_export.calibration.errors import CheckpointError

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""HF's `model_type` → the class that `config.json` names under `architectures`."""


def require_exportable(config: DecoderConfig) -> None:
    """Refuse a decoder that the graph cannot express.

    Raises:
        CheckpointError: Names what export lacks; the model can be calibrated all the same.
    """
    family = config.family.model_type
    if family not in ARCHITECTURES:
        raise CheckpointError(
            f"architecture {family!r} cannot be exported yet (export supports: {', '.join(sorted(ARCHITECTURES))}); "
            f"calibrate works for it"
        )
