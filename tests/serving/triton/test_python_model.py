"""The model inside Triton's Python backend, driven through a stand-in of the backend's module."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spike_export import Engine
from spike_export.serving.triton.model_settings import ModelSettings
from spike_export.serving.triton.python_model import model_class
from spike_export.serving.triton.repository import write_repository
from spike_export.serving.triton.tensors import OUTPUTS
from tests.support.tiny.service import CAPACITY, write_served_bundle
from tests.support.triton_backend import Backend, TritonError, ask, request_of

GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("triton")
    bundle = write_served_bundle(place)
    return write_repository(bundle, place / "repository", "tiny", ModelSettings(threads=1, rows=3, queue=2))


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    settings = ModelSettings(threads=1, rows=3, queue=2).parameters()
    config = {"parameters": {key: {"string_value": value} for key, value in settings.items()}}
    backend = Backend(folder, config)
    made = model_class(backend)()
    made.initialize(backend.arguments())
    yield made
    made.finalize()


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    with Engine.open(folder / "1/bundle") as engine:
        return engine.generate("ab cd", max_new_tokens=12, do_sample=False)[0].text


def text(arrays: Any) -> str:
    (only,) = arrays["text_output"]
    return str(only.decode())


def test_one_response_has_the_prompt_in_front_unless_it_is_excluded(model: Any, expected: str) -> None:
    asked = {"text_input": "ab cd", "sampling_parameters": json.dumps(GREEDY)}
    (whole,) = ask(model, asked)
    assert text(whole) == "ab cd" + expected
    (alone,) = ask(model, asked | {"exclude_input_in_output": True})
    assert text(alone) == expected


def test_a_stream_has_the_same_text_in_pieces(model: Any, expected: str) -> None:
    pieces = ask(
        model,
        {
            "text_input": "ab cd",
            "stream": True,
            "return_num_input_tokens": True,
            "return_num_output_tokens": True,
            "return_finish_reason": True,
        },
        GREEDY,  # as /generate_stream sends them: parameters of the request
    )
    assert "".join(map(text, pieces)) == expected
    assert len(pieces) > 3
    assert sum(int(each["num_output_tokens"][0]) for each in pieces) == 12
    assert {int(each["num_input_tokens"][0]) for each in pieces} == {5}
    assert [each["finish_reason"][0] for each in pieces] == [b"None"] * (len(pieces) - 1) + [b"length"]


def test_tensors_are_those_of_the_configuration(model: Any) -> None:
    asked = {f"return_{name}": True for name in ("finish_reason", "cumulative_logprob", "logprobs")}
    asked |= {"return_num_input_tokens": True, "return_num_output_tokens": True}
    (found,) = ask(model, {"text_input": "ab", **asked}, GREEDY | {"n": 2})
    kinds = {"TYPE_STRING": np.object_, "TYPE_FP32": np.float32, "TYPE_UINT32": np.uint32}
    assert found.keys() == {spec.name for spec in OUTPUTS}
    for spec in OUTPUTS:
        assert found[spec.name].dtype == kinds[spec.type]
        assert found[spec.name].shape == ((2,) if spec.size == -1 else (spec.size,))


def test_logprobs_are_json_of_each_token(model: Any) -> None:
    (found,) = ask(model, {"text_input": "ab", "return_cumulative_logprob": True}, GREEDY | {"logprobs": 2})
    entries = json.loads(found["logprobs"][0])
    assert len(entries) == 12
    assert all({each["rank"] for each in entry.values()} == {1, 2} for entry in entries)
    best = [max(each["logprob"] for each in entry.values()) for entry in entries]
    assert found["cumulative_logprob"][0] == pytest.approx(sum(best), rel=1e-5)


def test_stop_lists_and_texts_for_numbers_are_understood(model: Any, expected: str) -> None:
    stop = expected[3:5]
    (found,) = ask(
        model,
        {"text_input": "ab cd", "exclude_input_in_output": True, "return_finish_reason": True},
        {"temperature": "0", "max_tokens": "12", "stop": ["never", stop]},
    )
    assert text(found) == expected[: expected.index(stop)]
    assert found["finish_reason"][0] == b"stop"


def test_a_second_bos_is_removed(model: Any, expected: str) -> None:
    """Triton's OpenAI frontend renders the chat template of the original model, which spells BOS."""
    asked = {"text_input": "<s>ab cd", "exclude_input_in_output": True, "return_num_input_tokens": True}
    (found,) = ask(model, asked, GREEDY)
    assert text(found) == expected
    assert found["num_input_tokens"][0] == 5


def frontend_inputs(prompt: str, **changes: Any) -> dict[str, Any]:
    """What Triton's OpenAI frontend sends with `--backend vllm`: all fields of a request that are not null."""
    sampling = {"frequency_penalty": 0, "presence_penalty": 0, "ignore_eos": False, "n": 1, "top_p": 1}
    flags = {name: changes.pop(name, False) for name in ("stream", "echo")}
    return {
        "text_input": prompt,
        "stream": flags["stream"],
        "exclude_input_in_output": not flags["echo"],
        "sampling_parameters": json.dumps(sampling | GREEDY | changes),
        "return_logprobs": False,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }


