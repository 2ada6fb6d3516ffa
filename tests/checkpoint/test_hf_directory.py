"""HF directories: what is read bit for bit, and what is refused in one line."""

import json
import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from spike_export.artifacts.errors import CheckpointError
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.checkpoint.checkpoint import EMBEDDING, LM_HEAD, Checkpoint
from spike_export.checkpoint.hf_directory import looks_like_hub_id
from spike_export.checkpoint.opening import open_checkpoint
from tests.support.tiny.checkpoints import (
    BOS,
    EOS,
    random_llama,
    state,
    write_config,
    write_hf,
    write_tokenizer,
    write_weights,
)

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "tiny", random_llama())


def refusal(source: Path | str) -> str:
    """Return the message with which a checkpoint is refused; it is one line."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(source))
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "REMOVE"}))


def all_tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: checkpoint.tensors.read(name) for name in checkpoint.tensors.shapes}


def test_every_tensor_is_read_as_written(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    expected = state(random_llama())
    assert checkpoint.name == "tiny"
    assert set(checkpoint.tensors.shapes) == set(expected)
    for name, tensor in expected.items():
        read = checkpoint.tensor(name)
        assert read.dtype == np.float32
        assert checkpoint.tensors.shapes[name] == tuple(tensor.shape)
        np.testing.assert_array_equal(read, tensor.numpy())


def test_the_configuration_is_read(folder: Path) -> None:
    config = open_checkpoint(str(folder)).config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (3, 64, 16)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.sliding_window is None
    assert config.eos_token_ids == (EOS,)
    assert config.family.model_type == "llama"


def test_sharded_is_unsharded(folder: Path, tmp_path: Path) -> None:
    sharded = open_checkpoint(str(write_hf(tmp_path / "sharded", random_llama(), shards=3)))
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    whole = all_tensors(open_checkpoint(str(folder)))
    parts = all_tensors(sharded)
    assert set(parts) == set(whole)
    for name, tensor in whole.items():
        np.testing.assert_array_equal(parts[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_are_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(str(write_hf(tmp_path / "half", random_llama(), dtype=dtype)))
    for name, tensor in state(random_llama()).items():
        read = checkpoint.tensor(name)
        assert read.dtype == np.float32
        # Exact both ways: what is read is the written value, which is the float32 one rounded.
        assert torch.equal(torch.from_numpy(read).to(dtype), tensor.to(dtype))
        np.testing.assert_array_equal(read, tensor.to(dtype).double().numpy())


@pytest.mark.parametrize("stored", [[EMBEDDING], [LM_HEAD], [EMBEDDING, LM_HEAD]])
def test_a_tied_head_is_found_under_either_name(tmp_path: Path, stored: list[str]) -> None:
    model = random_llama(tie_word_embeddings=True)
    folder = write_hf(tmp_path / "tied", model)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors.pop(EMBEDDING)
    write_weights(folder, tensors | {name: embedding.clone() for name in stored})
    checkpoint = open_checkpoint(str(folder))
    np.testing.assert_array_equal(checkpoint.tensor(EMBEDDING), embedding.numpy())
    np.testing.assert_array_equal(checkpoint.tensor(LM_HEAD), embedding.numpy())
    ids = np.arange(40).reshape(2, 20) + 3
    ours = Decoder(checkpoint)
    expected = model(torch.from_numpy(ids)).logits
    torch.testing.assert_close(ours.head().logits(ours.run(ids).get(0)), expected, atol=1e-4, rtol=0)


def test_an_untied_head_never_stands_in(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[LM_HEAD]
    write_weights(folder, tensors)
    assert "tensor lm_head.weight is missing" in refusal(folder)


def test_a_changed_weight_changes_the_hash(folder: Path, tmp_path: Path) -> None:
    same = write_hf(tmp_path / "again", random_llama())
    assert open_checkpoint(str(same)).tensors.sha256() == open_checkpoint(str(folder)).tensors.sha256()
    tensors = load_file(same / "model.safetensors")
    tensors[DOWN][3, 4] += 1e-6
    write_weights(same, tensors)
    assert open_checkpoint(str(same)).tensors.sha256() != open_checkpoint(str(folder)).tensors.sha256()


def test_a_changed_shard_changes_the_hash(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "sharded", random_llama(), shards=3)
    before = open_checkpoint(str(folder)).tensors.sha256()
    last = folder / "model-00003-of-00003.safetensors"
    tensors = load_file(last)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, last, metadata={"format": "pt"})
    assert open_checkpoint(str(folder)).tensors.sha256() != before


def test_generation_config_is_passed_on(folder: Path) -> None:
    assert open_checkpoint(str(folder)).generation_config == {}
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    assert open_checkpoint(str(folder)).generation_config == {"temperature": 0.5}


def special(bos: int | None, eos: int | None) -> Any:
    return SimpleNamespace(bos_token_id=bos, eos_token_id=eos)


@pytest.mark.parametrize(
    ("tokenizer", "config_bos", "config_eos", "expected"),
    [
        (special(0, 9), 5, (6,), 0),  # 0 is an id, not "none"
        (special(3, 9), 5, (6,), 3),
        (special(None, 9), 5, (6,), 5),
        (special(None, 9), 0, (6,), 0),
        (special(None, 9), None, (6,), 9),
        (special(None, 0), None, (6,), 0),
        (special(None, None), None, (6, 7), 6),
        (special(None, None), None, (), None),
        (None, 5, (6,), 5),
        (None, None, (0,), 0),
        (None, None, (), None),
    ],
)
def test_bos(
    folder: Path, tokenizer: Any, config_bos: int | None, config_eos: tuple[int, ...], expected: int | None
) -> None:
    checkpoint = open_checkpoint(str(folder))
    config = replace(checkpoint.config, bos_token_id=config_bos, eos_token_ids=config_eos)
    assert replace(checkpoint, config=config, tokenizer=tokenizer).bos_token_id == expected


def test_bos_zero_of_a_real_tokenizer(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.bos_token_id == BOS == 0
    assert checkpoint.bos_token_id == 0
    write_tokenizer(folder, bos=None)
    change_config(folder, bos_token_id=None, eos_token_id=[7, 8])
    changed = open_checkpoint(str(folder))
    assert changed.config.eos_token_ids == (7, 8)
    assert changed.bos_token_id == EOS  # the tokenizer's EOS


def test_without_a_tokenizer_a_checkpoint_still_opens(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert open_checkpoint(str(folder)).tokenizer is None


# Bad input.


def test_a_missing_path(tmp_path: Path) -> None:
    for source in (tmp_path / "none", tmp_path / "none.gguf"):
        assert refusal(source) == (
            f"{source}: no such file or directory; give an HF directory, a .gguf file or a hub id"
        )


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert refusal(tmp_path / "model.onnx") == (
        f"{tmp_path / 'model.onnx'}: not a .gguf file; give an HF directory, a .gguf file or a hub id"
    )


def test_an_empty_folder(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert message == f"{tmp_path / 'config.json'}: this file is missing; is {tmp_path} a model directory?"


def test_another_architecture_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2Config().to_dict()))
    message = refusal(tmp_path)
    assert "architecture 'gpt2' is not supported (supported: gemma, gemma2, gemma3_text, granite, llama," in message
    assert "it lacks hidden_size, intermediate_size" in message
    assert "rms_norm_eps" in message


@pytest.mark.parametrize("rope", ["proportional", "invented"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_an_unknown_rope_is_named(folder: Path, rope: str, key: str) -> None:
    scaling = {
        "rope_type": rope,
        "rope_theta": 1e4,
        "factor": 2.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0] * 8,
        "original_max_position_embeddings": 64,
    }
    change_config(folder, **({"rope_parameters": "REMOVE"} | {key: scaling}))
    message = refusal(folder)
    assert (
        f"rope type '{rope}' is not supported (supported: default, linear, dynamic, llama3, yarn, longrope)" in message
    )
    assert str(folder / "config.json") in message


def test_the_older_spelling_of_rope_scaling_is_understood(folder: Path) -> None:
    change_config(folder, rope_parameters="REMOVE", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    rope = open_checkpoint(str(folder)).config.hf["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, 5e5)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"hidden_size": "REMOVE"}, "missing hidden_size; is this the model's own config.json?"),
        ({"rms_norm_eps": None, "vocab_size": None}, "missing vocab_size, rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported for llama: silu"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3 key/value heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; expected a whole number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"head_dim": 15}, "head_dim is 15; rotary embedding needs an even number"),
        ({"head_dim": 0}, "head_dim is 0; expected a whole number above 0"),
        ({"hidden_size": "many"}, "hidden_size is 'many'; expected a whole number"),
        ({"vocab_size": [1]}, "vocab_size is [1]; expected a whole number"),
        ({"rope_parameters": "x"}, "transformers refuses this configuration: "),
        ({"eos_token_id": "x"}, "transformers refuses this configuration: "),
        ({"hidden_size": 96}, "the configuration says"),
        ({"model_type": "REMOVE"}, "architecture 'None' is not supported"),
    ],
)
def test_a_damaged_configuration_is_refused(folder: Path, changes: dict[str, Any], fault: str) -> None:
    change_config(folder, **changes)
    message = refusal(folder)
    assert fault in message
    assert str(folder) in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xff", b"null"])
def test_a_damaged_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert "JSON" in message


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "tiny", random_llama(), shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.unlink()
    assert refusal(folder) == f"{shard}: this shard is missing; download it again"


def test_a_shard_without_its_tensor(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "tiny", random_llama(), shards=3)
    index = folder / "model.safetensors.index.json"
    shard = folder / json.loads(index.read_text())["weight_map"][DOWN]
    tensors = load_file(shard)
    del tensors[DOWN]
    save_file(tensors, shard, metadata={"format": "pt"})
    assert refusal(folder) == f"{shard}: tensor {DOWN} is missing from this shard; download it again"


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "{"])
def test_a_damaged_index(tmp_path: Path, content: str) -> None:
    folder = write_hf(tmp_path / "tiny", random_llama(), shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    assert refusal(folder).startswith(f"{index}: ")


def test_an_index_that_forgets_a_tensor(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "tiny", random_llama(), shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][DOWN]
    index.write_text(json.dumps(content))
    assert f"tensor {DOWN} is missing; the checkpoint is incomplete or of another model" in refusal(folder)


def test_missing_and_wrong_tensors_are_counted(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors[DOWN] = tensors[DOWN].T.contiguous()
    write_weights(folder, tensors)
    assert refusal(folder) == (
        f"{folder}: tensor {DOWN} has shape [96, 64], the configuration says [64, 96] (and 1 more faults); "
        "the checkpoint is incomplete or of another model"
    )


def test_an_unsupported_number_format(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN] = tensors[DOWN].to(torch.int8)
    write_weights(folder, tensors)
    message = refusal(folder)
    assert f"tensor {DOWN} has type I8; supported: F32, F16, BF16" in message


@pytest.mark.parametrize("length", [0, 4, 8, 500, 5000, -1])
def test_truncated_safetensors(folder: Path, length: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    message = refusal(folder)
    assert message.startswith(f"{weights}: damaged safetensors file (")
    assert message.endswith("download it again")


def test_a_header_that_claims_too_much(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes((1 << 62).to_bytes(8, "little") + weights.read_bytes()[8:])
    assert "damaged safetensors file" in refusal(folder)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_and_never_loaded(tmp_path: Path, name: str) -> None:
    folder, mark = tmp_path / "pickled", tmp_path / "exploded"
    write_config(folder, random_llama())
    write_tokenizer(folder)
    (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    assert refusal(folder) == (
        f"{folder}: no safetensors weights (only {name}, which is a pickle and never loaded: convert it to safetensors)"
    )
    assert not mark.exists()
    pickle.loads((folder / name).read_bytes())  # the bomb is a real one
    assert mark.exists()


def test_a_pickle_under_a_safetensors_name_is_not_loaded_either(tmp_path: Path) -> None:
    folder, mark = tmp_path / "pickled", tmp_path / "exploded"
    write_config(folder, random_llama())
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    assert "damaged safetensors file" in refusal(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Bomb(mark)}, folder / "evil.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {DOWN: "evil.bin"}}))
    assert "damaged safetensors file" in refusal(folder)
    assert not mark.exists()


def test_no_weights_at_all(tmp_path: Path) -> None:
    write_config(tmp_path, random_llama())
    assert refusal(tmp_path) == f"{tmp_path}: no safetensors weights (expected model.safetensors)"


def test_half_of_a_character_in_the_configuration(folder: Path) -> None:
    """JSON can spell it with an escape, and no file can hold it."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"note": "\ud800"}))
    assert "config.json: cannot be read as JSON ('utf-8' codec can't encode character" in refusal(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_damaged_tokenizer(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    assert refusal(folder).startswith(f"{folder}: cannot load the tokenizer: ")


def test_code_in_the_model_folder_does_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n")
    change_config(folder, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = open_checkpoint(str(folder))
    Decoder(checkpoint).run(np.zeros((1, 4), np.int64))
    assert not mark.exists()


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("offline mode must not open a connection")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.chdir(tmp_path)
    message = refusal("nobody/nothing-of-this-name")
    assert message.startswith("nobody/nothing-of-this-name: no such local path, and the hub download failed (")
    assert message.endswith("give a local directory or a .gguf file to work offline")


@pytest.mark.parametrize(
    ("source", "is_id"),
    [
        ("meta-llama/Llama-2-7b-hf", True),
        ("a/b.c_d-e", True),
        ("./a/b", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("a", False),
        ("../b", False),
        ("~/b", False),
        ("a/", False),
    ],
)
def test_what_may_be_asked_of_the_hub(source: str, is_id: bool) -> None:
    assert looks_like_hub_id(source) is is_id


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/outside.safetensors", "a/../../outside.safetensors"])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, place: str) -> None:
    folder = write_hf(tmp_path / "tiny", random_llama(), shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = folder / content["weight_map"][DOWN]
    (tmp_path / "outside.safetensors").write_bytes(shard.read_bytes())
    content["weight_map"][DOWN] = place
    index.write_text(json.dumps(content))
    assert refusal(folder) == f"{index}: {place!r} lies outside of the model's folder; download the index again"
