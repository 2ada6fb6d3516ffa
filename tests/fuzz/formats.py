"""The formats that come from outside: how a damaged one is drawn, and which functions read it."""

import base64
import json
import struct
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import AutoConfig

from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.recipe import Search, recipe_text
from spike_export.artifacts.results.accuracy_limits import AccuracyLimits
from spike_export.artifacts.results.check_document import load_check
from spike_export.artifacts.results.command_log import load_commands
from spike_export.artifacts.results.speed_document import load_speeds
from spike_export.artifacts.results.task_document import load_task_accuracy
from spike_export.calibration.corpus.chat import rendered
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.files import CorpusOptions, load_corpora
from spike_export.calibration.corpus.model_windows import model_windows
from spike_export.calibration.decoder.equivalent.equivalent_weights import transformed_checkpoint
from spike_export.calibration.methods.prefix_choice import PrefixChoice
from spike_export.calibration.statistics.partial_statistics import merge_shards
from spike_export.calibration.statistics.spikes import ModuleSpikes, SpikeStatistics, load_spikes, save_spikes
from spike_export.checkpoint.checkpoint import EMBEDDING, Checkpoint
from spike_export.checkpoint.decoder_config import decoder_config, tensor_shapes
from spike_export.checkpoint.gguf_file import open_gguf
from spike_export.checkpoint.hf_directory import open_hf_directory, read_json
from spike_export.checkpoint.modules import linears
from spike_export.cli.config_file import require_config
from spike_export.cli.main import app
from spike_export.engines.bundle_text import default_options
from spike_export.engines.lint.linter import lint_model
from spike_export.engines.onnx_runtime.all_logits import all_logits_graph
from spike_export.engines.onnx_runtime.generation_graph import generation_graph
from spike_export.engines.plan.graph import graph_inputs, load_graph
from spike_export.engines.plan.header import read_header
from spike_export.engines.plan.sidecar import load_sidecar, sidecar_text
from spike_export.inspection.bundle import inspect_bundle
from spike_export.inspection.run import inspect_run
from spike_export.pipeline.choices import load_prefixes, load_transforms
from spike_export.report.check_table import (
    check_rows,
    corpus_sentence,
    cost_sentences,
    gate_sentence,
    noise_sentences,
    worst_lines,
)
from spike_export.report.facts import command_lines, version_facts
from spike_export.report.tables import speed_rows
from spike_export.report.task_table import task_gates, task_rows, task_sentence
from tests.fuzz.damage import damaged, damaged_bytes, damaged_graph, json_text, odd
from tests.fuzz.gguf_parts import GgufParts, damaged_gguf
from tests.support.check_costs import cost_document, noise_document
from tests.support.tiny.bundles import TinyModel, tiny_manifest, write_bundle
from tests.support.tiny.checkpoints import (
    byte_tokenizer,
    random_decoder,
    random_llama,
    write_gguf,
    write_hf,
)
from tests.support.tiny.models import tiny_llama, tiny_recipe
from tests.support.trt_simulation import sidecar

Files = Mapping[str, bytes]
"""Name inside a folder → content."""


@dataclass(frozen=True)
class Format:
    """Something that a stranger may hand in.

    Attributes:
        name: For the table.
        files: Gives a strategy of the files of one folder.
        read: Reads the folder as the program does, and looks at what it has read.
        examples: How many are drawn in the short run.
    """

    name: str
    files: Callable[[], st.SearchStrategy[Files]]
    read: Callable[[Path], object]
    examples: int = 40


