"""The tokenizer that puts the prefix before every sequence, for engines that know no prefix of their own."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spike_export.artifacts.recipe import Prefix
from spike_export.export.files.tokenizer_files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = "<|prefix|>"
"""Name of the prefix in the template; tokenizers inserts the tokens that the template lists under it."""

_CHAT = [{"role": "user", "content": "a"}]

BARE_CHATS = (
    "the chat template cannot write the prefix: its text is tokenized as other tokens in front of a chat; send chats "
    'with "add_special_tokens": true, so that the tokenizer puts the prefix there'
)


def add_prefix(prefix: Prefix, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> tuple[str, ...]:
    """Let the tokenizer in a folder begin every sequence, and every chat, with the prefix.

    Engines tokenize a rendered chat without the post-processor's tokens, so that the chat template writes the prefix
    too.

    Args:
        prefix: Token ids and their text.
        tokenizer: The model's own tokenizer.
        folder: Where `save_tokenizer` has written.

    Returns:
        What a caller has to know; nothing where all requests get the prefix.
    """
    path = folder / "tokenizer.json"
    document = read_json(path)
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(list(prefix.token_ids))]
    document["post_processor"] = with_prefix(document.get("post_processor"), prefix.token_ids, tokens)
    write_json(path, document)
    _keep_the_post_processor(folder / "tokenizer_config.json")
    if not tokenizer.chat_template:
        return ()
    text = tokenizer.decode(list(prefix.token_ids))
    if not _is_read_back(text, prefix.token_ids, tokenizer):
        return (BARE_CHATS,)
    for template in folder.rglob("*.jinja"):
        template.write_text(
            "{{- " + _jinja_string(text) + " -}}\n" + template.read_text(encoding="utf-8"), encoding="utf-8"
        )
    return ()


def with_prefix(processor: Any, ids: tuple[int, ...], tokens: list[str]) -> Any:
    """Return a `tokenizer.json` post-processor that puts these tokens first, before all that it inserted itself."""
    special = {PIECE: {"id": PIECE, "ids": list(ids), "tokens": tokens}}
    if processor is not None and processor["type"] == "TemplateProcessing":
        return _extended(processor, special)
    template = _extended(_PLAIN, special)
    if processor is None:
        return template
    parts = processor["processors"] if processor["type"] == "Sequence" else [processor]
    templates = [index for index, part in enumerate(parts) if part["type"] == "TemplateProcessing"]
    if templates:
        first = templates[0]
        return {
            **processor,
            "processors": [*parts[:first], _extended(parts[first], special), *parts[first + 1 :]],
        }
    return {"type": "Sequence", "processors": [*parts, template]}


_PLAIN = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


def _extended(template: Any, special: dict[str, Any]) -> dict[str, Any]:
    piece = {"SpecialToken": {"id": PIECE, "type_id": 0}}
    return {
        **template,
        "single": [piece, *template["single"]],
        "pair": [piece, *template["pair"]],
        "special_tokens": {**template["special_tokens"], **special},
    }


def _keep_the_post_processor(path: Path) -> None:
    """Take out of the configuration what lets transformers make a post-processor of its own."""
    config = read_json(path)
    for key in ("add_bos_token", "add_eos_token"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, config)


def _is_read_back(text: str, ids: tuple[int, ...], tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the prefix's text in front of a rendered chat gives the prefix's tokens, and the chat's own."""
    try:
        chat = str(tokenizer.apply_chat_template(_CHAT, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template may demand what this chat lacks; nothing is known then
        return False
    bos = str(tokenizer.bos_token or "")
    if bos and tokenizer.bos_token_id in ids:
        chat = chat.removeprefix(bos)
    alone = tokenizer.encode(chat, add_special_tokens=False)
    return bool(tokenizer.encode(text + chat, add_special_tokens=False) == [*ids, *alone])


def _jinja_string(text: str) -> str:
    return "'" + text.encode("unicode_escape").decode("ascii").replace("'", "\\'") + "'"
