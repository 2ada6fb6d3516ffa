"""Prompts in, text out: what is fed, where a text ends, what streams, and what is refused."""

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedTokenizerFast

from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.manifest import load_manifest
from spike_export.engines.engine import Engine
from spike_export.engines.generation.decoding import DecodedStep
from spike_export.engines.generation.options import GenerationOptions
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.graph_parity import reference_logits
from tests.support.tiny.checkpoints import BOS, EOS, byte_tokenizer
from tests.support.tiny.models import TinyModel, tiny_llama, unquantized_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = (
    "<s>{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' }}{{ m.role[0] }}:{{ m.content }};"
    "{% endfor %}{{ 'a:' if add_generation_prompt }}"
)


def byte_ids(text: str) -> list[int]:
    return [byte + 2 for byte in text.encode()]


@dataclass
class Scripted:
    """A runtime that says given tokens, whatever it is fed."""

    rows: Sequence[Sequence[int]]
    fed: list[list[int]] = field(default_factory=list)
    steps: int = 0
    closed: bool = False

    def decode(self, prompts: Sequence[NDArray[np.int64]], options: GenerationOptions) -> Iterator[DecodedStep]:
        self.fed = [prompt.tolist() for prompt in prompts]
        return self._steps(options)

    def _steps(self, options: GenerationOptions) -> Iterator[DecodedStep]:
        try:
            for step in range(options.max_new_tokens):
                self.steps += 1
                tokens = np.array([row[min(step, len(row) - 1)] for row in self.rows])
                best = None if options.logprobs is None else np.stack([tokens, tokens + 1], axis=1)
                yield DecodedStep(tokens, -tokens / 100, best, None if best is None else -best / 100)
        finally:
            self.closed = True


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_llama(max_positions=96)