def _written(write: Callable[[Path], object]) -> dict[str, bytes]:
    """Return the files that a function of the project's own writes into a folder."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        return {str(path.relative_to(name)): path.read_bytes() for path in Path(name).rglob("*") if path.is_file()}


# config.json -----------------------------------------------------------------------------------------------------

_SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "factor": 8.0}
_ROPES: tuple[dict[str, Any], ...] = (
    {},
    {"rope_parameters": _YARN},
    {"rope_parameters": _LONGROPE | {"original_max_position_embeddings": 64}},
    {"rope_parameters": _LLAMA3 | {"rope_type": "llama3", "rope_theta": 1e4}},
)


@cache
def _configs() -> list[dict[str, Any]]:
    types = ("llama", "mixtral", "gemma2", "gemma3_text", "granite", "phi3", "qwen2", "qwen3_moe")
    plain = [AutoConfig.for_model(each, **_SIZES, pad_token_id=0).to_dict() for each in types]
    return [*plain, *(plain[0] | rope for rope in _ROPES)]


def _config_files() -> st.SearchStrategy[Files]:
    return st.sampled_from(_configs()).flatmap(json_text).map(lambda content: {"config.json": content})


def _read_config(folder: Path) -> object:
    config = decoder_config(read_json(folder / "config.json"), "config.json")
    return [config.rope(kind).channels for kind in config.ropes], linears(config), tensor_shapes(config)


# Weights ---------------------------------------------------------------------------------------------------------


@cache
def _model_files() -> dict[str, bytes]:
    model = random_llama(num_hidden_layers=1)
    files = _written(lambda folder: write_hf(folder, model, shards=2))
    return {name: content for name, content in files.items() if "tokenizer" not in name}


def _damaged_safetensors(content: bytes) -> st.SearchStrategy[bytes]:
    """Damage the header as a document, and its length as a number."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    lengths = st.sampled_from((0,) * 9 + (1, -1, 2**40, 2**63))

    def join(changed: Any, more: int) -> bytes:
        text = json.dumps(changed).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", (len(text) + more) % 2**64) + text + content[8 + size :]

    return st.builds(join, damaged(header), lengths)


def _weights() -> st.SearchStrategy[Files]:
    files = _model_files()
    index, shard = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
    changes = (
        st.fixed_dictionaries({index: json_text(json.loads(files[index]))}),
        st.fixed_dictionaries({shard: _damaged_safetensors(files[shard])}),
        st.fixed_dictionaries({shard: damaged_bytes(files[shard])}),
    )
    return st.one_of(changes).map(lambda changed: files | changed)


def _read_weights(folder: Path) -> object:
    checkpoint = open_hf_directory(folder, "model")
    return _some_tensors(checkpoint)


def _some_tensors(checkpoint: Checkpoint) -> object:
    names = (EMBEDDING, "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight")
    row = np.empty((1, checkpoint.stored_shape(EMBEDDING)[1]), np.float32)
    with checkpoint.block_reader(EMBEDDING) as read:
        read(slice(0, 1), row)
    return [checkpoint.tensor(name) for name in names], checkpoint.rows(EMBEDDING, np.array([1, 2])), row


# GGUF ------------------------------------------------------------------------------------------------------------


@cache
def _ggufs() -> list[GgufParts]:
    models = (random_llama(num_hidden_layers=1), random_decoder("gemma2", num_hidden_layers=2))
    files = [_written(lambda folder, model=model: write_gguf(folder / "m.gguf", model)) for model in models]
    return [GgufParts.of(each["m.gguf"]) for each in files]


def _gguf() -> st.SearchStrategy[Files]:
    return st.sampled_from(_ggufs()).flatmap(damaged_gguf).map(lambda content: {"m.gguf": content})


# Tokenizers ------------------------------------------------------------------------------------------------------

