"""Bad input: one line that names the thing, the place and the remedy; exit code 2; nothing half-written."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import pyarrow
import pytest
import torch
from pyarrow import parquet

from spike_export.artifacts.errors import EngineError
from spike_export.engines.onnx_runtime import session as onnx_session
from spike_export.engines.plan import backend as plan_backend
from tests.support.small_disk import small_disk
from tests.support.tiny.checkpoints import (
    VOCAB,
    planted_spike_llama,
    random_llama,
    state,
    write_gguf,
    write_hf,
    write_weights,
)
from tests.support.tiny.cli_models import SMALL, artifacts, call, write_corpus, write_model
from tests.support.tiny.families import tiny_family

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a corpus, a recipe and its bundle."""
    folder = tmp_path_factory.mktemp("errors")
    model, corpus = write_model(folder / "model"), write_corpus(folder / "corpus.txt")
    assert call("calibrate", model, "--work-dir", folder / "run", "--corpus", corpus, *SMALL).code == 0
    recipe = folder / "run" / "recipe.json"
    assert call("export", model, "--recipe", recipe, "--out", folder / "bundle").code == 0
    return folder


@pytest.fixture
def calibrated(folder: Path, tmp_path: Path) -> Callable[..., str]:
    """Run `calibrate` on a model, or with options, that must be refused; return the error line."""

    def refused(model: Path | None = None, *options: str | Path) -> str:
        corpus = () if "--corpus" in options else ("--corpus", folder / "corpus.txt")
        place = () if "--work-dir" in options else ("--work-dir", tmp_path / "w")
        return call("calibrate", model or folder / "model", *place, *corpus, *options).error

    return refused


def assert_says(line: str, *parts: str | Path) -> None:
    for part in parts:
        assert str(part) in line, (part, line)


def test_a_missing_model(calibrated: Callable[..., str], tmp_path: Path) -> None:
    assert_says(calibrated(tmp_path / "nowhere"), tmp_path / "nowhere", "no such file or directory", "give an HF")


def test_a_model_name_with_control_characters_is_spelled_out(calibrated: Callable[..., str], tmp_path: Path) -> None:
    assert_says(calibrated(tmp_path / "no\x1b[31mwhere"), r"no\x1b[31mwhere")


def test_an_architecture_that_is_not_supported(calibrated: Callable[..., str], tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"model_type": "gpt2"}
    (model / "config.json").write_text(json.dumps(config))
    assert_says(calibrated(model), model / "config.json", "gpt2", "llama")


