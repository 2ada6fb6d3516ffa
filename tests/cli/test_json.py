"""Results: with `--json` one document, whose keys the documentation lists; in words within 80 columns of a terminal."""

import json
from pathlib import Path
from typing import Any

import pytest

from spike_export.cli.main import app
from spike_export.engines.plan.backend import TENSORRT_RTX
from tests.support.documentation import json_keys
from tests.support.terminal_words import kept_words, too_wide
from tests.support.tiny.cli_models import SMALL, Outcome, call, write_corpus, write_inputs

pytestmark = pytest.mark.usefixtures("one_thread", "denormals_as_before", "blank_pictures")

WITHOUT = {"serve"}
"""A server's result is that it runs."""

WITHOUT_WORDS = {"generate", "triton"}
"""The one writes the model's text, the other says on standard error where the model lies."""

BUNDLE, RUN, CORPUS = "engine.plan.run/bundle", "engine.plan.run", ("--corpus", "corpus.txt", *SMALL)
CHECK = ("check", BUNDLE, "--reference", "model", *CORPUS)
NEVER = ("--hadamard", "never")
"""For the recipe that is written as a checkpoint for vLLM too."""
COMMANDS: dict[str, tuple[str, ...]] = {
    "calibrate": ("calibrate", "model", "--work-dir", RUN, *CORPUS, *NEVER),
    "calibrate --shard": ("calibrate", "model", "--work-dir", "2", "--shard", "2/2", *CORPUS),
    "merge": ("merge", "1", "2", "--work-dir", "merged"),
    "export": ("export", "model", "--no-quantize", "--out", "plain"),
    "export --format compressed-tensors": (
        *("export", "model", "--format", "compressed-tensors", "--out", "vllm"),
        *("--recipe", f"{RUN}/recipe.json"),
    ),
    "check": (*CHECK, "--text", "other.txt", "--text", "third.txt"),
    "check --parity": (*CHECK, "--parity"),
    "check --clipping": ("check", BUNDLE, "--clipping", "other.txt", "--length", "32"),
    "check --continuations": (*CHECK, "--continuations", "2"),
    "check --lint": ("check", BUNDLE, "--lint"),
    "build": ("build", BUNDLE, "--out", "engine.plan", "--target", "SM86"),
    "inspect RUN": ("inspect", RUN),
    "inspect BUNDLE": ("inspect", BUNDLE),
    "inspect PLAN": ("inspect", "engine.plan"),
    "diff": ("diff", RUN, RUN),
    "revalidate": ("revalidate", RUN, "model", *CORPUS),
    "generate": ("generate", BUNDLE, "--prompt", "a", "--max-new-tokens", "2"),
    "triton": ("triton", BUNDLE, "--out", "repository"),
    "report": ("report", RUN),
}
MAIN = "spike-export MODEL"
ELSEWHERE = {"bench", "check --tasks"}
"""Tried in tests/serving/test_load.py, which has the time to start a server, and tests/cli/commands/test_tasks.py."""


def read(outcome: Outcome) -> Any:
    """Return the document of a command that went well: all that is on standard output."""
    assert outcome.code in (0, 1), outcome.err
    return json.loads(outcome.out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a model, a corpus and what the main job left, and the job's document."""
    pytest.importorskip(TENSORRT_RTX.module, reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}")
    folder = write_inputs(tmp_path_factory.mktemp("json"))
    write_corpus(folder / "other.txt", seed=1)
    write_corpus(folder / "third.txt", seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = kept_words(patch)
        done = call("model", "--out", "engine.plan", "--target", "SM86", *CORPUS, *NEVER, "--max-kl", "1e-9", "--json")
        assert (done.code, read(done)["engine"]) == (1, None), "a missed limit has a document too"
        whole = call("model", "--out", "engine.plan", "--target", "SM86", *CORPUS, *NEVER, "--json")
        assert call("calibrate", "model", "--work-dir", "1", "--shard", "1/2", *CORPUS).code == 0
    assert "[1/" in whole.err, "the progress is on standard error"
    assert any(line.startswith("plan: ") for line in words)
    assert too_wide(words) == []
    return folder, read(whole)


def test_the_main_jobs_document_holds_those_of_its_parts(finished: tuple[Path, Any]) -> None:
    document, keys = finished[1], json_keys()
    assert sorted(document) == sorted(keys[MAIN])
    assert sorted(document["engine"]) == sorted(keys["build"])
    assert sorted(document["check"]) == sorted(keys["check"])


def test_every_command_has_documented_keys() -> None:
    """Each command is tried here, and takes the option."""
    assert set(json_keys()) == {MAIN, *COMMANDS, *ELSEWHERE}
    commands = {name for name in app if not name.startswith("-")}
    assert {words[0] for words in COMMANDS.values()} == commands - WITHOUT - ELSEWHERE
    for name in commands - WITHOUT:
        names = {each for argument in app[name].assemble_argument_collection() for each in argument.names}
        assert "--json" in names, name


@pytest.mark.parametrize("command", COMMANDS)
def test_a_result_is_one_document_with_the_documented_keys_or_words_within_80_columns(
    finished: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(finished[0])
    words = kept_words(monkeypatch)
    document = read(call(*COMMANDS[command], "--json"))
    for each in document if isinstance(document, list) else [document]:
        assert sorted(each) == sorted(json_keys()[command])
    assert too_wide(words) == []
    assert words or command in WITHOUT_WORDS


def test_an_error_leaves_standard_output_empty(tmp_path: Path) -> None:
    for command in (("inspect", tmp_path, "--json"), ("diff", tmp_path, tmp_path, "--json")):
        outcome = call(*command)
        assert outcome.error
        assert outcome.out == ""