_PARTS: Mapping[str, tuple[Any, ...]] = {
    "model": (
        {"type": "WordLevel", "vocab": {"zz": 5}, "unk_token": "<unk>"},
        {"type": "Unigram", "unk_id": None, "vocab": [["z", -1.0]], "byte_fallback": False},
        {"type": "Unigram", "unk_id": 7, "vocab": [["z", -1.0]]},
        {"type": "WordPiece", "vocab": {"a": 700}, "unk_token": "a", "continuing_subword_prefix": "#"},
        {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": [["a", "b"]]},
    ),
    "normalizer": (
        {"type": "Precompiled", "precompiled_charsmap": "AAAAAAEC"},
        {"type": "Precompiled", "precompiled_charsmap": "ALQCAACEAAAAAACAAQ=="},
        {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 100_000},
        {"type": "Replace", "pattern": {"Regex": "(e"}, "content": ""},
    ),
    "pre_tokenizer": (
        None,
        {"type": "Split", "pattern": {"Regex": "[a-"}, "behavior": "Isolated", "invert": False},
        {"type": "Sequence", "pretokenizers": []},
    ),
    "decoder": (None, {"type": "Sequence", "decoders": []}),
}

_TEMPLATES = (
    "{{ messages[0].content }}",
    "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('no') }}",
    "{{ messages.x.y }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include 'x' %}",
    "{{ 'a' * 10**6 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{%",
    "",
)


@st.composite
def _tokenizer(draw: st.DrawFn) -> Files:
    document = json.loads(byte_tokenizer().to_str())
    settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    files = {"tokenizer_config.json": settings.encode(), "chat_template.jinja": _TEMPLATES[0].encode()}
    match draw(st.sampled_from(("part", "part", "added", "json", "settings", "template"))):
        case "part":
            part = draw(st.sampled_from(sorted(_PARTS)))
            document[part] = draw(st.sampled_from(_PARTS[part]))
        case "added":
            known = document["added_tokens"]
            known.append(known[0] | {"id": draw(st.sampled_from((257, 258, 700))), "content": "the"})
        case "json":
            files["tokenizer.json"] = draw(json_text(document))
        case "settings":
            files["tokenizer_config.json"] = draw(json_text(json.loads(settings)))
        case _:
            files["chat_template.jinja"] = draw(st.sampled_from(_TEMPLATES)).encode()
    return _model_files() | {"tokenizer.json": json.dumps(document).encode()} | files


_PROSE = "Where the tokens of a sentence go, the letter e follows. " * 12


def _read_tokenizer(folder: Path) -> object:
    checkpoint = open_hf_directory(folder, "model")
    (folder / "c.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": _PROSE}]}) + "\n")
    (chats,) = load_corpora(CorpusOptions(folder / "c.jsonl", chat_template=True))
    windows = model_windows(checkpoint, Corpus("prose", (_PROSE,)), 2, 8, 0, "packed")
    return windows, rendered(chats, checkpoint.tokenizer)


# Documents of ours -----------------------------------------------------------------------------------------------


@cache
def _recipe() -> Any:
    checkpoint = tiny_llama().checkpoint
    scales = dict.fromkeys(linears(checkpoint.config), 0.03)
    return json.loads(recipe_text(tiny_recipe(checkpoint, scales, prefix=(1, 2))))


def _read_recipe(folder: Path) -> object:
    run = inspect_run(folder)
    return run.headlines, run.document(), run.explain(list(run.recipe.modules)[:3])


@cache
def _bundle() -> dict[str, bytes]:
    return _written(lambda folder: write_bundle(folder, TinyModel()))


_GENERATION = {
    "eos_token_id": [2],
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.0,
    "repetition_penalty": 1.1,
    "max_new_tokens": 20,
    "seed": 3,
}


def _manifest() -> st.SearchStrategy[Files]:
    manifest = tiny_manifest(TinyModel()).model_dump(mode="json")
    return st.fixed_dictionaries(
        {"manifest.json": json_text(manifest), "generation_config.json": json_text(_GENERATION)}
    )


def _read_manifest(folder: Path) -> object:
    manifest = load_manifest(folder)
    return manifest.cached_prefix_length, default_options(folder, manifest, None)


@cache
def _graph() -> onnx.ModelProto:
    return onnx.load_from_string(_bundle()["model.onnx"])


