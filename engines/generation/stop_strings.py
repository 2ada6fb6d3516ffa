"""Text that arrives in pieces, cut before the first of some strings."""

from dataclasses import dataclass, field


@dataclass
class StopStrings:
    """Passes text on until a stop string is complete; holds back what could still become one.

    The first stop string is the one that is complete first, and of those the one that began first: what is passed on
    depends on the text, not on the pieces it came in.

    Attributes:
        strings: None of them empty.
        found: Whether one was found; from then on nothing is passed on.
    """

    strings: tuple[str, ...]
    found: bool = False
    _held: str = field(default="", repr=False)

    def feed(self, text: str) -> str:
        """Take the next piece; return what is certain to stand before any stop string."""
        if self.found:
            return ""
        text = self._held + text
        matches = ((text.find(string), len(string)) for string in self.strings)
        ends = [(start + length, start) for start, length in matches if start >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        kept = max((unfinished(text, string) for string in self.strings), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """Return what was held back, now that no more text follows."""
        held, self._held = self._held, ""
        return held


def unfinished(text: str, string: str) -> int:
    """Return the length of the longest beginning of a string, not all of it, that a text ends with."""
    longest = min(len(string) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(string[:length])), 0)