def test_the_frontends_completion_is_one_response_of_one_text(model: Any, expected: str) -> None:
    """The frontend reads a single string, and refuses further responses where it asked for no stream."""
    (found,) = ask(model, frontend_inputs("ab cd", seed=-3, stop=["never"]))
    assert text(found) == expected
    assert found.keys() == {"text_output", "num_input_tokens", "num_output_tokens"}
    assert [int(found[f"num_{kind}_tokens"][0]) for kind in ("input", "output")] == [5, 12]
    (echoed,) = ask(model, frontend_inputs("ab cd", echo=True))
    assert text(echoed) == "ab cd" + expected


def test_the_frontends_stream_adds_up_to_its_usage(model: Any, expected: str) -> None:
    """The frontend takes the prompt's tokens from the first piece, and sums the others'."""
    pieces = ask(model, frontend_inputs("ab cd", stream=True))
    assert "".join(map(text, pieces)) == expected
    assert pieces[0]["num_input_tokens"][0] == 5
    assert sum(int(each["num_output_tokens"][0]) for each in pieces) == 12


@pytest.mark.parametrize("name", ["structured_outputs", "guided_decoding"])
def test_the_frontends_tool_has_arguments_of_its_schema(model: Any, name: str) -> None:
    """A named tool's parameters come as vLLM's fields in JSON text, the schema as JSON text in it."""
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    fields = {"json": json.dumps(schema | {"additionalProperties": False}), "regex": None, "choice": None}
    fields |= {"json_object": None, "disable_any_whitespace": False, "_backend": None}
    (found,) = ask(model, frontend_inputs("ab", max_tokens=60, **{name: json.dumps(fields)}))
    assert json.loads(text(found)) in ({"a": "x"}, {"a": "y"})


def asked_until_there_is_room(model: Any, inputs: dict[str, Any]) -> list[dict[str, NDArray[Any]]]:
    """Return the responses to a greedy request: an answer ends just before its row is free."""
    give_up = time.monotonic() + 30
    while True:
        try:
            return ask(model, inputs, GREEDY)
        except TritonError as error:
            if error.code() != TritonError.UNAVAILABLE or time.monotonic() > give_up:
                raise
            time.sleep(0.01)


def test_a_cancelled_request_leaves_its_row(model: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tiny model may be done before a look that comes every tenth of a second.
    monkeypatch.setattr("spike_export.serving.triton.python_model._LOOK_SECONDS", 0.001)
    asked = {"text_input": "ab cd", "stream": True}
    requests = [request_of(asked, GREEDY | {"max_tokens": CAPACITY - 20, "ignore_eos": True}) for _ in range(5)]
    model.execute(requests)
    senders = [request.get_response_sender() for request in requests]
    for sender in senders:
        sender.cancelled = True
    for sender in senders:
        assert sender.ended.wait(30)
        error = sender.responses[-1].error()
        assert error is None or error.code() == TritonError.CANCELLED
    assert any(sender.responses[-1].has_error() for sender in senders)
    (found,) = asked_until_there_is_room(model, {"text_input": "ab cd", "exclude_input_in_output": True})
    assert text(found) == expected


def test_too_many_requests_are_told_to_come_again(model: Any) -> None:
    long = GREEDY | {"max_tokens": CAPACITY - 20, "ignore_eos": True}
    requests = [request_of({"text_input": "ab cd", "stream": True}, long) for _ in range(8)]
    model.execute(requests)
    senders = [request.get_response_sender() for request in requests]
    assert all(sender.ended.wait(60) for sender in senders)
    errors = [error for sender in senders if (error := sender.responses[-1].error()) is not None]
    assert 1 <= len(errors) <= 8 - 5  # a row may be free again before the last request comes
    assert {error.code() for error in errors} == {TritonError.UNAVAILABLE}


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ({"text_input": ""}, {}, "prompt 0 is empty"),
        ({"text_input": "a", "sampling_parameters": "{"}, {}, "no JSON object"),
        ({"text_input": "a"}, {"max_tokens": CAPACITY + 9}, "tokens"),
        ({"text_input": "a"}, {"temperature": "hot"}, "temperature"),
        ({"text_input": "a"}, {"min_tokens": 4}, "min_tokens"),
        ({"text_input": "a"}, {"structured_outputs": "3"}, "expected a JSON object"),
        ({"text_input": "a"}, {"structured_outputs": '{"json": "{"}'}, "structured_outputs"),
        ({"text_input": "a", "stream": True, "exclude_input_in_output": False}, {}, "does not repeat the prompt"),
    ],
)
def test_a_bad_request_is_refused_and_the_model_goes_on(
    model: Any, inputs: dict[str, Any], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(TritonError, match=message) as refused:
        ask(model, inputs, parameters)
    assert refused.value.code() == TritonError.INVALID_ARG


def test_requests_in_progress_end_before_the_model_does(folder: Path) -> None:
    backend = Backend(folder, {"parameters": {"THREADS": {"string_value": "1"}, "ROWS": {"string_value": "2"}}})
    made = model_class(backend)()
    made.initialize(backend.arguments())
    requests = [request_of({"text_input": "ab"}, GREEDY) for _ in range(3)]
    made.execute(requests)
    begun = time.monotonic()
    made.finalize()
    assert time.monotonic() - begun < 30
    assert all(request.get_response_sender().ended.is_set() for request in requests)
    assert not any(request.get_response_sender().responses[-1].has_error() for request in requests)
