"""Texts come back in the order of their requests, from batches of requests that are written alike."""

from spike_export.engines.generation.generated_text import Generation
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.tasks.written_texts import TextRequest, written


def test_texts_are_in_the_order_of_the_requests() -> None:
    requests = [
        TextRequest(tuple(range(1, 2 + index * 7 % 11)), ("stop",) if index % 2 else (), 3 + index % 2)
        for index in range(50)
    ]
    batches: list[tuple[int, ...]] = []
    told: list[int] = []

    def generate(prompts: list[list[int]], options: GenerationOptions) -> list[Generation]:
        batches.append(tuple(map(len, prompts)))
        assert not options.do_sample
        text = f" {options.max_new_tokens} {options.stop_strings}"
        return [Generation(f"{len(prompt)}{text}", (), "length", len(prompt)) for prompt in prompts]

    texts = written(generate, requests, lambda what, done, total: told.append(done))
    assert texts == [f"{len(each.context)} {each.tokens} {each.stops}" for each in requests]
    assert [len(batch) for batch in batches] == [16, 9, 16, 9]
    assert all(list(batch) == sorted(batch, reverse=True) for batch in batches)
    assert told == [16, 25, 41, 50]
    assert written(generate, [], lambda *_: None) == []
