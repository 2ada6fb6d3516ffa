"""The `quantization_config` of `config.json`: which linears are quantized how, in the terms of compressed-tensors.

vLLM looks for a linear's own name among the targets first, then for its class, and only then for the names of the
linears that it fused. A group that targets the class `Linear` would therefore take q, k and v from a group that names
them. Where there are two groups, both name every linear; experts, which vLLM asks for under names of its own, are
matched by an expression.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from spike_export.artifacts.recipe import ModulePlan, WeightScheme
from spike_export.checkpoint.checkpoint import LM_HEAD
from spike_export.checkpoint.modules import expert_of

FORMAT = "int-quantized"

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}

_WEIGHTS: Mapping[WeightScheme, Mapping[str, Any]] = {
    "int8-per-channel": {**_INT8, "strategy": "channel", "dynamic": False},
    "int8-per-tensor": {**_INT8, "strategy": "tensor", "dynamic": False},
}

_INPUTS: Mapping[bool, Mapping[str, Any]] = {
    False: {**_INT8, "strategy": "tensor", "dynamic": False},
    True: {**_INT8, "strategy": "token", "dynamic": True},
}
"""Whether each token has a scale of its own → arguments."""


def quantization_config(modules: Mapping[str, ModulePlan], weights: WeightScheme) -> dict[str, Any]:
    """Return the document.

    Args:
        modules: Every decoder linear, INT8 or kept.
        weights: How INT8 weights are scaled.
    """
    groups = {
        per_token: _targets(modules, per_token)
        for per_token in _INPUTS
        if any(plan.number_format and plan.per_token is per_token for plan in modules.values())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [LM_HEAD.removesuffix(".weight"), *_names(name for name, plan in modules.items() if _kept(plan))],
        "config_groups": {
            f"group_{index}": {
                "targets": targets if len(groups) > 1 else ["Linear"],
                "weights": dict(_WEIGHTS[weights]),
                "input_activations": dict(_INPUTS[per_token]),
                "output_activations": None,
                "format": FORMAT,
            }
            for index, (per_token, targets) in enumerate(groups.items())
        },
    }


def _kept(plan: ModulePlan) -> bool:
    return plan.number_format is None


def _targets(modules: Mapping[str, ModulePlan], per_token: bool) -> list[str]:
    return _names(name for name, plan in modules.items() if plan.number_format and plan.per_token is per_token)


def _names(modules: Iterator[str]) -> list[str]:
    """Return the names, one expression in place of the experts of a layer."""
    return list(dict.fromkeys(_experts(name) if expert_of(name) is not None else name for name in modules))


def _experts(name: str) -> str:
    block = name[: name.index(".experts.")]
    return f"re:{re.escape(block)}\\.experts\\..+"