def test_a_truncated_gguf_file(calibrated: Callable[..., str], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_llama()).path
    size = path.stat().st_size
    for kept in (size // 2, 200, 0):
        os.truncate(path, kept)
        assert_says(calibrated(path), path, "again")


def test_a_missing_shard(calibrated: Callable[..., str], tmp_path: Path) -> None:
    model = write_hf(tmp_path / "model", planted_spike_llama(), shards=3)
    shard = model / "model-00002-of-00003.safetensors"
    shard.unlink()
    assert_says(calibrated(model), shard, "this shard is missing", "download it again")


def test_a_tensor_of_another_shape(calibrated: Callable[..., str], tmp_path: Path) -> None:
    model, name = tmp_path / "model", "model.layers.0.mlp.up_proj.weight"
    write_hf(model, planted_spike_llama())
    write_weights(model, state(planted_spike_llama()) | {name: torch.zeros(96, 63)})
    assert_says(calibrated(model), model, name, "[96, 63]", "[96, 64]")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("none.txt", None, ("none.txt", "cannot read the corpus")),
        ("empty.txt", b" \n", ("empty.txt", "the corpus is empty")),
        ("short.txt", b"forty tokens are less than two windows..", ("short.txt", "40 tokens", "--length")),
        ("latin.txt", b"caf\xe9", ("latin.txt", "not UTF-8", "convert")),
        ("table.csv", b"a,b", ("table.csv", "give a .txt, .jsonl or .parquet")),
        ("bad.jsonl", b'{"text": "a"}\n{', ("bad.jsonl, line 2", "not JSON")),
        ("other.jsonl", b'{"prose": "a"}', ("other.jsonl, line 1", "'text'", "--text-field")),
        ("bad.parquet", b"PAR1 and no more", ("bad.parquet", "damaged parquet file", "make it again")),
        ("nowhere", None, ("nowhere", "no such file or folder", "org/name on the hub")),
        ("same.txt", b"a" * 4000, ("same.txt", "one token, repeated", "'a'", "ordinary text")),
    ],
)
def test_a_corpus_that_cannot_be_used(
    calibrated: Callable[..., str], tmp_path: Path, name: str, content: bytes | None, parts: tuple[str, ...]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_says(calibrated(None, "--corpus", tmp_path / name, *SMALL), *parts)


PROGRAM = [sys.executable, "-c", "from spike_export.cli.main import main; main()"]


REFUSED: tuple[tuple[str | None, tuple[str, ...], tuple[str, ...]], ...] = (
    ("same.txt", (), ("same.txt", "one token, repeated", "ordinary text")),
    ("text.parquet", (), ("text.parquet", "no column 'text' (there: 'body')", "--text-field")),
    ("prose", ("--corpus-split", "dev"), ("prose", "no split 'dev'", "train")),
    ("nobody/nothing", (), ("nobody/nothing", "the hub cannot be reached", "give a local file, or download it")),
    ("chats.jsonl", ("--chat-template",), ("no chat template", "leave --chat-template out")),
    ("chats.jsonl", (), ("chats.jsonl, line 1", "'text'", "--chat-template")),
    ("corpus.txt", ("--windows", "documents"), ("corpus.txt", "1 of 1 documents", "--windows packed")),
    ("corpus.txt", ("--windows", "paragraphs"), ("--windows", "paragraphs", "packed")),
    (None, ("--chat-template",), ("--chat-template", "add --corpus")),
)
"""Corpus, options, parts of the line."""

_EACH_REFUSAL = """
import json, sys
from spike_export.cli.main import run
for command in json.loads(sys.argv[1]):
    assert run(command) == 2, command
"""


def test_a_process_says_in_one_line_why_a_corpus_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    """One process for all corpora: each would import for seconds what the first imports."""
    (tmp_path / "same.txt").write_text("a" * 4000)
    write_corpus(tmp_path / "corpus.txt")
    chat = [{"role": "user", "content": "Hello"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}))
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "train.jsonl").write_text('{"text": "a"}')
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "text.parquet")
    always = ["calibrate", str(folder / "model"), "--work-dir", "w", *SMALL, "--quiet"]
    commands = [[*always, *options, *(["--corpus", corpus] if corpus else [])] for corpus, options, _ in REFUSED]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", _EACH_REFUSAL, json.dumps(commands)]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    for line, (_, _, parts) in zip(done.stderr.splitlines(), REFUSED, strict=True):
        assert line.startswith("spike-export: error: ")
        assert_says(line, *parts)


