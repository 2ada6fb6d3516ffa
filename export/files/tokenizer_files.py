"""The bundle's tokenizer: the checkpoint's own, except that it adds no BOS where the prefix already holds it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WITHOUT_BOS = "{%- set bos_token = '' -%}\n"


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path, prefix_holds_bos: bool) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and, if there is one, `chat_template.jinja`.

    Args:
        tokenizer: transformers' fast tokenizer.
        folder: An existing folder.
        prefix_holds_bos: Whether to take the BOS out of what the tokenizer and the chat template produce.
    """
    tokenizer.save_pretrained(folder)
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path)
    # Where the checkpoint lay is no part of the bundle: exports of one model from two places are alike.
    for key in ("name_or_path", "is_local", "local_files_only"):
        config.pop(key, None)
    if prefix_holds_bos:
        config["add_bos_token"] = False
        path = folder / "tokenizer.json"
        document = read_json(path)
        document["post_processor"] = without_bos(document.get("post_processor"), tokenizer.bos_token)
        write_json(path, document)
        for template in folder.rglob("*.jinja"):
            text = template.read_text(encoding="utf-8")
            if "bos_token" in text:
                template.write_text(_WITHOUT_BOS + text, encoding="utf-8")
    write_json(config_path, config)


def without_bos(processor: Any, bos: str | None) -> Any:
    """Return a `tokenizer.json` post-processor that does not insert the token `bos`; None when nothing is left.

    Only templates insert tokens; processors of other kinds (byte-level offsets) are kept, and so are other
    special tokens of a template.
    """
    if processor is None or bos is None:
        return processor
    if processor["type"] == "Sequence":
        parts = [without_bos(part, bos) for part in processor["processors"]]
        kept = [part for part in parts if part is not None]
        return {**processor, "processors": kept} if kept else None
    if processor["type"] != "TemplateProcessing":
        return processor
    templates = {
        kind: [piece for piece in processor[kind] if piece.get("SpecialToken", {}).get("id") != bos]
        for kind in ("single", "pair")
    }
    if not any("SpecialToken" in piece for pieces in templates.values() for piece in pieces):
        return None
    specials = {key: token for key, token in processor["special_tokens"].items() if key != bos}
    return {**processor, **templates, "special_tokens": specials}


def read_json(path: Path) -> dict[str, Any]:
    """Return what one of the tokenizer's files holds."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def write_json(path: Path, document: Any) -> None:
    """Write one of the tokenizer's files."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
