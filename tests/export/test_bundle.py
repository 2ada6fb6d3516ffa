"""The bundle as files: complete, reproducible, whole or absent; and what export refuses."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from spike_export.artifacts.errors import ArtifactError, CheckpointError, RecipeError
from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.recipe import Recipe
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.export import bundle as bundle_module
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.files.tokenizer_files import without_bos
from spike_export.export.files.weight_file import write_weights
from tests.support.tiny.models import MemoryTensors, TinyModel, input_scales, tiny_llama, tiny_recipe

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def recipe(model: TinyModel) -> Recipe:
    return tiny_recipe(model.checkpoint, _scales(model), prefix=(1, 7))


def _scales(model: TinyModel) -> dict[str, float]:
    return input_scales(model, np.arange(12)[None])


def with_tokenizer(checkpoint: Checkpoint) -> Checkpoint:
    """A word tokenizer that puts `<s>` (id 1) first, with a chat template that does so too."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 99)}}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    return dataclasses.replace(checkpoint, tokenizer=tokenizer)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_two_exports_are_byte_identical(tmp_path: Path, model: TinyModel, recipe: Recipe) -> None:
    checkpoint = with_tokenizer(model.checkpoint)
    for name in ("one", "elsewhere/two"):
        export_bundle(checkpoint, recipe, ExportOptions("float16"), tmp_path / name)
    first, second = contents(tmp_path / "one"), contents(tmp_path / "elsewhere" / "two")
    assert first == second
    assert not [name for name, data in first.items() if str(tmp_path).encode() in data]


def test_bundle_is_complete(tmp_path: Path, model: TinyModel, recipe: Recipe) -> None:
    seen: list[tuple[str, int, int]] = []
    export_bundle(
        with_tokenizer(model.checkpoint), recipe, ExportOptions(), tmp_path / "b", lambda *step: seen.append(step)
    )
    assert set(contents(tmp_path / "b")) >= {
        "model.onnx",
        "model.onnx.data",
        "manifest.json",
        "config.json",
        "data_loader.py",
        "generation_config.json",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    for path in (tmp_path / "b").glob("*.json"):  # people read them too
        text = path.read_text(encoding="utf-8")
        assert text in [json.dumps(json.loads(text), indent=width, ensure_ascii=False) + "\n" for width in (1, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert [done for _, done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for *_, total in seen} == {len(seen)}


def test_config_files_say_what_other_tools_need(tmp_path: Path, model: TinyModel) -> None:
    export_bundle(model.checkpoint, None, ExportOptions("float32"), tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    genai = json.loads((tmp_path / "b" / "genai_config.json").read_text())["model"]
    assert "position_ids" not in genai["decoder"]["inputs"]
    names = {value.name for value in onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False).graph.input}
    assert genai["decoder"]["inputs"]["past_key_names"] % 1 in names


def test_external_tensors_are_page_aligned_in_one_file(tmp_path: Path, model: TinyModel, recipe: Recipe) -> None:
    export_bundle(model.checkpoint, recipe, ExportOptions(), tmp_path / "b")
    external = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False).graph.initializer
        if tensor.external_data
    ]
    assert external
    assert {entry["location"] for entry in external} == {"model.onnx.data"}
    assert {int(entry["offset"]) % 4096 for entry in external} == {0}


def test_manifest_describes_the_graph_and_survives_a_round_trip(
    tmp_path: Path, model: TinyModel, recipe: Recipe
) -> None:
    kept = {"model.layers.0.mlp.down_proj": "float16"}
    recipe = tiny_recipe(model.checkpoint, _scales(model), kept=kept, prefix=(1, 7))  # type: ignore[arg-type]
    manifest = export_bundle(model.checkpoint, recipe, ExportOptions("float16"), tmp_path / "b")
    assert load_manifest(tmp_path / "b") == manifest
    assert manifest.prefix is not None
    assert manifest.prefix.holds_bos
    assert manifest.prefix_length == 2
    assert manifest.linears["int8"].modules == 13
    # down_proj is 80 x 48 of 2 layers of (64 + 32 + 32 + 64 + 3 * 80) * 48 multiply-accumulates.
    assert manifest.linears["float16"].mac_share == pytest.approx(80 / (2 * (64 + 32 + 32 + 64 + 3 * 80)))
    graph = onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False).graph
    assert [info.name for info in manifest.inputs] == [value.name for value in graph.input]
    assert [info.name for info in manifest.outputs] == [value.name for value in graph.output]
    past = manifest.inputs[2]
    assert (past.dtype, past.shape) == ("float16", ("batch", 2, "past", 16))


def test_missing_and_damaged_manifests_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(ArtifactError) as caught:
        load_manifest(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("prefix", "begins_with_bos"), [((1, 7), False), ((7, 8), True)], ids=["bos", "other"])
def test_tokenizer_adds_no_bos_that_the_prefix_holds(
    tmp_path: Path, model: TinyModel, prefix: tuple[int, ...], begins_with_bos: bool
) -> None:
    from transformers import AutoTokenizer

    recipe = tiny_recipe(model.checkpoint, _scales(model), prefix=prefix)
    export_bundle(with_tokenizer(model.checkpoint), recipe, ExportOptions(), tmp_path / "b")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert tokenizer("w5 w6")["input_ids"] == ([1] if begins_with_bos else []) + [5, 6]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False)
    assert rendered == ("<s>" if begins_with_bos else "") + "w5"


