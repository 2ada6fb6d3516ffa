"""Values that no model has: each is refused where it is read, by its name."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spike_export.artifacts.errors import CheckpointError
from spike_export.checkpoint.decoder_config import decoder_config
from spike_export.checkpoint.gguf_file import open_gguf
from tests.support.tiny.checkpoints import random_decoder, random_llama, tiny_config, write_gguf

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
PER_KIND = {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": DEFAULT}}
GEMMA2 = {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": DEFAULT | {"rope_theta": "x"}}, "rope_theta"),
        ({"rope_parameters": DEFAULT | {"rope_theta": [1]}}, "rope_theta"),
        ({"rope_parameters": DEFAULT | {"rope_theta": True}}, "rope_theta is True"),
        ({"rope_parameters": DEFAULT | {"rope_theta": math.inf}}, "rope_theta is inf"),
        (PER_KIND, "rope_parameters hold a rope for 'full_attention', and all layers of llama models share one"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"eos_token_id": [1, 2.5]}, "eos_token_id|special token"),
        (GEMMA2 | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        (GEMMA2 | {"query_pre_attn_scalar": -4}, "query_pre_attn_scalar is -4"),
        (GEMMA2 | {"final_logit_softcapping": math.nan}, "final_logit_softcapping is nan"),
        (GEMMA2 | {"sliding_window": 10**30}, "sliding_window is 1000"),
        (GEMMA2 | {"sliding_window": -3}, "sliding_window is -3"),
        (GEMMA2 | {"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_a_configuration_is_refused_by_the_value(changes: dict[str, Any], message: str) -> None:
    raw = tiny_config().to_dict() | changes
    with pytest.raises(CheckpointError, match=message) as caught:
        decoder_config(raw, "config.json")
    assert str(caught.value).startswith("config.json: ")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": "x"}, "rope.scaling.factor is 'x'"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": [True]}, "rope.scaling.factor is \\[True"),
        ({"split.count": "x"}, "split.count is 'x'"),
    ],
)
def test_metadata_of_a_wrong_type(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_llama(num_hidden_layers=1), extra=extra).path
    with pytest.raises(CheckpointError, match=message):
        open_gguf(path)


def test_an_embedding_that_is_no_matrix(tmp_path: Path) -> None:
    changed = {"token_embd.weight": np.zeros(64, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", random_llama(num_hidden_layers=1), tensors=changed).path
    with pytest.raises(CheckpointError, match=r"token_embd.weight is no matrix"):
        open_gguf(path)


@pytest.mark.parametrize("divisors", [np.zeros(8), np.full(8, np.nan), np.zeros((2, 8))])
@pytest.mark.filterwarnings("error")
def test_divisors_of_frequencies_that_are_none(tmp_path: Path, divisors: Any) -> None:
    changed = {"rope_freqs.weight": divisors.astype(np.float32)}
    path = write_gguf(tmp_path / "m.gguf", random_llama(num_hidden_layers=1), tensors=changed).path
    with pytest.raises(CheckpointError, match="holds no divisors"):
        open_gguf(path)


def test_no_head_in_a_family_whose_scale_follows_from_the_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_decoder("gemma2", num_hidden_layers=2)
    monkeypatch.setattr(
        "gguf.GGUFWriter.add_head_count", lambda self, _: self.add_uint32("gemma2.attention.head_count", 0)
    )
    path = write_gguf(tmp_path / "m.gguf", model).path
    with pytest.raises(CheckpointError, match=r"gemma2\.attention\.head_count is 0"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("old", "new"), [(b"llama.context_length", b"llama.context_\xffength"), (b"\0llama", b"\0ll\xffma")]
)
def test_a_text_that_is_no_utf_8(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_llama(num_hidden_layers=1)).path
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(CheckpointError, match="damaged or truncated GGUF file"):
        open_gguf(path)
