"""GGUF files: what was written is read, in Hugging Face's layout; what is damaged or foreign is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from spike_export.artifacts.errors import CheckpointError
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.gguf_file import ARCHITECTURES, GgufSource, rope_halves_from_pairs
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.checkpoint.rope_frequencies import RopeScaling, frequencies
from tests.support.tiny.checkpoints import (
    BOS,
    EOS,
    GGUF_LAYOUTS,
    PIECES,
    WrittenGguf,
    llama_cpp_permuted,
    random_decoder,
    random_llama,
    write_gguf,
)

FAMILIES = sorted(GGUF_LAYOUTS)
SUPPORTED = "llama, qwen2, qwen3, gemma, gemma2, gemma3"

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


def test_a_block_of_queries_or_keys_is_read_without_the_others(
    written: WrittenGguf, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(written.path))
    names = [f"model.layers.1.self_attn.{linear}.weight" for linear in ("q_proj", "k_proj")]  # 4 and 2 heads
    expected = [checkpoint.tensor(name) for name in names]

    def refused(*_: object) -> NDArray[np.float32]:
        raise AssertionError("the whole tensor was read")

    monkeypatch.setattr(GgufSource, "read", refused)
    for name, whole in zip(names, expected, strict=True):
        blocks = np.full(whole.shape, np.nan, np.float32)
        with checkpoint.block_reader(name) as read:
            for top in range(0, len(whole), 7):  # blocks that heads do not end with
                rows = slice(top, min(top + 7, len(whole)))
                read(rows, blocks[rows])
        np.testing.assert_array_equal(blocks, whole)
        with pytest.raises(IndexError):
            checkpoint.rows(name, np.array([len(whole)]))


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


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_tokenizer_is_the_one_that_transformers_chooses(tmp_path: Path, family: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_decoder(family)).path
    chosen = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name, local_files_only=True)
    tokenizer: Any = open_checkpoint(str(path)).tokenizer
    assert type(tokenizer) is type(chosen)
    assert tokenizer.backend_tokenizer.to_str() == chosen.backend_tokenizer.to_str()
    assert tokenizer.init_kwargs == chosen.init_kwargs


def decoder_logits(checkpoint: Checkpoint, ids: NDArray[np.int64]) -> torch.Tensor:
    decoder = Decoder(checkpoint)
    return decoder.head().logits(decoder.run(ids).get(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_read_and_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    model = random_decoder(family)
    written = write_gguf(tmp_path / "tiny.gguf", model)
    checkpoint = open_checkpoint(str(written.path))
    assert checkpoint.config.family.model_type == family
    assert set(checkpoint.tensors.shapes) == set(written.expected)
    for name, values in written.expected.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), values, err_msg=name)
    # The same float32 weights; only the norm's epsilon is rounded in the file.
    model.load_state_dict({name: torch.from_numpy(values) for name, values in written.expected.items()}, strict=False)
    # transformers 5.20 leaves Gemma 2's soft cap out of its default attention.
    model.set_attn_implementation("eager")
    ids = np.arange(60).reshape(2, 30)  # longer than the window
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)).logits
    error = (decoder_logits(checkpoint, ids) - expected).norm() / expected.norm()
    assert error < 1e-4
    assert expected.std() > 0.1


def test_every_architecture_is_tried() -> None:
    assert {layout.architecture for layout in GGUF_LAYOUTS.values()} == set(ARCHITECTURES)


def gemma3_layer_types(tmp_path: Path, **extra: int | list[bool]) -> list[str]:
    keys = {f"gemma3.attention.{key}": value for key, value in extra.items()}
    written = write_gguf(tmp_path / "gemma3.gguf", random_decoder("gemma3_text"), extra=keys)
    kinds: list[str] = open_checkpoint(str(written.path)).config.hf["layer_types"]
    return [kind.removesuffix("_attention") for kind in kinds]


def test_which_layers_of_gemma_3_slide(tmp_path: Path) -> None:
    assert gemma3_layer_types(tmp_path) == [*["sliding"] * 5, "full", "sliding"]
    assert gemma3_layer_types(tmp_path, sliding_window_pattern=3) == [*["sliding", "sliding", "full"] * 2, "sliding"]
    flags = [True, False, False, True, True, True, False]
    named = ["sliding" if slides else "full" for slides in flags]
    assert gemma3_layer_types(tmp_path, sliding_window_pattern=flags) == named


@pytest.mark.parametrize("pattern", [0, [True, False]])
def test_a_pattern_that_does_not_fit_is_refused(tmp_path: Path, pattern: int | list[bool]) -> None:
    keys = {"gemma3.attention.sliding_window_pattern": pattern}
    written = write_gguf(tmp_path / "odd.gguf", random_decoder("gemma3_text"), extra=keys)
    said = f"gemma3.attention.sliding_window_pattern is {pattern!r}; expected a period, or one flag for each layer"
    assert said in refusal(written.path)


def test_gemma_3_without_a_window_sees_everything(tmp_path: Path) -> None:
    model = random_decoder("gemma3_text")
    model.config.sliding_window = 0
    config = open_checkpoint(str(write_gguf(tmp_path / "wide.gguf", model).path)).config
    assert config.sliding_window is None
    assert set(config.hf["layer_types"]) == {"full_attention"}


def test_both_ropes_of_gemma_3(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
        "gemma3.rope.freq_base_swa": 20000.0,
    }
    scaled = write_gguf(tmp_path / "scaled.gguf", random_decoder("gemma3_text"), extra=keys)
    assert open_checkpoint(str(scaled.path)).config.hf["rope_parameters"] == {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
    }
    plain = write_gguf(tmp_path / "plain.gguf", random_decoder("gemma3_text"))
    rope = open_checkpoint(str(plain.path)).config.hf["rope_parameters"]
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_size_whose_queries_are_scaled_by_the_hidden_size(tmp_path: Path, family: str, layers: int) -> None:
    large = write_gguf(tmp_path / "27b.gguf", random_decoder(family, num_hidden_layers=layers))
    assert open_checkpoint(str(large.path)).config.hf["query_pre_attn_scalar"] == 64 // 4
    small = write_gguf(tmp_path / "small.gguf", random_decoder(family))
    assert open_checkpoint(str(small.path)).config.hf["query_pre_attn_scalar"] == 32


def test_caps_of_gemma_2(tmp_path: Path) -> None:
    model = random_decoder("gemma2", attn_logit_softcapping=40.0, final_logit_softcapping=20.0)
    config = open_checkpoint(str(write_gguf(tmp_path / "capped.gguf", model).path)).config
    assert (config.hf["attn_logit_softcapping"], config.factors.final_softcap) == (40.0, 20.0)


def test_gemmas_tokenizer(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    written = write_gguf(
        tmp_path / "gemma3.gguf", random_decoder("gemma3_text"), extra={"tokenizer.chat_template": template}
    )
    checkpoint = open_checkpoint(str(written.path))
    tokenizer: Any = checkpoint.tokenizer
    text = "hello  he\n\n\nü lab"
    encoded = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    # Spaces become U+2581; what the vocabulary lacks becomes bytes; line breaks are pieces of their own.
    spelled = ["hello", "  ", "he", "\n\n", "\n", "<0xC3>", "<0xBC>", "\u2581", "l", "a", "b"]
    assert [PIECES[token] for token in encoded] == spelled
    assert tokenizer.decode(encoded) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 0)
    assert checkpoint.bos_token_id == checkpoint.config.bos_token_id == 2
    assert checkpoint.config.hf["pad_token_id"] == 0
    assert tokenizer.chat_template == template


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


@pytest.mark.parametrize("key", ["rope.dimension_count", "rope.dimension_count_swa"])
def test_a_rope_over_a_part_of_a_head_is_refused(tmp_path: Path, key: str) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", random_llama(), extra={f"llama.{key}": 16})
    assert open_checkpoint(str(whole.path)).config.head_dim == 16
    for rotated in (8, 0, "16"):
        part = write_gguf(tmp_path / "part.gguf", random_llama(), extra={f"llama.{key}": rotated})
        assert f"llama.{key} is {rotated!r}, and a head has 16 channels" in refusal(part.path)


def test_llama3_rope_is_recovered(tmp_path: Path) -> None:
    model = random_llama(rope_parameters=LLAMA3)
    written = write_gguf(tmp_path / "llama3.gguf", model, tensors={"rope_freqs.weight": llama3_divisors()})
    rope = open_checkpoint(str(written.path)).config.hf["rope_parameters"]
    assert {key: rope[key] for key in LLAMA3} == LLAMA3
    found = frequencies(RopeScaling(rope, 16, 8192), 8192).inverse.numpy()
    plain = 500000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(found, plain / llama3_divisors(), rtol=1e-5)  # float32 powers


@pytest.mark.parametrize(
    "divisors",
    [
        llama3_divisors(high_freq_factor=8.0),
        llama3_divisors(original_max_position_embeddings=4096.0),
        np.linspace(1, 32, 8),
        np.ones(8) * 2,
    ],
)
def test_another_scaling_is_refused_rather_than_approximated(tmp_path: Path, divisors: np.ndarray) -> None:
    model = random_llama(rope_parameters=LLAMA3)
    tensors: dict[str, Any] = {"rope_freqs.weight": divisors.astype(np.float32)}
    written = write_gguf(tmp_path / "odd.gguf", model, tensors=tensors)
    assert "rope_freqs.weight is not LLaMA 3's scaling; this rope is not supported" in refusal(written.path)


@pytest.mark.parametrize("divisors", [np.zeros(8), np.full(8, np.nan)], ids=["zeros", "NaN"])
def test_divisors_that_no_frequency_can_have_are_damage(tmp_path: Path, divisors: np.ndarray) -> None:
    tensors: dict[str, Any] = {"rope_freqs.weight": divisors.astype(np.float32)}
    written = write_gguf(tmp_path / "odd.gguf", random_llama(rope_parameters=LLAMA3), tensors=tensors)
    assert "rope_freqs.weight holds no divisors of frequencies; the file is damaged" in refusal(written.path)


def test_linear_scaling_is_read_and_other_kinds_are_refused(tmp_path: Path) -> None:
    keys: dict[str, int | str | float] = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    linear = write_gguf(tmp_path / "linear.gguf", random_llama(), extra=keys)
    rope = open_checkpoint(str(linear.path)).config.hf["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 4.0, 10000.0)
    yarn = write_gguf(tmp_path / "yarn.gguf", random_llama(), extra=keys | {"llama.rope.scaling.type": "yarn"})
    assert "rope type 'yarn' is not read from GGUF files (linear and llama3 are)" in refusal(yarn.path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", random_llama(), architecture="mamba")
    said = f"{other.path}: GGUF architecture 'mamba' is not supported (supported: {SUPPORTED})"
    assert refusal(other.path) == said


def test_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    moe = write_gguf(tmp_path / "moe.gguf", random_llama(), extra={"llama.expert_count": 8})
    assert "mixture-of-experts models are not supported" in refusal(moe.path)
    dense = write_gguf(tmp_path / "dense.gguf", random_llama(), extra={"llama.expert_count": 0})
    assert open_checkpoint(str(dense.path)).config.num_hidden_layers == 3


def test_a_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    part = write_gguf(tmp_path / "part.gguf", random_llama(), extra={"split.count": 3})
    assert "one of 3 parts of a model; join them with llama-gguf-split --merge" in refusal(part.path)


def test_a_file_without_sizes_is_refused(tmp_path: Path) -> None:
    # Every key begins with the architecture's name, so another name hides them all.
    hidden = write_gguf(tmp_path / "hidden.gguf", random_llama(), extra={"general.architecture": "gemma3"})
    assert "missing gemma3.block_count, gemma3.embedding_length, " in refusal(hidden.path)


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("blk.3.post_ffw_norm.weight", "tensor model.layers.3.post_feedforward_layernorm.weight is missing"),
        ("output_norm.weight", "tensor model.norm.weight is missing"),
        ("token_embd.weight", "missing tensor token_embd.weight; the file is not a whole model"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, lacking: str, words: str) -> None:
    short = write_gguf(tmp_path / "short.gguf", random_decoder("gemma3_text"), tensors={lacking: None})
    assert words in refusal(short.path)


def test_a_tensor_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    surplus: dict[str, Any] = {"blk.1.attn_q_norm.weight": np.ones(16, np.float32)}
    written = write_gguf(tmp_path / "surplus.gguf", random_llama(), tensors=surplus)
    message = refusal(written.path)
    assert message.endswith("tensor blk.1.attn_q_norm.weight is not part of a llama model as supported here")


def test_a_tensor_type_that_is_no_weight_is_refused(tmp_path: Path) -> None:
    whole: dict[str, Any] = {"output_norm.weight": np.ones(64, np.int32)}
    written = write_gguf(tmp_path / "whole.gguf", random_llama(), tensors=whole)
    assert refusal(written.path).endswith(
        "tensor output_norm.weight: type I32 cannot be dequantized; take a file of another type, such as Q8_0"
    )


def read_back(path: Path, values: NDArray[Any], kind: gguf.GGMLQuantizationType) -> NDArray[np.float32]:
    """Write one tensor in a type (for uint8 values, as it is), and read it as a checkpoint does."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", values if values.dtype == np.uint8 else gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (record,) = gguf.GGUFReader(path).tensors
    assert record.tensor_type == kind
    return GgufSource(path, {"t": record}, {}).read("t")


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    # Half a step, as a share of a block's largest value: 2^-11 and 2^-9 of the value; 1/127; 1/15 and 1/31 of the
    # span, or, where zero is a level, 1/8 and 1/16.
    [
        ("F32", 0.0),
        ("F16", 5e-4),
        ("BF16", 4e-3),
        ("Q8_0", 4.5e-3),
        ("Q5_1", 0.04),
        ("Q5_0", 0.07),
        ("Q4_1", 0.08),
        ("Q4_0", 0.14),
    ],
)
def test_a_type_that_gguf_writes_is_read(tmp_path: Path, kind: str, tolerance: float) -> None:
    values = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    read = read_back(tmp_path / "one.gguf", values, gguf.GGMLQuantizationType[kind])
    blocks = np.abs(values).reshape(8, 2, 32).max(axis=2, keepdims=True)
    error = np.abs(read - values).reshape(8, 2, 32) / blocks
    assert error.max() <= tolerance
    assert error.max() > tolerance / 4 or tolerance == 0  # the bound is of the type's own size


