"""How text is generated, in the terms of transformers' `GenerationConfig`.

Here top_k is 0 and max_new_tokens 128 unless given; what a bundle's defaults are, `engine.default_options` says.
`seed`, `ignore_eos` and `logprobs` are no part of it, nor are presence and frequency penalty and logit bias, which are
OpenAI's; `stop_strings` are, and there they stay in the text.
"""

import math
from dataclasses import dataclass

from spike_export.artifacts.errors import EngineError

LOWEST_TEMPERATURE = 1e-4
"""Below it float32 no longer holds logits over the temperature, and only the best token would be drawn anyway."""

_INTEGERS = ("max_new_tokens", "top_k", "seed", "logprobs")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_SWITCHES = ("do_sample", "ignore_eos", "logprobs_as_drawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """What decoding draws, and where it ends.

    Attributes:
        max_new_tokens: Most tokens a sequence gets.
        do_sample: Draw from the distribution; otherwise take the most probable token.
        temperature: Divides the logits, at least `LOWEST_TEMPERATURE`.
        top_k: Only the k most probable tokens; 0 for all.
        top_p: Only the most probable tokens that together reach this probability, in (0, 1]; 1 for all.
        min_p: Only tokens at least this share as probable as the most probable one, in [0, 1]; 0 for all.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that the sequence holds; 1 for
            none.
        presence_penalty: Taken from the logits of tokens that have been drawn for the row; 0 for none.
        frequency_penalty: Taken from the logit of a token once for each time that it has been drawn; 0 for none.
        logit_bias: (token, what is added to its logit); minus infinity for a token that is never drawn.
        seed: Of the draws; None for another one each time. Row i of a batch draws as a sequence alone with seed + i.
        stop_strings: The text ends before the first of them; a single string may be given as it is.
        eos_token_ids: Tokens that end a sequence.
        ignore_eos: Go on behind them, for measurements.
        logprobs: None for none; k for the log-probability of every drawn token and of the k most probable ones.
        logprobs_as_drawn: Log-probabilities of the distribution that is drawn from, behind biases, penalties,
            temperature and filters; otherwise those of the model itself.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop_strings: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logprobs_as_drawn: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop_strings, str):  # each of its letters would be one
            object.__setattr__(self, "stop_strings", (self.stop_strings,))
        self._require_types()
        checks = (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            (
                "temperature",
                self.temperature,
                self.temperature >= LOWEST_TEMPERATURE,
                f"at least {LOWEST_TEMPERATURE}; do_sample=False takes the best token",
            ),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
            ("presence_penalty", self.presence_penalty, math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", self.frequency_penalty, math.isfinite(self.frequency_penalty), "a finite number"),
            (
                "logit_bias",
                self.logit_bias,
                _are_biases(self.logit_bias),
                "pairs of a token and a finite number",
            ),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**62, "0 to 2^62 - 1"),
            ("logprobs", self.logprobs, self.logprobs is None or self.logprobs >= 0, "at least 0"),
            ("stop_strings", self.stop_strings, all(self.stop_strings), "no empty string"),
        )
        for name, value, holds, expected in checks:
            if not holds:
                raise EngineError(f"{name} is {value}; expected {expected}")

    def _require_types(self) -> None:
        """Refuse what is of another type: options also come from files."""
        wanted = (
            (_INTEGERS, int, "a whole number"),
            (_NUMBERS, (int, float), "a number"),
            (_SWITCHES, bool, "true or false"),
        )
        for names, kinds, expected in wanted:
            for name in names:
                value = getattr(self, name)
                optional = value is None and name in ("seed", "logprobs")
                if not optional and (not isinstance(value, kinds) or isinstance(value, bool) != (kinds is bool)):
                    raise EngineError(f"{name} is {value!r}; expected {expected}")


def _are_biases(pairs: object) -> bool:
    return isinstance(pairs, tuple) and all(
        isinstance(token, int) and token >= 0 and isinstance(bias, (int, float)) and -math.inf <= bias < math.inf
        for token, bias in pairs
    )


def require_vocabulary(options: GenerationOptions, vocab: int) -> None:
    """Refuse a logit bias of a token that the model does not have.

    Raises:
        EngineError: Names the token.
    """
    for token, _ in options.logit_bias:
        if token >= vocab:
            raise EngineError(f"logit_bias names the token {token}; the model knows 0 to {vocab - 1}")