def test_removing_bos_keeps_other_processors_and_tokens() -> None:
    bos, eos = ({"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>"))
    text = {"Sequence": {"id": "A", "type_id": 0}}
    specials = {"<s>": {}, "</s>": {}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, text, eos],
        "pair": [bos, text, text],
        "special_tokens": specials,
    }
    offsets = {"type": "ByteLevel"}
    cleaned: Any = without_bos({"type": "Sequence", "processors": [offsets, template]}, "<s>")
    assert cleaned["processors"][0] == offsets
    assert cleaned["processors"][1]["single"] == [text, eos]
    assert cleaned["processors"][1]["special_tokens"] == {"</s>": {}}
    assert without_bos({**template, "single": [bos, text]}, "<s>") is None


def changed_modules(recipe: Recipe, **changes: Any) -> Recipe:
    modules = {**recipe.modules, **{name: plan for name, plan in changes.items() if plan is not None}}
    return recipe.model_copy(
        update={"modules": {name: plan for name, plan in modules.items() if changes.get(name, plan) is not None}}
    )


def test_recipe_of_another_checkpoint_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="calibrate this model"):
        export_bundle(tiny_llama(seed=1).checkpoint, recipe, ExportOptions(), tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_recipe_that_lacks_a_module_is_refused(tmp_path: Path, model: TinyModel, recipe: Recipe) -> None:
    lacking = changed_modules(recipe, **{"model.layers.1.mlp.up_proj": None})
    with pytest.raises(RecipeError, match=r"lacks module model\.layers\.1\.mlp\.up_proj"):
        export_bundle(model.checkpoint, lacking, ExportOptions(), tmp_path / "b")


def test_recipe_that_names_an_unknown_module_is_refused(tmp_path: Path, model: TinyModel, recipe: Recipe) -> None:
    extra = changed_modules(recipe, **{"model.layers.2.mlp.up_proj": recipe.modules["model.layers.1.mlp.up_proj"]})
    with pytest.raises(RecipeError, match=r"model\.layers\.2\.mlp\.up_proj"):
        export_bundle(model.checkpoint, extra, ExportOptions(), tmp_path / "b")


def test_prefix_outside_the_vocabulary_is_refused(tmp_path: Path, model: TinyModel) -> None:
    recipe = tiny_recipe(model.checkpoint, _scales(model), prefix=(1, 99))
    with pytest.raises(RecipeError, match="token 99"):
        export_bundle(model.checkpoint, recipe, ExportOptions(), tmp_path / "b")


def test_full_disk_is_told_before_writing(
    tmp_path: Path, model: TinyModel, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1234))
    with pytest.raises(ArtifactError, match="1,234 are free"):
        export_bundle(model.checkpoint, recipe, ExportOptions(), tmp_path / "new" / "b")
    assert not list(tmp_path.iterdir())


def test_room_between_tensors_and_the_graph_are_counted(
    tmp_path: Path, model: TinyModel, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle(model.checkpoint, recipe, ExportOptions(), tmp_path / "b")
    written = sum((tmp_path / "b" / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    monkeypatch.setattr(bundle_module, "_SLACK", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=written - 1))
    with pytest.raises(ArtifactError, match=f"and {written - 1:,} are free"):
        export_bundle(model.checkpoint, recipe, ExportOptions(), tmp_path / "b")


def test_threads_are_for_large_weights_and_torch_then_computes_alone(
    tmp_path: Path, model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def written(model: Any, path: Path, threads: int, told: Any) -> None:
        seen.append((threads, torch.get_num_threads()))
        write_weights(model, path, threads, told)

    before = torch.get_num_threads()
    monkeypatch.setattr(bundle_module, "write_weights", written)
    monkeypatch.setattr(bundle_module, "workers", lambda most: most - 1)
    torch.set_num_threads(2)
    try:
        export_bundle(model.checkpoint, None, ExportOptions(), tmp_path / "small")
        monkeypatch.setattr(bundle_module, "_WORTH_THREADS", 1000)
        export_bundle(model.checkpoint, None, ExportOptions(), tmp_path / "large")
        assert seen == [(1, 2), (3, 1)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "small") == contents(tmp_path / "large")


def test_failed_export_leaves_the_previous_bundle(tmp_path: Path, model: TinyModel) -> None:
    export_bundle(model.checkpoint, None, ExportOptions(), tmp_path / "b")
    before = contents(tmp_path / "b")
    assert isinstance(model.checkpoint.tensors, MemoryTensors)
    tensors = dict(model.checkpoint.tensors.tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.full_like(tensors[name], np.nan)
    damaged = dataclasses.replace(model.checkpoint, tensors=MemoryTensors(tensors))
    recipe = tiny_recipe(damaged, _scales(model))
    with pytest.raises(CheckpointError, match=name):
        export_bundle(damaged, recipe, ExportOptions(), tmp_path / "b")
    assert contents(tmp_path / "b") == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_weights_are_read_one_at_a_time_and_quantized_once(tmp_path: Path, model: TinyModel, recipe: Recipe) -> None:
    reads: list[str] = []

    class Counting(MemoryTensors):
        def read(self, name: str) -> Any:
            reads.append(name)
            return super().read(name)

    assert isinstance(model.checkpoint.tensors, MemoryTensors)
    checkpoint = dataclasses.replace(model.checkpoint, tensors=Counting(model.checkpoint.tensors.tensors))
    export_bundle(checkpoint, recipe.model_copy(update={"prefix": None}), ExportOptions(), tmp_path / "b")
    assert sorted(reads) == sorted(set(reads))