@pytest.fixture(scope="module")
def folder(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a tokenizer of bytes."""
    return exported(model, tmp_path_factory.mktemp("engine"))


def exported(model: TinyModel, folder: Path, prefix: tuple[int, ...] = (), **changes: Any) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    checkpoint = replace(model.checkpoint, tokenizer=tokenizer, **changes)
    recipe = unquantized_recipe(checkpoint, prefix) if prefix else None
    export_bundle(checkpoint, recipe, ExportOptions("float32"), folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def engine(folder: Path) -> Engine:
    """The bundle's tokenizer and manifest, a vocabulary of all bytes, and no model behind it."""
    opened = Engine.open(folder, threads=1)
    return replace(
        opened,
        manifest=opened.manifest.model_copy(update={"vocab_size": 300}),
        defaults=replace(opened.defaults, eos_token_ids=(EOS,)),
    )


def says(engine: Engine, *texts: str | Sequence[int]) -> tuple[Engine, Scripted]:
    """The engine with a runtime that says these texts."""
    runtime = Scripted([byte_ids(text) if isinstance(text, str) else text for text in texts])
    return replace(engine, decoding=runtime), runtime


def test_text_is_what_transformers_would_generate(model: TinyModel, folder: Path) -> None:
    ids = [BOS, *byte_ids("AB")]
    expected = list(ids)
    for _ in range(6):
        expected.append(int(reference_logits(model, np.array([expected]))[0, -1].argmax()))
    (result,) = Engine.open(folder, threads=1).generate("AB", max_new_tokens=6, ignore_eos=True)
    assert result.token_ids == tuple(expected[3:])
    assert result.finish_reason == "length"
    assert result.prompt_tokens == 3


def test_bos_is_fed_before_a_text_unless_the_prefix_holds_it(model: TinyModel, engine: Engine, tmp_path: Path) -> None:
    plain, runtime = says(engine, "x", "x", "x")
    plain.generate(["ab", "<s>ab", np.array([BOS, 8])], max_new_tokens=1)
    assert runtime.fed == [[BOS, *byte_ids("ab")], [BOS, *byte_ids("ab")], [BOS, 8]]
    text, chat = byte_ids("\t"), byte_ids("\t:\n;a:")
    # The template spells BOS out, and is therefore not silenced by a tokenizer whose `bos_token` is empty.
    for prefix, of_text, of_chat in (
        ((BOS, 9), text, chat),
        ((9, BOS), text, chat),
        ((9, 10), [BOS, *text], [BOS, *chat]),
    ):
        opened = Engine.open(exported(model, tmp_path / str(prefix), prefix), threads=1)
        opened = replace(opened, manifest=opened.manifest.model_copy(update={"vocab_size": 300}))
        behind, runtime = says(opened, "x", "x")
        behind.generate(["\t", [{"role": "\t", "content": "\n"}]], max_new_tokens=1, ignore_eos=True)
        assert runtime.fed == [of_text, of_chat]


@pytest.mark.parametrize(
    "prompts", [[BOS, 8], (BOS, 8), [[BOS, 8]], np.array([[BOS, 8]]), np.array([BOS, 8], np.uint8)]
)
def test_tokens_may_be_lists_or_arrays(engine: Engine, prompts: Any) -> None:
    told, runtime = says(engine, "x")
    told.generate(prompts, max_new_tokens=1)
    assert runtime.fed == [[BOS, 8]]


def test_a_chat_is_rendered_by_the_template(engine: Engine) -> None:
    told, runtime = says(engine, "x")
    told.generate([[{"role": "user", "content": "Hi"}]], max_new_tokens=1)
    assert runtime.fed == [[BOS, *byte_ids("u:Hi;a:")]]


def test_rows_end_for_themselves_and_the_runtime_stops_with_the_last(engine: Engine) -> None:
    told, runtime = says(engine, [*byte_ids("one"), EOS, 50], "endless", "a stop")
    results = told.generate(["1", "2", "3"], max_new_tokens=7, stop_strings=("st",))
    assert [(result.text, result.finish_reason) for result in results] == [
        ("one", "stop"),
        ("endless", "length"),
        ("a ", "stop"),
    ]
    assert results[0].token_ids == (*byte_ids("one"), EOS)
    assert results[2].token_ids == tuple(byte_ids("a st"))
    assert [result.prompt_tokens for result in results] == [2, 2, 2]
    short, runtime = says(engine, [60, EOS], [EOS])
    short.generate(["1", "2"], max_new_tokens=50)
    assert (runtime.steps, runtime.closed) == (2, True)


def test_who_stops_reading_stops_the_runtime(engine: Engine) -> None:
    told, runtime = says(engine, "endless")
    pieces = told.stream("1", max_new_tokens=50)
    assert [next(pieces).text for _ in range(3)] == list("end")
    assert not runtime.closed
    assert isinstance(pieces, Generator)
    pieces.close()
    assert (runtime.steps, runtime.closed) == (3, True)


def test_ignoring_the_end_goes_on_and_other_ends_can_be_named(engine: Engine) -> None:
    told, _ = says(engine, [*byte_ids("a"), EOS, *byte_ids("b")])
    (result,) = told.generate("1", max_new_tokens=3, ignore_eos=True)
    assert (result.text, result.finish_reason) == ("ab", "length")
    (result,) = told.generate("1", max_new_tokens=3, eos_token_ids=(byte_ids("b")[0],))
    assert (result.text, result.finish_reason) == ("a", "stop")
    assert told.generate("1", GenerationOptions(max_new_tokens=3))[0].text == "a"


def test_pieces_are_whole_characters_and_make_up_the_text(engine: Engine) -> None:
    text = "a\u20ac \U0001f600!"
    told, _ = says(engine, text)
    pieces = list(told.stream("1", max_new_tokens=len(text.encode())))
    assert [piece.text for piece in pieces if piece.text] == list(text)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    # What is cut within a character, or could have become a stop string, is told at the end.
    (cut,) = says(engine, "a\u20ac")[0].generate("1", max_new_tokens=3)
    assert cut.text == "a\N{REPLACEMENT CHARACTER}"
    (held,) = says(engine, "ab#")[0].generate("1", max_new_tokens=3, stop_strings=("#end",))
    assert (held.text, held.finish_reason) == ("ab#", "length")


def test_a_stop_string_in_the_last_piece_counts(engine: Engine) -> None:
    (result,) = says(engine, "ab.")[0].generate("1", max_new_tokens=3, stop_strings=(".",))
    assert (result.text, result.finish_reason) == ("ab", "stop")
    for strings, expected in (("b.", ("a", "stop")), (".b", ("ab.", "length"))):
        (result,) = says(engine, "ab.")[0].generate("1", max_new_tokens=3, stop_strings=strings)
        assert (result.text, result.finish_reason) == expected


def test_logprobs_are_there_when_asked_for(engine: Engine) -> None:
    (result,) = says(engine, "ab")[0].generate("1", max_new_tokens=2, logprobs=2)
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == byte_ids("ab")
    assert result.logprobs[0].logprob == pytest.approx(-0.99)
    assert result.logprobs[0].top == ((99, pytest.approx(-0.99)), (100, pytest.approx(-1.0)))


def test_defaults_are_the_models(model: TinyModel, tmp_path: Path) -> None:
    given = {"do_sample": True, "temperature": 0.6, "top_p": None, "eos_token_id": [5, 6], "pad_token_id": 5}
    defaults = Engine.open(exported(model, tmp_path, generation_config=given), threads=1).defaults
    assert defaults == GenerationOptions(do_sample=True, temperature=0.6, top_k=50, eos_token_ids=(5, 6))
    given = {"top_k": 0, "do_sample": True}
    assert Engine.open(exported(model, tmp_path / "all", generation_config=given), threads=1).defaults.top_k == 0


def test_what_nobody_gives_is_what_transformers_takes(engine: Engine) -> None:
    taken = GenerationConfig._get_default_generation_params()
    for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(engine.defaults, name) == taken[name]


def test_without_a_generation_config_the_end_is_the_tokenizers(model: TinyModel, tmp_path: Path) -> None:
    bundle = exported(model, tmp_path)
    (bundle / "generation_config.json").unlink()
    manifest = load_manifest(bundle).model_copy(update={"eos_token_ids": ()})
    (bundle / "manifest.json").write_text(manifest.model_dump_json())
    assert Engine.open(bundle, threads=1).defaults.eos_token_ids == (EOS,)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "prompt 0 is empty; give some text"),
        (["a", ""], "prompt 1 is empty; give some text"),
        ([], "there is no prompt; give at least one"),
        ([[]], "prompt 0 is empty; give some messages"),
        ([{"role": "user", "content": "a"}], "prompt 0 is a single message; a chat is a list of them"),
        ([[1, "b"]], "prompt 0 is no text, no list of messages and no array of tokens"),
        ([True, False], "prompt 0 is no text, no list of messages and no array of tokens"),
        (b"ab", "prompt 0 is no text, no list of messages and no array of tokens"),
        ({"role": "user", "content": "a"}, "the prompts are of the type dict; give one text, or a list of prompts"),
        (torch.tensor([1, 2]), "the prompts are of the type Tensor"),
        (np.array(3), "the prompts are of the type ndarray"),
        # Under a name of its own: an iterator's address is another one in each process that shares the suite.
        pytest.param(iter(["a"]), "the prompts are of the type list_iterator", id="iterator"),
        ([torch.tensor([1, 2])], "prompt 0 is no text, no list of messages and no array of tokens"),
        ([np.array([[1, 2]])], r"prompt 0 has the shape \[1, 2\]; expected tokens in one row"),
        ([np.array([1.7, 2])], "prompt 0 is of type float64, and tokens are integers"),
        ([np.array([True])], "prompt 0 is of type bool"),
        (["a", "a\udcff"], "prompt 1 is no Unicode text: its character 1 cannot be encoded; give it in UTF-8"),
        ([[{"role": "user", "content": "\udcff"}]], "prompt 0 is no Unicode text"),
        ([np.array([1, 300])], "prompt 0 holds the token 300; the model knows 0 to 299"),
        ([np.array([-1])], "prompt 0 holds the token -1"),
        ([np.zeros(0, np.int64)], "prompt 0 is empty"),
        ([[{"role": "system", "content": "a"}]], r"prompt 0: the chat template refuses it \(no system\); correct it"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_used(engine: Engine, prompts: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine.generate(prompts)


def test_a_prompt_beyond_the_context_is_refused_at_once(folder: Path) -> None:
    engine = Engine.open(folder, threads=1)
    for call in (engine.generate, engine.stream):
        with pytest.raises(EngineError, match="prompt 0 has 97 tokens, and a sequence has room for 96; shorten it"):
            call("\t" * 96)


def test_bundles_that_cannot_be_opened(model: TinyModel, tmp_path: Path) -> None:
    bundle = exported(model, tmp_path)
    (bundle / "chat_template.jinja").unlink()
    with pytest.raises(EngineError, match=r"prompt 0 is a chat, and the bundle has no chat_template.jinja"):
        Engine.open(bundle, threads=1).generate([[{"role": "user", "content": "a"}]])
    (bundle / "generation_config.json").write_text(json.dumps({"temperature": 0.0}))
    with pytest.raises(EngineError, match=r"generation_config.json: temperature is 0.0; expected at least 0.0001"):
        Engine.open(bundle)
    (bundle / "generation_config.json").write_text("{")
    with pytest.raises(EngineError, match=r"generation_config.json: not a JSON object"):
        Engine.open(bundle)
    (bundle / "tokenizer.json").write_text("{")
    with pytest.raises(EngineError, match="cannot load the tokenizer"):
        Engine.open(bundle)
    (bundle / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match=r"tokenizer.json: this file is missing, and text needs a tokenizer"):
        Engine.open(bundle)
    (bundle / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"is .* a bundle"):
        Engine.open(bundle)
