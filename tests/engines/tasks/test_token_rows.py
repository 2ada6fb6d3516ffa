"""Requests share rows: each is answered by a row that begins with what it feeds, and no row is computed twice."""

from hypothesis import given, settings
from hypothesis import strategies as st

from spike_export.engines.tasks.token_rows import Request, TokenRows

TOKENS = st.lists(st.integers(1, 3), min_size=1, max_size=5).map(tuple)
REQUESTS = st.lists(st.builds(Request, TOKENS, TOKENS), max_size=12)


@settings(max_examples=40)
@given(REQUESTS)
def test_every_request_is_answered_by_a_row_that_begins_with_its_tokens(requests: list[Request]) -> None:
    found = TokenRows.of(requests)
    assert sorted(index for row in found.requests_of for index in row) == list(range(len(requests)))
    for row, indices in zip(found.rows, found.requests_of, strict=True):
        assert all(row[: len(requests[index].fed)] == requests[index].fed for index in indices)


@settings(max_examples=40)
@given(REQUESTS)
def test_no_row_begins_with_another(requests: list[Request]) -> None:
    rows = TokenRows.of(requests).rows
    assert not any(one != other and other[: len(one)] == one for one in rows for other in rows)
    assert len(set(rows)) == len(rows)


@settings(max_examples=40)
@given(REQUESTS, st.integers(1, 12))
def test_batches_hold_the_rows_in_order_and_are_padded_on_the_right(requests: list[Request], tokens: int) -> None:
    found = TokenRows.of(requests)
    batches = found.batches(tokens)
    rows = [tuple(row[row != 0].tolist()) for batch in batches for row in batch]
    assert rows == list(found.rows)
    assert all((row[len(row[row != 0]) :] == 0).all() for batch in batches for row in batch)
    assert all(batch.size <= tokens or len(batch) == 1 for batch in batches)


def test_choices_of_one_token_are_answered_by_the_questions_row() -> None:
    question = (7, 8, 9)
    found = TokenRows.of([Request(question, (each,)) for each in range(4)] + [Request(question, (5, 6))])
    assert found.rows == ((7, 8, 9, 5),)
    assert Request(question, (5, 6)).positions == slice(2, 4)
