"""What clients of llama.cpp's server rely on: its endpoints, and its fields of OpenAI's."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from spike_export.engines.engine import Engine
from tests.support.tiny.service import CAPACITY, Running, running

PROMPT = "Once upon a time"
ASK: dict[str, Any] = {"prompt": PROMPT, "n_predict": 8, "temperature": 0}
SAY: list[dict[str, str]] = [{"role": "system", "content": "Book"}, {"role": "user", "content": "Which one?"}]


@pytest.fixture(scope="module")
def text(bundle: Path) -> str:
    """Return what follows the prompt, by the engine alone."""
    (found,) = Engine.open(bundle, threads=1).generate(PROMPT, max_new_tokens=8)
    return found.text


def asked(server: Running, path: str = "/completion", **body: Any) -> Any:
    answer = server.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(server: Running, path: str, **body: Any) -> Iterator[dict[str, Any]]:
    lines = server.post(path, json=body | {"stream": True}).text.splitlines()
    return (json.loads(line[6:]) for line in lines if line.startswith("data: {"))


def test_a_completion(server: Running, text: str) -> None:
    found = asked(server, **ASK)
    assert found["content"] == text
    assert found["tokens"] == []
    assert (found["stop"], found["stop_type"], found["truncated"]) == (True, "limit", False)
    assert (found["tokens_predicted"], found["tokens_evaluated"]) == (8, len(PROMPT))
    assert found["timings"]["predicted_n"] == 8
    assert found["timings"]["prompt_n"] + found["timings"]["cache_n"] == len(PROMPT)
    assert found["generation_settings"]["n_predict"] == 8
    assert found["prompt"] == PROMPT
    assert len(asked(server, **ASK, return_tokens=True)["tokens"]) == 8


def test_a_streamed_completion_has_the_same_text(server: Running, text: str) -> None:
    *pieces, end = streamed(server, "/completion", **ASK)
    assert "".join(piece["content"] for piece in pieces) == text
    assert all(len(piece["tokens"]) == 1 and not piece["stop"] for piece in pieces)
    assert (end["stop"], end["content"], end["timings"]["predicted_n"]) == (True, "", 8)


def test_an_answer_fills_the_context_where_no_length_is_given(server: Running) -> None:
    room = CAPACITY + 1 - len(PROMPT)
    for length in (-1, CAPACITY * 2):
        found = asked(server, **ASK | {"n_predict": length}, ignore_eos=True)
        assert (found["tokens_predicted"], found["truncated"]) == (room, True)


def test_prompts_of_tokens_and_of_parts(server: Running, text: str) -> None:
    """A BOS in front counts once, although the bundle's prefix holds it: the same text, however it is given."""
    tokens = asked(server, "/tokenize", content=PROMPT, add_special=True)["tokens"]
    parts = [*tokens[:5], PROMPT[4:7], *tokens[8:]]
    assert asked(server, **ASK | {"prompt": tokens})["content"] == text
    assert [found["content"] for found in asked(server, **ASK | {"prompt": [tokens, PROMPT, parts]})] == [text] * 3
    assert asked(server, **ASK | {"prompt": parts})["content"] == text
    envelope = {"prompt_string": PROMPT}
    assert asked(server, **ASK | {"prompt": envelope})["content"] == text
    assert [found["content"] for found in asked(server, **ASK | {"prompt": [tokens, envelope]})] == [text] * 2


def test_chosen_fields(server: Running) -> None:
    found = asked(server, **ASK, response_fields=["content", "generation_settings/n_predict", "nothing"])
    assert found.keys() == {"content", "generation_settings/n_predict"}
    assert found["generation_settings/n_predict"] == 8


def test_probabilities(server: Running) -> None:
    found = asked(server, **ASK, n_probs=3)["completion_probabilities"]
    assert len(found) == 8
    *pieces, _ = streamed(server, "/completion", **ASK, n_probs=3)
    assert [piece["completion_probabilities"] for piece in pieces] == [[each] for each in found]
    for each in found:
        assert each["logprob"] == max(one["logprob"] for one in each["top_logprobs"]) <= 0
        assert each["id"] == each["top_logprobs"][0]["id"]
        assert len(each["top_logprobs"]) == 3
        assert all(isinstance(byte, int) for byte in each["bytes"])


def test_the_bytes_of_a_part_of_a_character(server: Running) -> None:
    """Token 197 of the vocabulary of bytes is the first byte of an umlaut."""
    (first,) = asked(server, **ASK | {"n_predict": 1}, n_probs=1, logit_bias=[[197, 100]])["completion_probabilities"]
    assert (first["id"], first["token"], first["bytes"]) == (197, "token_id:197", [195])


