"""Which parameters of a rope are refused; that its frequencies are transformers' is tested with the decoder."""

from collections.abc import Mapping
from typing import Any

import pytest

from spike_export.artifacts.errors import CheckpointError
from spike_export.checkpoint.decoder_config import decoder_config
from spike_export.checkpoint.rope_frequencies import ROPE_TYPES, RopeScaling, frequencies
from tests.support.ropes import LONG, LONG_FACTORS, ROPES
from tests.support.tiny.families import tiny_family

PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def refusal(name: str, **changes: Any) -> str:
    settings = {**tiny_family(name).reference.config.to_dict(), **changes}
    with pytest.raises(CheckpointError) as caught:
        decoder_config(settings, "x")
    return str(caught.value)


@pytest.mark.parametrize(
    ("rope", "detail"),
    [
        ({**PLAIN, "rope_type": "linear", "factor": 0.0}, "a frequency is not finite"),
        ({**PLAIN, "rope_type": "dynamic", "factor": "two"}, ""),
        ({**PLAIN, "rope_theta": "many"}, ""),
        ({**PLAIN, "rope_theta": 0.0}, "rope_theta is 0.0; expected a finite number above 0"),
        ({**LONG, "short_factor": [1.1], "long_factor": LONG_FACTORS}, "there are 1 factors for 8 frequencies"),
        ({**LONG, "short_factor": [1.1] * 8, "long_factor": [2.0]}, "there are 1 factors for 8"),
        ({**LONG, "short_factor": [1.1] * 8, "long_factor": [0.0] * 8}, "a frequency is not finite"),
    ],
)
def test_parameters_that_make_no_frequencies_are_refused(rope: Mapping[str, Any], detail: str) -> None:
    message = refusal("llama", rope_parameters=rope)
    assert message.startswith(f"x: rope_parameters of type '{rope['rope_type']}' are damaged: {detail}")
    assert "\n" not in message


def test_a_part_of_the_channels_is_rotated_where_the_family_can() -> None:
    rope = {**PLAIN, "partial_rotary_factor": 0.5}
    assert (
        decoder_config({**tiny_family("phi3").reference.config.to_dict(), "rope_parameters": rope}, "x")
        .rope(None)
        .channels
        == 6
    )
    assert refusal("llama", rope_parameters=rope) == (
        "x: partial_rotary_factor 0.5 rotates 8 of 16 channels, which llama models cannot do"
    )


def test_every_kind_is_tried_against_transformers() -> None:
    tried = {str(changes["rope_parameters"].get("rope_type", "default")) for _, changes in ROPES.values()}
    assert tried == set(ROPE_TYPES)


def test_a_kind_that_is_not_known_has_no_frequencies() -> None:
    with pytest.raises(KeyError, match="invented"):
        frequencies(RopeScaling({"rope_type": "invented", "rope_theta": 1e4}, 16, 64), 8)