def test_a_process_that_refuses_ends_with_2(folder: Path, tmp_path: Path) -> None:
    command = [*PROGRAM, "calibrate", folder / "model", "--work-dir", tmp_path / "w", *SMALL, "--corpus", "none.txt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("spike-export: error: none.txt")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--sampels", "3"), ("--sampels", "--samples")),
        (("--samples", "many"), ("--samples", "many", "int")),
        (("--samples", "0"), ("--samples is 0", "at least one")),
        (("--length", "7"), ("--length is 7", "at least 8")),
        (("--length", "257"), ("--length is 257", "256")),  # the model's longest sequence
        (("--dtype", "int3"), ("--dtype", "int3", "float16")),
        (("--tolerance", "1"), ("--tolerance is 1", "fraction")),
        (("--tolerance", "nan"), ("--tolerance is nan", "fraction")),
        (("--max-fp16-modules", "-1"), ("--max-fp16-modules is -1", "0 or more")),
        (("--max-fp16-share", "5"), ("--max-fp16-share is 5", "a share such as 0.05")),
        (("--max-fp16-share", "nan"), ("--max-fp16-share is nan", "a share")),
        (("--prefix-length", "0"), ("--prefix-length is 0", "1 to 5 tokens")),
        (("--prefix-length", "6"), ("--prefix-length is 6", "1 to 5 tokens")),
        (("--device", "cuda:99", *SMALL), ("--device cuda:99", "CUDA devices here", "give cpu")),
        (("--device", "abacus", *SMALL), ("--device abacus", "torch knows no such device", "give cpu, cuda or cuda:1")),
        (("--device", "meta", *SMALL), ("--device meta", "computes on a CPU or CUDA", "give cpu, cuda or cuda:1")),
        (("--shard", "3/2"), ("--shard is '3/2'", "the form 2/8")),
        (("--shard", "²/3"), ("--shard is '²/3'", "the form 2/8")),
        (("--shard", "0/2"), ("--shard is '0/2'", "the form 2/8")),
        (("--shard", "one"), ("--shard is 'one'", "the form 2/8")),
        (("--shard", "33/33"), ("--shard 33/33", "32 samples", "fewer shards")),
        (("--rotation", "sometimes"), ("--rotation", "sometimes", "always")),
        (("--layers", "some"), ("--layers", "some", "streamed")),
        (("--compute-dtype", "int8"), ("--compute-dtype", "int8", "bfloat16")),
        (("--alpha", "9", "--max-fp16-modules", "2"), ("--alpha and --max-fp16-modules", "give one")),
        (("--config", "none.toml"), ("none.toml", "cannot read the configuration file")),
        (("--config",), ("--config", "requires an argument")),
        (("surplus",), ("surplus",)),
    ],
)
def test_options_that_cannot_be_meant(
    calibrated: Callable[..., str], options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    assert_says(calibrated(None, *options), *parts)


def test_a_rotation_of_a_family_that_cannot_be_rotated_is_refused_before_anything_is_measured(
    calibrated: Callable[..., str], tmp_path: Path
) -> None:
    reference = tiny_family("gemma2", vocab_size=VOCAB).reference
    model = write_hf(tmp_path / "model", reference)
    line = calibrated(model, "--rotation", "always", *SMALL)
    assert_says(line, "--rotation always: gemma2 cannot be rotated: ")
    assert not any(path.is_file() for path in tmp_path.glob("w/**/*"))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"[calibrate]\nsampels = 3\n", ("sampels", "--samples")),
        (b'[calibrate]\nsamples = "many"\n', ("samples", "many", "int")),
        (b"[calibrate\n", ("not a TOML file",)),
        (b"# caf\xe9\n", ("not a TOML file", "utf-8")),
    ],
)
def test_a_configuration_file_with_a_fault(
    calibrated: Callable[..., str], tmp_path: Path, content: bytes, parts: tuple[str, ...]
) -> None:
    config = tmp_path / "options.toml"
    config.write_bytes(content)
    assert_says(calibrated(None, "--config", config), "options.toml", *parts)


