"""GGUF files: what was written is read, in Hugging Face's layout; what is damaged or foreign is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spike_export.calibration.checkpoint import open_checkpoint
from spike_export.calibration.errors import CheckpointError
from spike_export.calibration.gguf_checkpoint import rope_halves_from_pairs
from spike_export.calibration.reference_model import load_reference_model
from tests.tiny_checkpoints import BOS, EOS, WrittenGguf, llama_cpp_permuted, random_llama, write_gguf, write_hf

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenGguf:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf", random_llama())


def test_every_tensor_is_read_in_hugging_faces_layout(written: WrittenGguf) -> None:
    checkpoint = open_checkpoint(str(written.path))
    assert checkpoint.name == "tiny-Q8_0"
    assert set(checkpoint.tensors.shapes) == set(written.expected)
    for name, values in written.expected.items():
        read = checkpoint.tensor(name)
        assert read.dtype == np.float32
        assert read.shape == checkpoint.tensors.shapes[name] == values.shape
        np.testing.assert_array_equal(read, values, err_msg=name)


def test_the_permutation_matters(written: WrittenGguf) -> None:
    # Must fail without it: the stored rows differ from the read ones.
    name = "model.layers.0.self_attn.k_proj.weight"
    assert not np.array_equal(llama_cpp_permuted(written.expected[name], 2), written.expected[name])


def test_permutation_by_hand() -> None:
    rows = np.arange(8, dtype=np.float32)  # one head: pairs (0,1), (2,3), ... in the file
    assert rope_halves_from_pairs(rows, 1).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert rope_halves_from_pairs(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_configuration_is_read(written: WrittenGguf) -> None:
    checkpoint, expected = open_checkpoint(str(written.path)), random_llama().config
    config = checkpoint.config
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "tie_word_embeddings",
    ):
        assert getattr(config, key) == getattr(expected, key), key
    assert config.rms_norm_eps == pytest.approx(expected.rms_norm_eps, rel=1e-6)  # a float32 in the file
    assert config.hf["rope_parameters"]["rope_theta"] == 10000.0
    assert (config.bos_token_id, config.eos_token_ids) == (BOS, (EOS,))
    assert checkpoint.bos_token_id == 0
    assert checkpoint.generation_config == {}


def test_the_tokenizer_is_read(written: WrittenGguf) -> None:
    tokenizer: Any = open_checkpoint(str(written.path)).tokenizer
    encoded = tokenizer.backend_tokenizer.encode("a\nü", add_special_tokens=False).ids
    assert encoded == [byte + 2 for byte in "a\nü".encode()]
    assert tokenizer.decode(encoded) == "a\nü"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)


def test_gguf_computes_what_hugging_faces_format_computes(written: WrittenGguf, tmp_path: Path) -> None:
    model = random_llama()
    model.load_state_dict({name: torch.from_numpy(np.array(v)) for name, v in written.expected.items()})
    twin = load_reference_model(open_checkpoint(str(write_hf(tmp_path / "twin", model))))
    ours = load_reference_model(open_checkpoint(str(written.path)))
    ids = np.arange(60).reshape(2, 30)
    # The same float32 weights; only the norm's epsilon is rounded in the file.
    torch.testing.assert_close(ours.hidden_states(ids), twin.hidden_states(ids), atol=1e-5, rtol=0)


def test_a_tied_head(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "tied.gguf", random_llama(tie_word_embeddings=True))
    checkpoint = open_checkpoint(str(written.path))
    assert checkpoint.config.tie_word_embeddings
    np.testing.assert_array_equal(checkpoint.tensor("lm_head.weight"), written.expected["model.embed_tokens.weight"])


def test_a_changed_weight_changes_the_hash(written: WrittenGguf, tmp_path: Path) -> None:
    model = random_llama()
    model.model.layers[2].mlp.up_proj.weight[0, 0] += 1.0
    changed = write_gguf(tmp_path / "changed.gguf", model)
    before = open_checkpoint(str(written.path)).tensors.sha256()
    assert open_checkpoint(str(changed.path)).tensors.sha256() != before
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(written.path.read_bytes())
    assert open_checkpoint(str(copy)).tensors.sha256() == before


def llama3_divisors(**changes: float) -> np.ndarray:
    """Return what llama.cpp's converter stores as rope_freqs: its formula, restated from LLaMA 3's publication."""
    rope = LLAMA3 | changes
    old = float(rope["original_max_position_embeddings"])
    low, high = old / float(rope["low_freq_factor"]), old / float(rope["high_freq_factor"])
    divisors = []
    for index in range(8):
        wavelength = 2 * np.pi * float(rope["rope_theta"]) ** (index / 8)
        smooth = (old / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        if wavelength < high:
            divisors.append(1.0)
        elif wavelength > low:
            divisors.append(rope["factor"])
        else:
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def test_llama3_rope_is_recovered(tmp_path: Path) -> None:
    model = random_llama(rope_parameters=LLAMA3)
    written = write_gguf(tmp_path / "llama3.gguf", model, rope_freqs=llama3_divisors())
    rope = open_checkpoint(str(written.path)).config.hf["rope_parameters"]
    assert {key: rope[key] for key in LLAMA3} == LLAMA3
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=dict(rope))
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(frequencies.numpy(), plain / llama3_divisors(), rtol=1e-5)  # float32 powers


@pytest.mark.parametrize(
    "divisors",
    [
        llama3_divisors(high_freq_factor=8.0),
        llama3_divisors(original_max_position_embeddings=4096.0),
        np.linspace(1, 32, 8),
        np.ones(8) * 2,
        np.zeros(8),
        np.full(8, np.nan),
    ],
)
def test_another_scaling_is_refused_rather_than_approximated(tmp_path: Path, divisors: np.ndarray) -> None:
    model = random_llama(rope_parameters=LLAMA3)
    written = write_gguf(tmp_path / "odd.gguf", model, rope_freqs=divisors)
    assert "rope_freqs.weight is not LLaMA 3's scaling; this rope is not supported" in refusal(written.path)


def test_linear_scaling_is_read_and_other_kinds_are_refused(tmp_path: Path) -> None:
    keys: dict[str, int | str | float] = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    linear = write_gguf(tmp_path / "linear.gguf", random_llama(), extra=keys)
    rope = open_checkpoint(str(linear.path)).config.hf["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 4.0, 10000.0)
    yarn = write_gguf(tmp_path / "yarn.gguf", random_llama(), extra=keys | {"llama.rope.scaling.type": "yarn"})
    assert "rope type 'yarn' is not supported (supported: default, linear, llama3)" in refusal(yarn.path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", random_llama(), architecture="qwen2")
    assert refusal(other.path) == f"{other.path}: GGUF architecture 'qwen2' is not supported (supported: llama)"


def test_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    moe = write_gguf(tmp_path / "moe.gguf", random_llama(), extra={"llama.expert_count": 8})
    assert "mixture-of-experts models are not supported" in refusal(moe.path)
    dense = write_gguf(tmp_path / "dense.gguf", random_llama(), extra={"llama.expert_count": 0})
    assert open_checkpoint(str(dense.path)).config.num_hidden_layers == 3


def test_fewer_layers_than_announced(tmp_path: Path) -> None:
    model = random_llama()
    model.config.num_hidden_layers = 4
    written = write_gguf(tmp_path / "short.gguf", model)
    message = refusal(written.path)
    assert "tensor model.layers.3." in message
    assert "the checkpoint is incomplete or of another model" in message


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.05, 0.2, 0.5, 0.9])
def test_a_truncated_file_is_refused(written: WrittenGguf, tmp_path: Path, share: float) -> None:
    content = written.path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: int(len(content) * share)])
    message = refusal(cut)
    assert "damaged or truncated GGUF file (" in message
    assert message.endswith("download it again")


def test_a_file_that_lacks_its_last_bytes_is_refused(written: WrittenGguf, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(written.path.read_bytes()[:-32])  # up to 31 bytes are padding
    assert "damaged or truncated GGUF file (" in refusal(cut)


def test_not_a_gguf_file_at_all(tmp_path: Path) -> None:
    for content in (b"GGUF", b"not a model" * 99, json.dumps({"a": 1}).encode()):
        (tmp_path / "fake.gguf").write_bytes(content)
        assert "damaged or truncated GGUF file" in refusal(tmp_path / "fake.gguf")


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_header_is_refused_or_harmless(written: WrittenGguf, tmp_path: Path, seed: int) -> None:
    # Bytes of the header overwritten at random: either the error names the file, or it opens (a changed token).
    content = bytearray(written.path.read_bytes())
    random = np.random.default_rng(seed)
    for position in random.integers(8, 900, 6):
        content[position] = random.integers(0, 256)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    try:
        open_checkpoint(str(damaged))
    except CheckpointError as error:
        assert str(error).startswith(str(damaged))  # noqa: PT017  (opening may succeed)
