"""The tensors of Triton's vLLM backend: names and types that its clients and its OpenAI frontend know."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TensorType = Literal["TYPE_STRING", "TYPE_BOOL", "TYPE_FP32", "TYPE_UINT32"]

TEXT, STREAM, PARAMETERS, WITHOUT_PROMPT = "text_input", "stream", "sampling_parameters", "exclude_input_in_output"

ADDED: Mapping[str, str] = {
    "return_finish_reason": "finish_reason",
    "return_cumulative_logprob": "cumulative_logprob",
    "return_logprobs": "logprobs",
    "return_num_input_tokens": "num_input_tokens",
    "return_num_output_tokens": "num_output_tokens",
}
"""Input that asks for an output → the output."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of the model's configuration; all have one dimension.

    Attributes:
        size: Its number of elements; -1 for one per answer to the prompt.
    """

    name: str
    type: TensorType
    size: int = 1
    optional: bool = False


INPUTS = (
    TensorSpec(TEXT, "TYPE_STRING"),
    TensorSpec(STREAM, "TYPE_BOOL", optional=True),
    TensorSpec(PARAMETERS, "TYPE_STRING", optional=True),
    TensorSpec(WITHOUT_PROMPT, "TYPE_BOOL", optional=True),
    *(TensorSpec(name, "TYPE_BOOL", optional=True) for name in ADDED),
)

OUTPUTS = (
    TensorSpec("text_output", "TYPE_STRING", -1),
    TensorSpec("finish_reason", "TYPE_STRING", -1),
    TensorSpec("cumulative_logprob", "TYPE_FP32", -1),
    TensorSpec("logprobs", "TYPE_STRING", -1),
    TensorSpec("num_input_tokens", "TYPE_UINT32"),
    TensorSpec("num_output_tokens", "TYPE_UINT32", -1),
)