@pytest.fixture
def _rtx_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with TensorRT-RTX, whatever this one has: nothing is built here."""
    machine = plan_backend.Machine(frozenset({"tensorrt-rtx"}), None)
    monkeypatch.setattr(plan_backend, "detect_machine", lambda: machine)


def job(folder: Path, out: Path, *options: str | Path) -> str:
    return call(folder / "model", "--out", out, "--corpus", folder / "corpus.txt", *SMALL, *options).error


@pytest.mark.usefixtures("_rtx_machine")
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--target", "SM99"), ("SM99", "SM86")),
        (("--backend", "cuda"), ("cuda", "tensorrt-rtx")),
        (("--max-batch", "0"), ("batch", "1 <=")),
        (("--optimization-level", "6"), ("optimization_level is 6", "0 to 5")),
        (("--max-ppl-increase", "-0.1"), ("--max-ppl-increase is -0.1", "fraction")),
        (("--profiles", "twice"), ("--profiles", "twice", "split")),
        (("--typical-batch", "2"), ("batch 1, 2, 1",)),
        (("--strip-weights",), ("--strip-weights", "on a GPU only")),
        (("--hardware-compatible", "ampere-plus"), ("--hardware-compatible", "several --target")),
        (("--version-compatible",), ("--version-compatible", "the release that built them")),
        (("--timing-cache", "t"), ("--timing-cache", "leave it out")),
    ],
)
def test_what_stops_the_last_stage_is_said_before_the_first(
    folder: Path, tmp_path: Path, options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    backend = () if "--backend" in options else ("--backend", "tensorrt-rtx")
    assert_says(job(folder, tmp_path / "e.plan", *backend, *options), *parts)
    assert not (tmp_path / "e.plan.run").exists()


@pytest.mark.usefixtures("_rtx_machine")
def test_a_foreign_file_that_would_be_taken_for_a_split_engine(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "e.plan").write_bytes(b"mine")
    options = ("--backend", "tensorrt-rtx", "--profiles", "split")
    assert_says(job(folder, tmp_path / "e.plan", *options), "was not built here", "e.prefill.plan and e.decode.plan")
    assert not (tmp_path / "e.plan.run").exists()


@pytest.mark.usefixtures("_rtx_machine")
def test_a_plan_s_capacity_needs_a_static_cache(folder: Path, tmp_path: Path) -> None:
    options = ("--backend", "tensorrt-rtx", "--plan-capacity", "16")
    assert_says(job(folder, tmp_path / "e.plan", *options), "the plan's capacity is 16", "--kv-cache static")


def test_a_machine_without_a_backend_is_told_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = plan_backend.Machine(frozenset(), None)
    monkeypatch.setattr(plan_backend, "detect_machine", lambda: nothing)
    assert_says(job(folder, tmp_path / "e.plan"), "no TensorRT backend", "pip install")


def test_a_plan_that_cannot_have_this_name(folder: Path, tmp_path: Path) -> None:
    assert_says(job(folder, tmp_path / "engine.json"), "engine.json", "choose another ending")
    assert_says(job(folder, tmp_path), tmp_path, "is a folder", "engine.plan")
    for place in (".", "/"):
        assert_says(job(folder, Path(place)), f"{place}: is a folder")


def test_a_folder_in_the_place_of_a_file_is_kept(folder: Path, tmp_path: Path) -> None:
    content = tmp_path / "mine" / "content"
    content.parent.mkdir()
    content.write_text("mine")
    bundle = folder / "bundle"
    assert_says(call("build", bundle, "--out", content.parent).error, content.parent, "is a folder", "engine.plan")
    for place in (".", "/"):
        assert_says(
            call("build", bundle, "--out", place).error, f"{place}: this folder cannot be replaced", "a name in"
        )
    checked = call("check", bundle, "--reference", folder / "model", "--out", content.parent).error
    assert_says(checked, content.parent, "is a folder", "give a file name")
    linted = call("check", bundle, "--lint", "--out", content.parent, "--quiet").error
    assert_says(linted, content.parent, "is a folder", "give a file name")
    assert content.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_at_all_is_asked_for() -> None:
    assert_says(call().error, "MODEL")


def exported(folder: Path, *options: str | Path) -> str:
    return call("export", folder / "model", *options).error


def test_export_needs_a_recipe_or_the_word_that_none_is_wanted(folder: Path, tmp_path: Path) -> None:
    recipe = folder / "run" / "recipe.json"
    assert_says(exported(folder, "--out", tmp_path / "b"), "--recipe FILE", "--no-quantize")
    both = exported(folder, "--out", tmp_path / "b", "--recipe", recipe, "--no-quantize")
    assert_says(both, "--recipe and --no-quantize", "give one")


def test_a_recipe_of_another_model(folder: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=7)
    recipe = ("--recipe", folder / "run" / "recipe.json")
    line = call("export", other, *recipe, "--out", tmp_path / "b").error
    assert_says(line, "the recipe was made for model", "other", "calibrate this model")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('"precision"', '"percision"', ("q_proj.precision", "required")),
        ('"alpha"', '"alhpa": 1, "alpha"', ("alhpa", "not permitted")),
        ('"activation_scale": ', '"activation_scale": -', ("activation_scale", "greater than 0")),
        ('"format": 2', '"format": 3', ("format",)),
        ("mlp.up_proj", "mlp.upp_proj", ("mlp.up_proj",)),
        ("{", "", ("recipe.json",)),
    ],
)
def test_a_recipe_with_a_typo(folder: Path, tmp_path: Path, old: str, new: str, parts: tuple[str, ...]) -> None:
    text = (folder / "run" / "recipe.json").read_text()
    assert old in text
    (tmp_path / "recipe.json").write_text(text.replace(old, new, 1))
    assert_says(exported(folder, "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "b"), "recipe", *parts)
    assert not (tmp_path / "b").exists()


def test_a_recipe_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    line = exported(folder, "--recipe", tmp_path / "none.json", "--out", tmp_path / "b")
    assert_says(line, tmp_path / "none.json", "cannot read the recipe")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_export_replaces_nothing_but_a_bundle(folder: Path, tmp_path: Path, kind: str) -> None:
    precious = tmp_path / "thesis"
    if kind == "folder":
        precious.mkdir()
        (precious / "chapter.txt").write_text("years of work")
    else:
        precious.write_text("years of work")
    assert_says(exported(folder, "--no-quantize", "--out", precious), precious, "not a bundle", "another place")
    assert (precious / "chapter.txt" if kind == "folder" else precious).read_text() == "years of work"


@pytest.mark.usefixtures("_rtx_machine")
def test_a_place_below_a_file(folder: Path, calibrated: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    assert_says(calibrated(None, "--work-dir", below), "file", "not a folder", "another place")
    assert_says(exported(folder, "--no-quantize", "--out", below), "file", "not a folder", "another place")
    assert_says(job(folder, below / "e.plan"), "file", "not a folder", "another place")


def broken_bundle(folder: Path, tmp_path: Path, lost: str) -> Path:
    bundle = tmp_path / "bundle"
    shutil.copytree(folder / "bundle", bundle)
    (bundle / lost).unlink()
    return bundle


@pytest.mark.parametrize("lost", ["manifest.json", "model.onnx", "model.onnx.data"])
def test_a_bundle_that_lacks_a_file(folder: Path, tmp_path: Path, lost: str) -> None:
    bundle = broken_bundle(folder, tmp_path, lost)
    for command in (
        ("check", bundle, "--reference", folder / "model"),
        ("build", bundle, "--out", tmp_path / "e.plan", "--backend", "tensorrt-rtx"),
    ):
        if command[0] == "build" and "tensorrt-rtx" not in plan_backend.detect_machine().installed:
            continue
        done = call(*command)
        assert_says(done.error, bundle / lost, "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_a_bundle_of_another_model_is_not_checked(folder: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=7)
    assert_says(call("check", folder / "bundle", "--reference", other).error, folder / "bundle", "other weights")


def test_a_bundle_with_another_tokenizer_is_not_checked(folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(folder / "bundle", bundle)
    document = json.loads((bundle / "tokenizer.json").read_text())
    known = document["model"]["vocab"]
    first, second = list(known)[5:7]
    known[first], known[second] = known[second], known[first]
    (bundle / "tokenizer.json").write_text(json.dumps(document))
    line = call("check", bundle, "--reference", folder / "model", *SMALL).error
    assert_says(line, bundle / "tokenizer.json", "other tokens than the tokenizer of", "export the bundle again")


@pytest.mark.parametrize("option", ["--corpus", "--text"])
def test_a_check_on_a_text_shorter_than_a_window(folder: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    texts = {"--corpus": folder / "corpus.txt", option: tmp_path / "short.txt"}
    given = [str(each) for pair in texts.items() for each in pair]
    line = call("check", folder / "bundle", "--reference", folder / "model", *given, *SMALL).error
    assert_says(line, "short.txt", "tokens", "give a longer corpus")


def test_a_limit_without_a_meaning_is_refused_by_check(folder: Path) -> None:
    line = call("check", folder / "bundle", "--reference", folder / "model", "--max-ppl-increase", "nan").error
    assert_says(line, "--max-ppl-increase is nan")


def test_check_of_windows_longer_than_the_models(folder: Path) -> None:
    assert_says(call("check", folder / "bundle", "--reference", folder / "model").error, "--length is 512", "256")


def test_a_failure_inside_onnx_runtime_is_one_line(
    folder: Path,
) -> None:
    class Failing:
        def run(self, *_: object) -> None:
            raise RuntimeError("out of something\nand a second line")

    session = onnx_session.open_bundle(folder / "bundle")
    broken = onnx_session.BundleSession(session.manifest, Failing())
    with pytest.raises(EngineError, match=r"out of something$"):
        broken.prefill(torch.zeros(1, 4, dtype=torch.int64).numpy())


def test_a_report_of_nothing(tmp_path: Path) -> None:
    assert_says(call("report", tmp_path).error, tmp_path, "nothing to report", "work directory")


@contextmanager
def file_size_limit(most: int) -> Iterator[None]:
    """Let every write beyond `most` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_the_statistics(calibrated: Callable[..., str], tmp_path: Path) -> None:
    with file_size_limit(4096):
        line = calibrated(None, *SMALL)
    assert_says(line, tmp_path / "w" / ".spikes.parts" / "000000.safetensors", "cannot write")
    assert not any(path.is_file() for path in (tmp_path / "w").rglob("*"))


