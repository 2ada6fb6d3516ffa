"""Every endpoint through the official client: results are those of the engine alone, streamed or not."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

from spike_export.engines.engine import Engine
from spike_export.engines.onnx_runtime.session import open_bundle
from tests.support.tiny.service import CAPACITY, Running, running, write_served_bundle

CHAT: Sequence[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def alone(bundle: Path) -> Engine:
    return Engine.open(bundle, threads=1)


def expected(alone: Engine, prompt: Any, **options: Any) -> str:
    (result,) = alone.generate([prompt] if not isinstance(prompt, str) else prompt, **options)
    return result.text


def test_a_chat_is_what_the_engine_generates(server: Running, alone: Engine) -> None:
    answer = server.client().chat.completions.create(model="tiny", messages=CHAT, max_completion_tokens=12)
    (choice,) = answer.choices
    assert choice.message.content == expected(alone, CHAT, max_new_tokens=12)
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        len(alone.prompts.encode([CHAT])[0]),
        12,
    )


def test_a_streamed_chat_has_the_same_text(server: Running, alone: Engine) -> None:
    chunks = list(
        server.client().chat.completions.create(
            model="tiny", messages=CHAT, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(alone, CHAT, max_new_tokens=12)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content is None
    assert [chunk.choices[0].delta.content for chunk in chunks if chunk.choices][-1] is None
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_of_several_prompts(server: Running, alone: Engine) -> None:
    prompts = ["One", "Two and more"]
    answer = server.client().completions.create(model="tiny", prompt=prompts, max_tokens=9, n=2, echo=True)
    texts = [prompt + expected(alone, prompt, max_new_tokens=9) for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_a_streamed_completion_of_tokens(server: Running, alone: Engine) -> None:
    tokens = alone.prompts.encode("Once upon")[0].tolist()
    stream = server.client().completions.create(model="tiny", prompt=tokens, max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected(alone, "Once upon", max_new_tokens=9)


def test_draws_are_repeated_by_their_seed(server: Running, alone: Engine) -> None:
    def draw(seed: int) -> list[str]:
        answer = server.client().completions.create(
            model="tiny", prompt="x", max_tokens=12, temperature=1, top_p=0.9, seed=seed, n=2
        )
        return [choice.text for choice in answer.choices]

    assert draw(7) == [
        expected(alone, "x", max_new_tokens=12, do_sample=True, temperature=1.0, top_p=0.9, seed=seed)
        for seed in (7, 8)
    ]
    assert draw(7) != draw(9)


def test_a_stop_string_ends_the_text(server: Running, alone: Engine) -> None:
    whole = expected(alone, "abc", max_new_tokens=20)
    stop = whole[6:8]
    answer = server.client().completions.create(model="tiny", prompt="abc", max_tokens=20, stop=stop)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities(server: Running, alone: Engine) -> None:
    (result,) = alone.generate("abc", max_new_tokens=5, logprobs=2)
    assert result.logprobs is not None
    found = server.client().completions.create(model="tiny", prompt="abc", max_tokens=5, logprobs=2).choices[0].logprobs
    assert found is not None
    assert found.token_logprobs == pytest.approx([each.logprob for each in result.logprobs], abs=1e-5)
    assert found.text_offset[0] == 0
    assert all(len(best) == 2 for best in found.top_logprobs or ())
    chat = server.client().chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=3, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs
    assert content is not None
    assert [len(entry.top_logprobs) for entry in content.content or ()] == [3, 3, 3]


def test_bias_and_penalties_change_what_is_drawn(server: Running) -> None:
    def text(**changes: Any) -> str:
        answer = server.client().completions.create(
            model="tiny", prompt="abc", max_tokens=6, extra_body={"ignore_eos": True}, **changes
        )
        return answer.choices[0].text

    assert text(logit_bias={"67": 100}) == "A" * 6  # byte 65
    assert len(set(text(logit_bias={"67": 100}, frequency_penalty=2))) == 1  # 100 is too much for a penalty of 2
    assert text(logit_bias={str(token): 60 for token in range(67, 73)}, presence_penalty=2) != text()


def test_a_response(server: Running, alone: Engine) -> None:
    text = expected(alone, CHAT, max_new_tokens=12)
    asked: dict[str, Any] = {"model": "tiny", "instructions": CHAT[0]["content"], "max_output_tokens": 12}
    answer = server.client().responses.create(**asked, input="Hello")
    assert answer.output_text == text
    assert answer.status == "incomplete"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 12
    events = list(server.client().responses.create(**asked, input=[{"role": "user", "content": "Hello"}], stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_models_and_state(server: Running) -> None:
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    assert server.client().models.retrieve("tiny").id == "tiny"
    for path in ("/health", "/ready", "/v1/health/live", "/v1/health/ready", "/v2/health/live", "/v2/health/ready"):
        assert server.get(path).status_code == 200
    figures = server.get("/metrics").text
    for name in ("num_requests_running", "time_to_first_token_seconds_bucket", "generation_tokens_total"):
        assert f"spike_export:{name}" in figures


def test_the_inference_protocol_describes_server_and_model(server: Running) -> None:
    assert server.get("/v2").json()["name"] == "spike-export"
    for path in ("/v2/models/tiny", "/v2/models/tiny/versions/1"):
        described = server.get(path).json()
        assert (described["name"], described["versions"]) == ("tiny", ["1"])
        assert described["platform"] == "ONNX Runtime, cpu"
        assert server.get(f"{path}/ready").json() == {"name": "tiny", "ready": True}
    assert server.get("/v2/models/other").status_code == 404
    assert server.get("/v2/models/other/ready").status_code == 404


def test_tokens_and_back(server: Running, alone: Engine) -> None:
    found = server.post("/tokenize", json={"prompt": "Grüße"}).json()
    assert found["tokens"] == alone.prompts.encode("Grüße")[0].tolist()
    assert found["max_model_len"] == CAPACITY
    assert server.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"] == "Grüße"
    assert server.post("/tokenize", json={"messages": CHAT}).json()["count"] == len(alone.prompts.encode([CHAT])[0])


def test_many_at_once_get_what_each_gets_alone(server: Running, alone: Engine) -> None:
    """More requests than rows, of lengths from one to several parts, all at temperature 0."""
    prompts = ["ab" * (1 + 7 * number) for number in range(9)]
    texts = [expected(alone, prompt, max_new_tokens=15) for prompt in prompts]

    def ask(prompt: str) -> str:
        return server.client().completions.create(model="tiny", prompt=prompt, max_tokens=15).choices[0].text

    with ThreadPoolExecutor(9) as pool:
        assert list(pool.map(ask, prompts)) == texts


def test_a_bundle_with_a_growing_cache_is_served(tmp_path: Path) -> None:
    bundle = write_served_bundle(tmp_path, capacity=None)
    alone = Engine.open(bundle, threads=1)
    with running(bundle) as server:
        answer = server.client().completions.create(model="tiny", prompt=["a", "bcd"], max_tokens=7)
    assert [choice.text for choice in answer.choices] == [
        expected(alone, prompt, max_new_tokens=7) for prompt in ("a", "bcd")
    ]


def test_the_client_raises_its_own_errors(server: Running) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match="context size of 192") as refused:
        client.completions.create(model="tiny", prompt="x" * 300)
    assert refused.value.code == "context_length_exceeded"
    assert json.loads(refused.value.response.text)["error"]["type"] == "exceed_context_size_error"


def test_a_common_beginning_is_read_once_and_changes_no_text(server: Running, alone: Engine) -> None:
    begin = "A system prompt that many requests share, long enough for several blocks of tokens. "
    client = server.client()
    for end in ("One", "Two", "Twofold"):
        answer = client.completions.create(model="tiny", prompt=begin + end, max_tokens=12)
        assert answer.choices[0].text == expected(alone, begin + end, max_new_tokens=12)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == len(begin) // 32 * 32
    # The next turn of a chat begins with the answer to the one before, which was not read as a prompt.
    text = begin + end + answer.choices[0].text + "More"
    again = client.completions.create(model="tiny", prompt=text, max_tokens=5)
    assert again.choices[0].text == expected(alone, text, max_new_tokens=5)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == len(begin + end) // 32 * 32
    lines = server.get("/metrics").text.splitlines()
    assert any(line.startswith("spike_export:prefix_cache_hits_total{") for line in lines)


def test_what_is_at_hand_leaves_no_single_token_to_be_read(server: Running) -> None:
    """A call of one token is computed by other kernels; a part of one token behind whole parts is one anyway."""
    text = "".join(chr(65 + number % 26) for number in range(160))

    def cached(length: int) -> int:
        answer = server.post("/v1/completions", json={"prompt": text[:length], "max_tokens": 1}).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(160) == 0
    assert [cached(length) for length in (96, 97, 98, 128, 129, 130)] == [64, 64, 96, 96, 128, 128]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored(server: Running, bundle: Path, stream: bool) -> None:
    """Log-probabilities of a given text, as evaluation harnesses ask for: those of the bundle's own logits."""
    tokens = [70, 71, 72, 80, 95, 100]
    logits = open_bundle(bundle, threads=1).begin(1).step(np.array([tokens]))[0]
    logprobs = torch.from_numpy(logits).log_softmax(-1)
    asked: Any = {"model": "tiny", "prompt": [tokens, tokens[:3]], "max_tokens": 1, "logprobs": 1, "echo": True}
    client = server.client().completions
    if stream:
        chunks = [chunk.choices[0] for chunk in client.create(**asked, stream=True)]
        first = [chunk for chunk in chunks if chunk.index == 0]
        told = [value for chunk in first if chunk.logprobs for value in chunk.logprobs.token_logprobs or ()]
    else:
        choice = client.create(**asked).choices[0]
        assert choice.logprobs is not None
        told = list(choice.logprobs.token_logprobs or ())
        best = choice.logprobs.top_logprobs or []
        assert [max(each.values()) for each in best[1:-1]] == pytest.approx(
            logprobs[:5].max(dim=-1).values.tolist(), abs=1e-4
        )
        assert choice.text.startswith("DEFN]b")
    assert told[0] is None
    assert told[1:6] == pytest.approx(
        [float(logprobs[place, token]) for place, token in enumerate(tokens[1:])], abs=1e-4
    )
    assert len(told) == 7


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_without_an_answer(server: Running, stream: bool) -> None:
    asked: Any = {"model": "tiny", "prompt": "abcd", "max_tokens": 0, "logprobs": 0, "echo": True}
    options: Any = {"stream_options": {"include_usage": True}}
    client = server.client().completions
    answers = list(client.create(**asked, stream=True, **options)) if stream else [client.create(**asked)]
    choices = [answer.choices[0] for answer in answers if answer.choices]
    assert "".join(choice.text for choice in choices) == "abcd"
    assert [len(choice.logprobs.tokens or ()) for choice in choices if choice.logprobs] == [4]
    assert choices[-1].finish_reason == "length"
    assert answers[-1].usage is not None
    assert answers[-1].usage.completion_tokens == 0


def test_the_description_tells_what_is_sent(server: Running) -> None:
    """For clients that are generated from it: every content type that a path answers with is documented."""
    paths = server.get("/openapi.json").json()["paths"]
    for path in ("/", "/metrics", "/health", "/ready", "/v1/models", "/model-card", "/props", "/slots"):
        sent = server.get(path).headers["content-type"].partition(";")[0]
        assert list(paths[path]["get"]["responses"]["200"]["content"]) == [sent]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/completion"):
        content = paths[path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}
