"""How much an engine works on at once, and what is too much."""

from dataclasses import dataclass

from spike_export.artifacts.errors import EngineError


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler keeps to.

    Attributes:
        rows: Most sequences in progress.
        context: Most own tokens of a sequence.
        chunk: Most tokens of a prompt in one call; None where a prompt is read in one call.
        prefill_budget: Tokens of prompts that are read between two steps of the sequences that are being generated. One
            chunk is always read, however long.
        longest_prompt: Most tokens of a prompt, where that is less than the context; None where it is not.
    """

    rows: int
    context: int
    chunk: int | None
    prefill_budget: int = 256
    longest_prompt: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "context", "prefill_budget", "chunk", "longest_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EngineError(f"{name} is {value}; expected at least 1")

    def room(self, prompt_tokens: int) -> int:
        """Return how many tokens may follow a prompt; the last one is never fed, so that it needs no room."""
        return self.context + 1 - prompt_tokens

    def require_room(self, prompt_tokens: int, new_tokens: int) -> None:
        """Refuse a sequence that would outgrow its row.

        Raises:
            EngineError: Says how much fits.
        """
        if prompt_tokens < 1 or new_tokens < 1:
            raise EngineError("a sequence needs at least one token in its prompt and one new token")
        if self.room(prompt_tokens) < 1:
            raise EngineError(
                f"the prompt has {prompt_tokens} tokens and exceeds the available context size of {self.context} "
                "tokens; shorten it"
            )
        if self.longest_prompt is not None and prompt_tokens > self.longest_prompt:
            raise EngineError(
                f"the prompt has {prompt_tokens} tokens, and the plan reads at most {self.longest_prompt} in the one "
                "call in which it reads a prompt; shorten it, or build the plan again with a larger --max-prompt"
            )
        if new_tokens > self.room(prompt_tokens):
            raise EngineError(
                f"the prompt has {prompt_tokens} tokens and {new_tokens} new ones are asked for, which exceeds the "
                f"available context size of {self.context} tokens; ask for at most {self.room(prompt_tokens)} new ones"
            )