def test_biases_penalties_and_seeds(server: Running, text: str) -> None:
    assert asked(server, **ASK, logit_bias=[[67, 100]], ignore_eos=True)["content"] == "A" * 8
    settings = asked(server, **ASK, logit_bias=[[67, -1.5]], repeat_penalty=1.25)["generation_settings"]
    assert settings["logit_bias"] == [{"token": 67, "bias": -1.5}]
    assert settings["repeat_penalty"] == 1.25
    assert asked(server, **ASK, seed=-1)["generation_settings"]["seed"] == -1
    drawn = [asked(server, **ASK | {"temperature": 1, "seed": seed})["content"] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_biases_of_texts(server: Running) -> None:
    """All tokens of a text are meant; a number is a token as a key of an object, and a text in a pair."""
    plain = asked(server, **ASK)["generation_settings"]["logit_bias"]
    assert plain == []
    (number,) = asked(server, "/tokenize", content="6")["tokens"]
    for given, expected in (
        ([["AB", -1]], {67: -1, 68: -1}),
        ({"AB": -1, "70": 2}, {67: -1, 68: -1, 70: 2}),
        ([["6", 1]], {number: 1}),
    ):
        found = asked(server, **ASK, logit_bias=given)["generation_settings"]["logit_bias"]
        assert {entry["token"]: entry["bias"] for entry in found} == expected
    assert asked(server, **ASK, logit_bias=[["A", 100]], ignore_eos=True)["content"] == "A" * 8


def test_ends_that_are_ignored_are_never_drawn(server: Running) -> None:
    (end,) = server.service.model.defaults.eos_token_ids
    found = asked(server, **ASK, ignore_eos=True, logit_bias=[[end, 100]], return_tokens=True)
    assert found["generation_settings"]["logit_bias"] == [{"token": end, "bias": None}]
    assert end not in found["tokens"]


def test_probabilities_behind_the_filters(server: Running) -> None:
    ask = ASK | {"temperature": 0.7, "seed": 1, "top_k": 3, "min_p": 0.0, "n_probs": 5, "post_sampling_probs": True}
    found = asked(server, **ask)["completion_probabilities"]
    model = asked(server, **ask | {"post_sampling_probs": False})["completion_probabilities"]
    for each, before in zip(found, model, strict=True):
        best = [top["logprob"] / 0.7 for top in before["top_logprobs"][:3]]
        weights = [math.exp(value) for value in best]
        assert [top["prob"] for top in each["top_probs"]] == pytest.approx(
            [w / sum(weights) for w in weights], rel=1e-4
        )
        assert each["prob"] == next(top["prob"] for top in each["top_probs"] if top["id"] == each["id"])
    (sure, *_) = asked(server, **ASK, n_probs=5, post_sampling_probs=True)["completion_probabilities"]
    assert [top["prob"] for top in sure["top_probs"]] == [sure["prob"]] == [1.0]


@pytest.mark.parametrize("path", ["/chat/completions", "/completion", "/v1/completions", "/responses"])
def test_progress_of_a_prompt(server: Running, path: str) -> None:
    """Told before anything is computed, where reused tokens count, and behind each part of 128 tokens."""
    text = f"{path} " * 9 + "x" * (150 - 9 * len(f"{path} "))
    body = {"messages": [{"role": "user", "content": text}], "prompt": text, "input": text}
    body = {name: body[name] for name in ({"chat": "messages", "resp": "input"}.get(path[1:5], "prompt"),)}
    for asked_before in (False, True):
        events = list(streamed(server, path, **body, return_progress=True, timings_per_token=True))
        progress = [event["prompt_progress"] for event in events if "prompt_progress" in event]
        total, cached = progress[0]["total"], progress[0]["cache"]
        assert total >= 150
        assert cached == (total // 32 * 32 if asked_before else 0)
        assert [each["processed"] for each in progress] == sorted({cached, *([] if asked_before else [128]), total})
        assert all(each["time_ms"] >= 0 for each in progress)
    assert not any("prompt_progress" in event for event in streamed(server, path, **body))


def test_a_chat_as_the_template_writes_it(server: Running) -> None:
    assert asked(server, "/apply-template", messages=SAY)["prompt"] == ("[system]Book\n[user]Which one?\n[assistant]")
    bare = asked(server, "/apply-template", messages=SAY, add_generation_prompt=False)["prompt"]
    assert bare == "[system]Book\n[user]Which one?\n"
    assert server.post("/apply-template", json={"messages": []}).status_code == 400


def test_pages_of_all_origins(bundle: Path) -> None:
    with running(bundle, allowed_origins=("*",), api_keys=("secret",)) as server:
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "Authorization"}
        for origin in ("localhost", "web.mydomain.fr"):
            answer = httpx2.options(f"{server.url}/completions", headers={"Origin": origin, **asks})
            assert answer.status_code == 200
            told = {name.removeprefix("access-control-allow-"): value for name, value in answer.headers.items()}
            assert (told["origin"], told["credentials"]) == (origin, "true")
            assert (told["methods"], told["headers"]) == ("GET, POST, DELETE, OPTIONS", "*")
        assert server.get("/v1/health").status_code == 200
        assert [model["id"] for model in server.get("/models").json()["data"]] == ["tiny"]
        assert server.get("/v1/models").status_code == 401


@pytest.mark.parametrize(
    "changes",
    [
        {"n_predict": 0},
        {"n_predict": -2},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": {"prompt_string": ""}},
        {"prompt": {"prompt_string": "a", "multimodal_data": ["picture"]}},
        {"prompt": [5, 99999]},
        {"logit_bias": [["", 1]]},
        {"logit_bias": [[-1, 1]]},
        {"logit_bias": {str(number) + " ": 1 for number in range(257)}},
        {"n": 2},
        {"grammar": "root ::= nothing"},
        {"grammar": "(" * 5000},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_completion_that_cannot_be_used(server: Running, changes: dict[str, Any]) -> None:
    answer = server.post("/completion", json=ASK | changes)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_a_prompt_over_the_context_tells_the_figures(server: Running) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("/completion", {"prompt": "x" * (CAPACITY + 5)}),
        ("/v1/chat/completions", {"messages": SAY * 100}),
        ("/v1/chat/completions", {"messages": SAY * 100, "stream": True}),
    ]
    for path, body in calls:
        answer = server.post(path, json=body)
        error = answer.json()["error"]
        assert answer.status_code == 400
        assert (error["type"], error["code"]) == ("exceed_context_size_error", "context_length_exceeded")
        assert error["n_prompt_tokens"] > error["n_ctx"] == CAPACITY
        assert "exceeds the available context size" in error["message"]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"response_format": {"type": "json_object", "schema": {"const": "42"}}}, '"42"'),
        ({"json_schema": {"const": "42"}}, '"42"'),
        ({"grammar": 'root ::= "a"{5,5}'}, "aaaaa"),
    ],
    ids=str,
)
def test_forms_of_llama_cpp(server: Running, form: dict[str, Any], expected: str) -> None:
    (choice,) = asked(server, "/chat/completions", messages=SAY, max_tokens=12, **form)["choices"]
    assert choice["message"]["content"] == expected
    assert asked(server, **ASK | {"n_predict": 12}, json_schema={"const": "42"})["content"] == '"42"'


