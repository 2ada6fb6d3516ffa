"""Text from tokenizers and files, made safe and legible for one line of a terminal or a table cell."""


def visible(text: str) -> str:
    r"""Return `text` with what cannot be seen spelled out: a newline becomes \n, an escape character \x1b.

    Tokens are often nothing but whitespace or control characters, and a terminal would obey the latter.
    """
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