def _graphs() -> st.SearchStrategy[Files]:
    whole = damaged_graph(_graph()).map(lambda model: model.SerializeToString())
    cut = damaged_bytes(_bundle()["model.onnx"])
    return st.one_of(whole, whole, whole, cut).map(lambda content: _bundle() | {"model.onnx": content})


def _read_graph(folder: Path) -> object:
    graph = folder / "model.onnx"
    lint_model(graph)
    inspect_bundle(folder)
    generation_graph(folder, load_manifest(folder))
    with suppress(EngineError):  # it has all of them
        all_logits_graph(folder)
    return graph_inputs(load_graph(graph))


def _sidecars() -> st.SearchStrategy[Files]:
    document = json.loads(sidecar_text(sidecar("tensorrt-rtx", (), 3, 64)))
    document["plan"]["size"] = 64
    plan = b"vtrt" + bytes(4) + struct.pack("<QQ", 0, 64) + bytes((1, 7, 1, 0)) + bytes(36)
    return st.fixed_dictionaries({"m.json": json_text(document), "m.plan": damaged_bytes(plan)})


def _read_plan(folder: Path) -> object:
    return read_header(folder / "m.plan").title, load_sidecar(folder / "m.plan")


_WORST = {"window": 0, "position": 3, "divergence": 2.0, "text": "a"}
_COST = cost_document(increase=0.04, divergence=0.02, agreement=0.9, margin=0.01, worst=[_WORST])
_CHECK = {
    "format": 2,
    "corpus": {"name": "c", "sha256": "0", "windows": 2, "length": 8},
    "dtype": "float16",
    "reference": {"perplexity": 11.5, "behind_prefix": 11.4},
    "variants": [{"name": "w8a8", "perplexity": 12.0, "increase": 0.05, "cost": _COST, "shipped": True}],
    "texts": [{"corpus": {"name": "t", "windows": 2}, "reference": 9.0, "perplexity": 9.5, "cost": _COST}],
    "noise": noise_document(),
    "gates": [{"name": "max-ppl-increase", "limit": 0.1, "value": 0.05, "passed": True}],
}


def _read_check(folder: Path) -> object:
    check = load_check(folder / "check.json")
    gates = [gate_sentence(gate) for gate in check.gated(AccuracyLimits(0.1, 0.1, 0.5)).gates]
    sentences = cost_sentences(check), noise_sentences(check), worst_lines(check), corpus_sentence(check)
    return check_rows(check), sentences, gates


def _report_files() -> st.SearchStrategy[Files]:
    times = {"p50": 0.01, "p90": 0.02, "p99": None}
    load = {"concurrency": 1, "requests": 4, "tokens_per_second": 81.25}
    speeds = [{**load, "time_to_first_token": times, "time_per_token": times}]
    commands = {"format": 1, "commands": [{"words": ["spike-export", "m"], "versions": {"torch": "2"}}]}
    return st.fixed_dictionaries({"speed.json": json_text(speeds), "commands.json": json_text(commands)})


def _read_report_files(folder: Path) -> object:
    speeds, log = load_speeds(folder / "speed.json"), load_commands(folder / "commands.json")
    return speed_rows(speeds), command_lines(log.commands), version_facts(log.commands)


_TASKS = {
    "format": 1,
    "lm_eval": "0.4",
    "checkpoint_sha256": "0",
    "recipe_sha256": None,
    "prefix": [1],
    "max_flips": 0.1,
    "tasks": [
        {
            "task": "t",
            "metric": "acc",
            "items": 4,
            "accuracy": 0.5,
            "reference_accuracy": 0.25,
            "difference": 0.25,
            "difference_interval": [-0.2, 0.6],
            "p_value": 1.0,
            "flips": 0.25,
            "flips_interval": [0.05, 0.7],
            "lost": [],
            "gained": [2],
        }
    ],
}


def _read_tasks(folder: Path) -> object:
    found = load_task_accuracy(folder / "b.tasks.json")
    return task_rows(found), task_sentence(found), task_gates(found)


