"""Whatever is sent, the answer is a status below 500 and an error in OpenAI's shape."""

import json
from typing import Any

import pytest

from tests.support.tiny.service import Running

ASK = {"prompt": "a", "max_tokens": 1}
SAY = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}

BODIES = {
    "no JSON": b"{",
    "no UTF-8": b'{"prompt": "\xff"}',
    "no object": b"[1, 2]",
    "empty": b"",
    "very deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


def require_error(response: Any, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) - {"n_ctx", "n_prompt_tokens"} == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_a_body_that_is_no_request(server: Running, path: str, body: bytes) -> None:
    require_error(server.post(path, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"min_p": -0.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"logit_bias": {"": 1}}, "logit_bias"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": [""]}, None),
        ({"stop": ["x"] * 100}, "stop"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [999]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"logprobs": -1}, "logprobs"),
        ({"best_of": 5}, "best_of"),
        ({"suffix": "x"}, "suffix"),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_used_is_named(server: Running, changes: dict[str, Any], param: str | None) -> None:
    error = require_error(server.post("/v1/completions", content=json.dumps(ASK | changes), headers=JSON))
    assert param is None or (error["param"] or "").split(".")[0] == param


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 99},
    ],
    ids=str,
)
def test_a_chat_that_cannot_be_used(server: Running, changes: dict[str, Any]) -> None:
    require_error(server.post("/v1/chat/completions", json=SAY | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"background": 0},
        {"n": 2},
        {"tools": [{}]},
        {"input": []},
    ],
    ids=str,
)
def test_a_response_that_nothing_is_kept_for(server: Running, changes: dict[str, Any]) -> None:
    require_error(server.post("/v1/responses", json={"input": "a", "max_output_tokens": 1} | changes))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"role": "user"}] * 5000, "input: 5000 items; expected at most 4096"),
        ([{"role": "user", "content": "a"}, {"content": "a"}], "input.1.role: Field required"),
        (5, "input: Input should be a valid string"),
    ],
    ids=["too many", "no role", "no text"],
)
def test_what_is_told_is_of_the_form_that_was_meant(server: Running, given: Any, message: str) -> None:
    error = require_error(server.post("/v1/responses", json={"input": given}))
    assert error["message"] == message
    assert error["param"] == message.partition(":")[0]


def test_whole_numbers_may_be_written_as_floats(server: Running) -> None:
    whole = {"prompt": [[1, 2], [3, 4]], "max_tokens": 2, "seed": 3, "temperature": 1, "logit_bias": [[5, 2]]}
    floats = {"prompt": [[1.0, 2.0], [3.0, 4]], "max_tokens": 2.0, "seed": 3.0, "temperature": 1.0}
    answers = [
        server.post("/v1/completions", json=body).json()["choices"]
        for body in (whole, whole | floats | {"logit_bias": [[5.0, 2.0]]})
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 2
    require_error(server.post("/v1/completions", json=whole | {"max_tokens": 2.5}))


def test_an_unknown_path_and_a_wrong_method(server: Running) -> None:
    assert require_error(server.get("/v1/nothing"), 404)["type"] == "not_found_error"
    require_error(server.get("/v1/completions"), 405)


def test_an_id_of_the_client_comes_back_and_no_text_is_logged(server: Running) -> None:
    secret = "zebra"
    headers = {"x-request-id": "client-7"}
    assert server.post("/v1/completions", json=ASK | {"prompt": secret}, headers=headers).headers["x-request-id"] == (
        "client-7"
    )
    forged = server.get("/health", headers={"x-request-id": 'a"b\u00e9'.encode("latin-1")})
    assert "b" not in forged.headers["x-request-id"] or len(forged.headers["x-request-id"]) == 32
    lines = [fields for event, fields in server.log if event == "request" and fields["id"] == "client-7"]
    assert [fields["status"] for fields in lines] == [200]
    assert secret not in json.dumps(server.log)
