"""The documents beside the graph, key by key: other programs read them by these names."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from spike_export.artifacts.errors import ArtifactError, RecipeError
from spike_export.artifacts.manifest import Manifest
from spike_export.artifacts.recipe import Dtype, HeadScheme, ModulePlan, Scheme
from spike_export.checkpoint.modules import linears
from spike_export.export import model_export
from spike_export.export.bundle import ExportOptions, export_bundle, recipe_sha256
from spike_export.export.cache_options import CacheOptions
from spike_export.export.engine_support import supporting_engines
from spike_export.export.files.model_files import genai_config, generation_config, hf_config
from spike_export.export.model_export import export
from spike_export.export.preconditions import require_quantized
from tests.support.tiny.models import tiny_llama, tiny_recipe

CHECKPOINT = tiny_llama().checkpoint
PER_TOKEN = "model.layers.1.mlp.up_proj"
KEPT: dict[str, Dtype] = {"model.layers.0.mlp.down_proj": "float16"}
SCHEME = Scheme(head="int8-per-token-dynamic")
MODULES = linears(CHECKPOINT.config)
STATIC = tiny_recipe(CHECKPOINT, dict.fromkeys(MODULES, 0.1), kept=KEPT, prefix=(1, 7), scheme=SCHEME)
RECIPE = STATIC.model_copy(
    update={"modules": {**STATIC.modules, PER_TOKEN: ModulePlan(precision="int8", activations="per-token")}}
)


def tensors(past: str | int, present: str | int) -> list[dict[str, Any]]:
    """Describe the cache's tensors of two layers."""
    return [
        {"name": f"{stem}.{layer}.{kind}", "dtype": "float16", "shape": ["batch", 2, slots, 16]}
        for stem, slots in (("past_key_values", past), ("present", present))
        for layer in range(2)
        for kind in ("key", "value")
    ]


def test_the_whole_manifest(tmp_path: Path) -> None:
    export_bundle(CHECKPOINT, RECIPE, ExportOptions("float16"), tmp_path / "b")
    found = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert set(found.pop("tools")) == {"spike-export", "numpy", "onnx", "onnx-ir", "transformers"}
    layers = 2 * (64 + 32 + 32 + 64 + 3 * 80) * 48
    cache = tensors("past", "present")
    assert found == {
        "format": 1,
        "model": {
            "source": "tiny",
            "architecture": "llama",
            "checkpoint_sha256": CHECKPOINT.tensors.sha256(),
            "recipe_sha256": recipe_sha256(RECIPE),
        },
        "dtype": "float16",
        "kv_cache": "dynamic",
        "kv_cache_dtype": "unquantized",
        "capacity": None,
        "cache_slots": None,
        "bos_token_id": 1,
        "eos_token_ids": [2],
        "prefix": {"token_ids": [1, 7], "text": "?", "length": 2, "holds_bos": True, "in_cache": True},
        "linears": {
            "float16": {"modules": 1, "mac_share": 80 * 48 / layers, "per_token_share": 0.0},
            "int8": {"modules": 13, "mac_share": 1 - 80 * 48 / layers, "per_token_share": 80 * 48 / layers},
        },
        "head": {"format": "int8", "mac_share": 99 * 48 / (99 * 48 + layers), "weight_bytes": 99 * (48 + 4 + 1)},
        "engines": ["onnxruntime", "tensorrt", "tensorrt-rtx"],
        "logits": "all",
        "vocab_size": 99,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "sliding_window": None,
        "inputs": [
            {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]},
            {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "total_sequence"]},
            *cache[:4],
        ],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", "sequence", 99]}, *cache[4:]],
        "unsupported": {
            "onnxruntime-genai": "onnxruntime-genai allocates `present` for the tokens it fed, and this graph's is "
            "longer by the prefix; export with --prefix-in attention"
        },
        "files": [
            "config.json",
            "data_loader.py",
            "genai_config.json",
            "generation_config.json",
            "model.onnx",
            "model.onnx.data",
        ],
    }


def test_the_inputs_of_a_static_cache(tmp_path: Path) -> None:
    options = ExportOptions("float16", cache=CacheOptions("static", 24), logits="last")
    manifest = export_bundle(CHECKPOINT, RECIPE, options, tmp_path / "b").model_dump(mode="json")
    cache = tensors(26, 26)
    assert manifest["inputs"] == [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]},
        {"name": "write_indices", "dtype": "int64", "shape": ["batch"]},
        {"name": "fresh", "dtype": "bool", "shape": ["fresh"]},
        *cache[:4],
    ]
    assert manifest["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch", 1, 99]}, *cache[4:]]
    assert [manifest[key] for key in ("kv_cache", "capacity", "cache_slots", "logits")] == ["static", 24, 26, "last"]


def test_a_prefix_in_attention_is_told_from_one_in_the_cache(tmp_path: Path) -> None:
    manifest = export_bundle(CHECKPOINT, RECIPE, ExportOptions("float16", prefix_in="attention"), tmp_path)
    assert manifest.prefix is not None
    assert not manifest.prefix.in_cache
    assert manifest.unsupported == {}
    held = onnx.load(tmp_path / "model.onnx", load_external_data=False).metadata_props
    assert {entry.key: entry.value for entry in held}["prefix_in"] == "attention"