@cache
def _statistics() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    modules = {
        f"model.layers.0.mlp.{name}": ModuleSpikes(
            random.random((3, 5), np.float32), random.random((3, 4), np.float32), np.zeros(3, np.float32)
        )
        for name in ("up_proj", "down_proj")
    }
    hidden, operands = np.ones((3, 1), np.float32), {"model.layers.0.self_attn": np.ones((3, 3), np.float32)}
    statistics = SpikeStatistics(modules, np.arange(15).reshape(3, 5), (1, 2), np.arange(3), hidden, operands)
    described = {
        "key": "k",
        "samples": 3,
        "model": {"source": "m", "sha256": "0"},
        "corpus": {"name": "c", "sha256": "0"},
    }
    return _written(lambda folder: save_spikes(statistics, folder / "spikes", described, str))


def _spikes() -> st.SearchStrategy[Files]:
    whole = _statistics()
    changes = (
        st.fixed_dictionaries({"spikes.json": json_text(json.loads(whole["spikes.json"]))}),
        st.fixed_dictionaries({"spikes.safetensors": _damaged_safetensors(whole["spikes.safetensors"])}),
    )
    return st.one_of(changes).map(lambda changed: whole | changed)


def _read_spikes(folder: Path) -> object:
    statistics, description = merge_shards([folder / "spikes"])
    read = load_spikes(folder / "spikes")
    return statistics.ratios(), description, [read.top_tokens(name, 3) for name in read.modules]


_PREFIXES = {
    "token_ids": [1, 7],
    "candidates": [
        {"token_ids": [], "text": "", "worst_module": "m", "ratio": 900.5, "perplexity": 12.5, "verdict": "no"},
        {"token_ids": [1, 7], "text": "ab", "worst_module": "m", "ratio": 3.5, "perplexity": 11.5, "verdict": "chosen"},
    ],
    "forward_tokens": 4000,
}
_SITE = "model.layers.0.mlp.up_proj"
_TRANSFORMS = {
    "transform": {
        "rotation": {"kind": "orthogonal", "seed": 0},
        "smoothing": {
            _SITE: {"form": "smoothquant", "parameter": 0.5, "exponents": base64.b64encode(bytes(48)).decode()}
        },
        "clips": {_SITE: 0.9},
        "noise": {_SITE: 0.25},
        "token_noise": {_SITE: 0.125},
        "hadamard": {"block": 16},
        "input_hadamard": {_SITE: 16},
        "value_rotation": {"model.layers.0.self_attn.o_proj": 8},
    },
    "candidates": [{"name": "smoothing", "perplexity": 12.5, "divergence": 0.25, "verdict": "chosen"}],
}


def _choices() -> st.SearchStrategy[Files]:
    return st.fixed_dictionaries({"prefix.json": json_text(_PREFIXES), "smoothing.json": json_text(_TRANSFORMS)})


@cache
def _chosen_for() -> Checkpoint:
    return tiny_llama().checkpoint


def _read_choices(folder: Path) -> object:
    """Read both, and use them as the stages behind them do."""
    checkpoint = _chosen_for()
    with suppress(ArtifactError):  # the other one is read all the same
        _use_prefixes(load_prefixes(folder / "prefix.json", checkpoint.config))
    choice = load_transforms(folder / "smoothing.json", checkpoint.config)
    transform = choice.transform
    changed = transformed_checkpoint(checkpoint, transform)
    search = Search(transforms=choice.candidates)
    assert Search.model_validate_json(search.model_dump_json()) == search
    return changed.tensor(f"{_SITE}.weight"), choice.transform.noise_with(choice.transform.noise)


def _use_prefixes(choice: PrefixChoice) -> None:
    embedding = _chosen_for().tensor(EMBEDDING)
    assert np.isfinite(embedding[list(choice.token_ids)]).all()
    search = Search(prefixes=choice.candidates)
    assert Search.model_validate_json(search.model_dump_json()) == search