def test_no_room_for_the_bundle_keeps_the_previous_one(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bundle", tmp_path / "bundle")
    before = artifacts(tmp_path)
    with file_size_limit(100_000):
        line = exported(folder, "--no-quantize", "--out", tmp_path / "bundle")
    assert_says(line, tmp_path / "bundle", "cannot write")
    assert artifacts(tmp_path) == before


def test_no_room_for_the_check_keeps_the_previous_one(folder: Path, tmp_path: Path) -> None:
    former = b'{"format": 1, "reference": {"perplexity": 1.0}, "variants": []}'
    (tmp_path / "c.json").write_bytes(former)
    options = ("--reference", folder / "model", "--corpus", folder / "corpus.txt", "--length", "32", "--force")
    with file_size_limit(8192):
        line = call("check", folder / "bundle", *options, "--out", tmp_path / "c.json").error
    assert_says(line, "cannot write")
    assert artifacts(tmp_path) == {"c.json": former}


def test_a_full_disk(folder: Path, tmp_path: Path) -> None:
    options = ("--corpus", folder / "corpus.txt", "--samples", "64", "--length", "32", "--quiet")
    with small_disk(tmp_path / "disk", "96k") as disk:
        line = call("calibrate", folder / "model", "--work-dir", disk, *options).error
        assert_says(line, disk / ".spikes.parts", ".safetensors: cannot write", "the disk is full")


def test_a_gguf_file_is_calibrated_like_a_directory(folder: Path, tmp_path: Path) -> None:
    """Not a refusal: it shows that the refusals above are not of the kind of file."""
    path = write_gguf(tmp_path / "model.gguf", planted_spike_llama()).path
    assert gguf.GGUFReader(path).tensors
    options = ("--work-dir", tmp_path / "w", "--corpus", folder / "corpus.txt", *SMALL, "--no-qfep")
    assert call("calibrate", path, *options).code == 0