def half(raw: NDArray[np.uint8]) -> float:
    return float(raw.view(np.float16)[0])


def six_bit_scales(q: list[int]) -> list[tuple[int, int]]:
    """Return (scale, minimum) of the eight parts of a Q4_K or Q5_K block, as ggml's get_scale_min_k4."""
    low = [(q[j] & 63, q[j + 4] & 63) for j in range(4)]
    high = [((q[j + 4] & 15) | ((q[j - 4] >> 6) << 4), (q[j + 4] >> 4) | ((q[j] >> 6) << 4)) for j in range(4, 8)]
    return low + high


def q4_k(raw: NDArray[np.uint8]) -> list[float]:
    d, low, quants = half(raw[:2]), half(raw[2:4]), raw[16:].tolist()
    return [
        d * scale * ((quants[part // 2 * 32 + i] >> part % 2 * 4) & 15) - low * minimum
        for part, (scale, minimum) in enumerate(six_bit_scales(raw[4:16].tolist()))
        for i in range(32)
    ]


def q5_k(raw: NDArray[np.uint8]) -> list[float]:
    d, low, high, quants = half(raw[:2]), half(raw[2:4]), raw[16:48].tolist(), raw[48:].tolist()
    return [
        d * scale * (((quants[part // 2 * 32 + i] >> part % 2 * 4) & 15) + 16 * (high[i] >> part & 1)) - low * minimum
        for part, (scale, minimum) in enumerate(six_bit_scales(raw[4:16].tolist()))
        for i in range(32)
    ]


def q6_k(raw: NDArray[np.uint8]) -> list[float]:
    low, high, scales = raw[:128].tolist(), raw[128:192].tolist(), raw[192:208].view(np.int8).tolist()
    values = []
    for i in range(256):
        half_block, part, column = i // 128, i % 128 // 32, i % 32
        nibble = low[half_block * 64 + part % 2 * 32 + column] >> part // 2 * 4 & 15
        quant = nibble | (high[half_block * 32 + column] >> part * 2 & 3) << 4
        values.append(half(raw[208:]) * scales[i // 16] * (quant - 32))
    return values


@pytest.mark.parametrize(
    ("kind", "size", "halves", "formula"),
    [("Q4_K", 144, (0, 2), q4_k), ("Q5_K", 176, (0, 2), q5_k), ("Q6_K", 210, (208,), q6_k)],
)
def test_a_type_that_gguf_cannot_write_is_read_as_ggml_defines_it(
    tmp_path: Path, kind: str, size: int, halves: tuple[int, ...], formula: Any
) -> None:
    # Random blocks against the formulas of ggml-quants.c, element by element.
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (4, 2 * size), dtype=np.uint8)
    for start in [block * size + at for block in range(2) for at in halves]:
        blocks[:, start : start + 2] = random.uniform(0.001, 0.01, (4, 1)).astype(np.float16).view(np.uint8)
    read = read_back(tmp_path / "one.gguf", blocks, gguf.GGMLQuantizationType[kind])
    assert read.shape == (4, 512)
    by_hand = [formula(block) for block in blocks.reshape(8, size)]
    np.testing.assert_allclose(read.reshape(8, 256), by_hand, rtol=1e-5, atol=1e-6)


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


def test_an_array_that_the_file_cannot_hold_is_refused_at_once(tmp_path: Path) -> None:
    """gguf alone makes a list of as many entries as are claimed: 5 GB in 40 s for these 50 bytes."""
    path = tmp_path / "array.gguf"
    name, kind, values = b"a.b", 9, 4  # an array of UINT32
    header = struct.pack("<IIQQ", 0x46554747, 3, 0, 1)
    path.write_bytes(header + struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", kind, values, 1 << 40))
    message = refusal(path)
    assert "damaged or truncated GGUF file (an array of metadata claims 1,099,511,627,776 values)" in message


@pytest.mark.parametrize(("layers", "named"), [(2 * 10**7, "20000000"), (2**32 - 1, "4294967295"), (0, "0")])
def test_a_number_of_layers_that_no_model_has_is_refused(tmp_path: Path, layers: int, named: str) -> None:
    path = tmp_path / "layers.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert f"llama.block_count is {named}; expected 1 to 10,000 layers" in refusal(path)