def test_a_response_of_a_form(server: Running) -> None:
    def respond(**form: Any) -> Any:
        body = {"input": "Hello", "max_output_tokens": 12, "text": {"format": form}}
        return server.post("/responses", json=body)

    answer = respond(type="json_schema", name="x", schema={"const": "42"}).json()
    assert answer["output"][0]["content"][0]["text"] == '"42"'
    assert answer["text"]["format"]["type"] == "json_schema"
    assert respond(type="text").status_code == 200
    assert respond(type="json_schema", name="x").status_code == 400


def test_timings_of_a_chat(server: Running) -> None:
    asking: dict[str, Any] = {"messages": SAY, "max_tokens": 5, "timings_per_token": True}
    first, *_, last = streamed(server, "/chat/completions", **asking, stream_options={"include_usage": True})
    assert "timings" not in first
    assert first["system_fingerprint"] == last["system_fingerprint"]
    assert last["timings"]["predicted_n"] == last["usage"]["completion_tokens"] == 5
    assert min(last["timings"][f"{part}_per_second"] for part in ("prompt", "predicted")) > 0
    assert "timings" not in asked(server, "/v1/chat/completions", **asking | {"timings_per_token": False})


def test_a_chat_that_ends_with_two_answers(server: Running) -> None:
    answers = [{"role": "assistant", "content": "a"}] * 2
    assert server.post("/chat/completions", json={"messages": [*SAY, *answers]}).status_code == 400


def test_tokens_of_a_text_by_itself(server: Running) -> None:
    def tokens(**form: Any) -> Any:
        return asked(server, "/tokenize", content="Grüße", **form)["tokens"]

    assert asked(server, "/detokenize", tokens=tokens())["content"] == "Grüße"
    assert tokens(add_special=True) == [0, *tokens()]
    pieces = tokens(with_pieces=True)
    assert [piece["id"] for piece in pieces] == tokens()
    assert pieces[0]["piece"] == "G"
    assert asked(server, "/tokenize", content="")["tokens"] == []


def test_what_the_server_is(server: Running) -> None:
    props = server.get("/props").json()
    assert props["total_slots"] == 4
    assert props["default_generation_settings"]["n_ctx"] == CAPACITY
    assert [slot["is_processing"] for slot in server.get("/slots").json()] == [False] * 4
    assert server.get("/models").json() == server.get("/v1/models").json()


def test_further_names_and_a_key_in_its_own_header(bundle: Path) -> None:
    with running(bundle, aliases=("gpt-3.5-turbo",), api_keys=("secret",)) as server:
        body = {"model": "gpt-3.5-turbo", "prompt": "a", "max_tokens": 1}
        answer = server.post("/v1/completions", json=body, headers={"x-api-key": "secret"}).json()
        assert answer["model"] == "tiny"
        assert server.post("/completion", json=body, headers={"x-api-key": "wrong"}).status_code == 401
        assert server.get("/v1/models", headers={"x-api-key": "secret"}).json()["data"][0]["aliases"] == [
            "gpt-3.5-turbo"
        ]