# What a user hands in --------------------------------------------------------------------------------------------

_RECORDS = (
    {"text": "some words", "id": 1},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}]},
)


@st.composite
def _corpus(draw: st.DrawFn) -> Files:
    kind = draw(st.sampled_from(("c.jsonl", "c.jsonl", "c.jsonl", "c.txt", "c.parquet")))
    options = {
        "chat_template": draw(st.booleans()),
        "text_field": draw(st.sampled_from((None, None, "text", "id", ""))),
    }
    record = draw(st.sampled_from(_RECORDS))
    if kind == "c.jsonl":
        content = b"\n".join(draw(st.lists(json_text(record), max_size=3)))
    elif kind == "c.txt":
        content = draw(st.sampled_from((b"", b"\xff", b"\xef\xbb\xbfa", b"words " * 9)))
    else:
        column: list[Any] = draw(st.sampled_from((["a", None], [1, 2], [[{"role": "x", "content": "y"}]], [])))
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table({draw(st.sampled_from(("text", "messages", "x"))): column}), sink)
        content = draw(damaged_bytes(sink.getvalue().to_pybytes()))
    return {kind: content, "options.json": json.dumps(options).encode()}


def _read_corpus(folder: Path) -> object:
    options = json.loads((folder / "options.json").read_text())
    (source,) = folder.glob("c.*")
    return load_corpora(CorpusOptions(source, **options))


_OPTIONS = (
    "samples",
    "length",
    "seed",
    "alpha",
    "corpus",
    "qfem",
    "dtype",
    "device",
    "work-dir",
    "shard",
    "x",
    "weights",
)


@st.composite
def _toml(draw: st.DrawFn) -> Files:
    keys = st.sampled_from((*_OPTIONS, "max-fp16-share", "no-qfem", "run_options"))
    lines = [f"{key} = {_toml_value(value)}" for key, value in draw(st.dictionaries(keys, odd, max_size=3)).items()]
    table = draw(
        st.sampled_from(("[calibrate]", "[calibrate]", "[calibrat]", "[calibrate.samples]", "[[calibrate]]", ""))
    )
    text = "\n".join((table, *lines) if draw(st.booleans()) else (*lines, table))
    return {"job.toml": text.encode("utf-8", "surrogatepass")}


def _toml_value(value: Any) -> str:
    return "nan" if value != value else str(value) if isinstance(value, float) else json.dumps(value)


def _read_toml(folder: Path) -> object:
    path = folder / "job.toml"
    require_config(path, app)
    return path


FORMATS = (
    Format(
        "config.json",
        lambda: st.sampled_from(_configs()).flatmap(json_text).map(lambda c: {"config.json": c}),
        _read_config,
    ),
    Format("safetensors and index", _weights, _read_weights),
    Format("GGUF", _gguf, lambda folder: _some_tensors(open_gguf(folder / "m.gguf"))),
    Format("tokenizer and template", _tokenizer, _read_tokenizer, 20),
    Format("recipe", lambda: json_text(_recipe()).map(lambda content: {"recipe.json": content}), _read_recipe, 80),
    Format("manifest, generation options", _manifest, _read_manifest, 80),
    Format("ONNX graph", _graphs, _read_graph),
    Format("plan header and sidecar", _sidecars, _read_plan, 80),
    Format("check document", lambda: json_text(_CHECK).map(lambda c: {"check.json": c}), _read_check, 80),
    Format("speeds and commands of a report", _report_files, _read_report_files),
    Format("tasks document", lambda: json_text(_TASKS).map(lambda c: {"b.tasks.json": c}), _read_tasks),
    Format("statistics", _spikes, _read_spikes, 80),
    Format("choices of prefix and smoothing", _choices, _read_choices),
    Format("corpus", _corpus, _read_corpus, 80),
    Format("TOML", _toml, _read_toml),
)