@pytest.mark.parametrize("tie", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("head", ["unquantized", "int8-weights", "int8-per-token-dynamic"])
def test_the_heads_bytes_are_those_of_its_tensors(tmp_path: Path, head: HeadScheme, tie: bool) -> None:
    checkpoint = tiny_llama(tie=tie).checkpoint
    recipe = tiny_recipe(checkpoint, dict.fromkeys(linears(checkpoint.config), 0.1), scheme=Scheme(head=head))
    manifest = export_bundle(checkpoint, recipe, ExportOptions("float16"), tmp_path)
    held = onnx.load(tmp_path / "model.onnx").graph.initializer
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in held if tensor.name.startswith("lm_head.weight")]
    assert manifest.head is not None
    assert manifest.head.weight_bytes == sum(weight.nbytes for weight in weights)


def test_the_whole_configuration_of_onnxruntime_genai() -> None:
    checkpoint = replace(CHECKPOINT, generation_config={"pad_token_id": 5})
    assert genai_config(checkpoint, None) == {
        "model": {
            "type": "llama",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 5,
            "vocab_size": 99,
            "context_length": 128,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "session.set_denormal_as_zero": "1",
                    "provider_options": [],
                },
                "filename": "model.onnx",
                "head_size": 16,
                "hidden_size": 48,
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
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
            },
        },
        "search": {"max_length": 128, "past_present_share_buffer": False},
    }
    assert genai_config(checkpoint, "a reason")["model"]["type"] == "none: a reason"


@pytest.mark.parametrize(("ids", "eos", "pad"), [((), None, None), ((2,), 2, 2), ((4, 2), [4, 2], 4)])
def test_tokens_that_end_a_text(ids: tuple[int, ...], eos: Any, pad: int | None) -> None:
    checkpoint = replace(CHECKPOINT, config=replace(CHECKPOINT.config, eos_token_ids=ids))
    model = genai_config(checkpoint, None)["model"]
    assert (model["eos_token_id"], model["pad_token_id"]) == (eos, pad)
    assert generation_config(checkpoint) == {"bos_token_id": 1, "eos_token_id": eos}
    own = {"temperature": 0.5}
    assert generation_config(replace(checkpoint, generation_config=own)) == own


def test_the_configuration_of_transformers_is_the_models_own() -> None:
    hf = {**CHECKPOINT.config.hf, "_name_or_path": "/home", "torch_dtype": "float32", "architectures": None}
    found = hf_config(replace(CHECKPOINT, config=replace(CHECKPOINT.config, hf=hf)), "bfloat16")
    own = {key: value for key, value in hf.items() if key not in ("_name_or_path", "torch_dtype")}
    assert found == {**own, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    named = replace(CHECKPOINT.config, hf={**hf, "architectures": ["Own"]})
    assert hf_config(replace(CHECKPOINT, config=named), "float16")["architectures"] == ["Own"]


@pytest.mark.parametrize(
    ("dtype", "formats", "engines"),
    [
        ("float16", ["int8"], ["onnxruntime", "tensorrt", "tensorrt-rtx"]),
        ("bfloat16", ["int8"], ["tensorrt", "tensorrt-rtx"]),
        ("float16", ["int8", "bfloat16+int8-weights"], ["tensorrt", "tensorrt-rtx"]),
        (
            "float32",
            ["fp8"],
            [
                "onnxruntime (FP8 rounded to and multiplied in float32)",
                "tensorrt (SM89 and later)",
                "tensorrt-rtx (SM89 and later)",
            ],
        ),
    ],
)
def test_which_engines_run_a_bundle(dtype: Dtype, formats: list[str], engines: list[str]) -> None:
    assert list(supporting_engines(dtype, formats)) == engines


def test_a_number_format_is_for_what_is_quantized() -> None:
    for number_format, quantize in (("int8", True), ("int8", False), ("fp8", True)):
        require_quantized(number_format, quantize)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="--number-format fp8 and --no-quantize contradict each other"):
        require_quantized("fp8", False)


def test_every_argument_reaches_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def write(*arguments: Any) -> Manifest:
        told.append(arguments)
        assert [path.name for path in tmp_path.iterdir()] == [".b.lock"]
        return Manifest.model_construct()

    def progress(*_: Any) -> None: ...

    monkeypatch.setattr(model_export, "export_bundle", write)
    monkeypatch.setattr(model_export, "open_checkpoint", lambda model: f"opened {model}")
    place, half = tmp_path / "b", RECIPE.model_copy(update={"scheme": Scheme(unquantized="bfloat16")})
    static, fp8 = CacheOptions("static", 3), {"number_format": "fp8"}
    export("m", place, half, dtype="float32", cache=static, logits="last", progress=progress, **fp8)  # type: ignore[arg-type]
    options = ExportOptions("float32", number_format="fp8", cache=static, logits="last")
    assert told.pop() == ("opened m", half, options, place, progress)
    export(Path("m"), str(place), half, prefix_in="attention")
    assert told.pop()[:4] == ("opened m", half, ExportOptions("bfloat16", prefix_in="attention"), place)
    export("m", place)
    assert told.pop()[:4] == ("opened m", None, ExportOptions("float16"), place)
    with pytest.raises(RecipeError, match="contradict"):
        export("m", place, number_format="fp8")
    place.mkdir()
    (place / "letter.txt").touch()
    with pytest.raises(ArtifactError, match="is not a bundle that spike-export wrote"):
        export("m", place)
    assert not told
