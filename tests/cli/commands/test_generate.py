"""spike-export generate: text as it comes, several prompts, JSON, and bad input on one line."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spike_export.cli.arguments import SamplingArguments
from spike_export.cli.commands.generate import option_changes
from spike_export.cli.terminal.generated_text import write_generated
from spike_export.engines import runtime_choice
from spike_export.engines.engine import Engine
from spike_export.engines.generation.generated_text import Generation, Piece
from tests.support.tiny.cli_models import call, write_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    outcome = call(
        "export", write_model(folder / "model"), "--no-quantize", "--dtype", "float32", "--out", folder / "bundle"
    )
    assert outcome.code == 0, outcome.err
    return folder / "bundle"


def generated(bundle: Path, *arguments: str | Path) -> str:
    outcome = call("generate", bundle, "--threads", "1", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out


def test_text_and_json_are_the_engines(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("ab\u20ac", encoding="utf-8")
    options = {"max_new_tokens": 9, "do_sample": True, "seed": 4, "temperature": 0.7, "ignore_eos": True}
    first, second = Engine.open(bundle, threads=1).generate(["12", "ab\u20ac"], logprobs=1, **options)
    flags = ("--max-new-tokens", "9", "--seed", "4", "--temperature", "0.7", "--ignore-eos")
    prompts = ("--prompt", "12", "--prompt-file", tmp_path / "prompt.txt")
    assert generated(bundle, *prompts[:2], *flags) == first.text + "\n"
    assert generated(bundle, *prompts, *flags) == f"[0]{first.text}\n\n[1]{second.text}\n"
    told: list[dict[str, Any]] = json.loads(generated(bundle, *prompts, *flags, "--json", "--logprobs", "1"))
    assert [tuple(each["token_ids"]) for each in told] == [first.token_ids, second.token_ids]
    assert [each["text"] for each in told] == [first.text, second.text]
    assert told[0]["finish_reason"] == "length"
    assert first.logprobs is not None
    assert told[0]["logprobs"][2]["logprob"] == pytest.approx(first.logprobs[2].logprob)
    assert len(told[1]["logprobs"][0]["top"]) == 1


def test_standard_operators_say_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bool] = []
    monkeypatch.setattr(
        runtime_choice,
        "open_onnx",
        lambda *given, lowering, open_onnx=runtime_choice.open_onnx, **more: (
            opened.append(lowering) or open_onnx(*given, lowering=lowering, **more)  # type: ignore[func-returns-value]
        ),
    )
    static = bundle.parent / "static"
    options = ("--no-quantize", "--dtype", "float32", "--kv-cache", "static", "--capacity", "32")
    assert call("export", bundle.parent / "model", *options, "--out", static).code == 0
    asked = ("--prompt", "12", "--prompt", "ab", "--max-new-tokens", "9", "--ignore-eos")
    assert generated(static, *asked) == generated(static, *asked, "--no-lowering")
    assert opened == [True, False]


@pytest.mark.parametrize("weights_copy", ["never", "auto"])
def test_the_copy_of_the_weights_is_chosen(weights_copy: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def remembered(*given: Any, open_onnx: Any = runtime_choice.open_onnx, **more: Any) -> Any:
        opened.append(more["weights_copy"])
        return open_onnx(*given, **more)

    monkeypatch.setattr(runtime_choice, "open_onnx", remembered)
    assert generated(bundle, "--prompt", "12", "--max-new-tokens", "3", "--weights-copy", weights_copy)
    assert opened == [weights_copy]


def test_drafts_are_counted(bundle: Path) -> None:
    static = bundle.parent / "drafted"
    options = ("--no-quantize", "--dtype", "float32", "--kv-cache", "static", "--capacity", "64")
    assert call("export", bundle.parent / "model", *options, "--out", static).code == 0
    asked = ("--prompt", "1212121212", "--max-new-tokens", "50", "--ignore-eos")
    (told,) = json.loads(generated(static, *asked, "--speculate", "ngram", "--json"))
    assert told["text"] + "\n" == generated(static, *asked)
    assert 0 <= told["speculation"]["accepted"] <= told["speculation"]["drafted"]
    assert "static cache" in call("generate", bundle, "--prompt", "1", "--speculate", "ngram").error


def test_what_the_outputs_encoding_lacks_is_no_traceback() -> None:
    text = "2 \u20ac \u4e2d"  # the euro sign is in cp1252, the Chinese character is not
    told: Any = SimpleNamespace(
        stream=lambda prompts, **_: iter([Piece(row, 1, text) for row in range(len(prompts))]),
        generate=lambda prompts, **_: [Generation(text, (1,), "stop", 1)],
        drafts=None,
    )

    def written(encoding: str, prompts: int = 1, **how: Any) -> str:
        raw = io.BytesIO()
        out = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
        write_generated(told, ["a"] * prompts, {}, out=out, **how)
        out.flush()
        return raw.getvalue().decode(encoding)

    assert written("cp1252", as_json=False) == "2 \u20ac ?\n"
    assert written("cp1252", 2, as_json=False) == "[0]2 \u20ac ?\n\n[1]2 \u20ac ?\n"
    assert written("utf-8", as_json=False) == text + "\n"
    for encoding in ("cp1252", "ascii", "UTF8"):
        assert json.loads(written(encoding, as_json=True))[0]["text"] == text
    assert "\u4e2d" in written("UTF8", as_json=True)


def test_a_stop_string_ends_the_text(bundle: Path) -> None:
    options = ("--prompt", "12", "--max-new-tokens", "12", "--ignore-eos")
    text = generated(bundle, *options).removesuffix("\n")
    assert generated(bundle, *options, "--stop", text[4:6], "--stop", "~~~~") == text[: text.index(text[4:6])] + "\n"


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, {}),
        ({"temperature": 0.5}, {"temperature": 0.5, "do_sample": True}),
        ({"top_k": 0}, {"top_k": 0, "do_sample": True}),
        ({"seed": 0}, {"seed": 0, "do_sample": True}),
        ({"do_sample": False, "top_p": 0.9}, {"do_sample": False, "top_p": 0.9}),
        ({"do_sample": True}, {"do_sample": True}),
        ({"repetition_penalty": 1.2, "stop": ("a",)}, {"repetition_penalty": 1.2, "stop_strings": ("a",)}),
    ],
    ids=str,
)
def test_what_only_sampling_looks_at_asks_for_sampling(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    assert option_changes(SamplingArguments(**fields)) == changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "generate needs --prompt TEXT or --prompt-file FILE"),
        (("--prompt", ""), "prompt 0 is empty; give some text"),
        (("--prompt", "a" * 300), "prompt 0 has 301 tokens, and a sequence has room for 256; shorten it"),
        (("--prompt", "a", "--max-new-tokens", "256"), "ask for at most 255 new ones"),
        (("--prompt", "a", "--top-p", "0"), "top_p is 0.0; expected above 0 and at most 1"),
        (("--prompt", "a", "--temperature", "0"), "temperature is 0.0; expected at least 0.0001"),
        (("--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens is 0; expected at least 1"),
        (("--prompt", "a", "--seed", "-3"), "seed is -3"),
        (("--prompt", "a", "--stop", ""), "stop_strings is ('',); expected no empty string"),
        (("--prompt", "a", "--chat"), "prompt 0 is a chat, and the bundle has no chat_template.jinja"),
        (("--prompt", "a", "--system", "b"), "--system is a message of a chat; add --chat, or leave it out"),
        (("--prompt", "a", "--logprobs", "2"), "generate writes log-probabilities with --json only"),
        (("--prompt", "a", "--provider", "npu"), "npu"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt: No such file or directory"),
    ],
    ids=str,
)
def test_bad_input(bundle: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in call("generate", bundle, *arguments).error


def test_a_prompt_file_that_is_no_text(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"\xff\xfe")
    assert "not UTF-8 text; convert it" in call("generate", bundle, "--prompt-file", tmp_path / "p").error


def test_cuda_where_there_is_none(bundle: Path) -> None:
    import onnxruntime as ort

    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has a CUDA provider")
    assert "install the extra `gpu`" in call("generate", bundle, "--prompt", "a", "--provider", "cuda").error


def test_what_is_no_bundle(tmp_path: Path) -> None:
    assert "cannot read the manifest" in call("generate", tmp_path, "--prompt", "a").error


def test_an_interrupt_says_nothing_about_stages(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", interrupted)
    outcome = call("generate", bundle, "--prompt", "a")
    assert (outcome.code, outcome.err) == (130, "")
