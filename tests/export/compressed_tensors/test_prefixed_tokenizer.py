"""Every sequence begins with the prefix: texts by the post-processor, chats by the template."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spike_export.artifacts.recipe import Prefix
from spike_export.export.compressed_tensors.prefixed_tokenizer import BARE_CHATS, add_prefix
from spike_export.export.files.tokenizer_files import save_tokenizer
from tests.support.tiny.checkpoints import BOS, byte_tokenizer, token_of

A, B, LINE = token_of("a"), token_of("b"), token_of("\n")
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
WITH_BOS = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)])
BYTES = processors.ByteLevel(trim_offsets=False)


def tokenizer_with(processor: Any, template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    if processor is not None:
        tokenizer.post_processor = processor
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def written(folder: Path, tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> tuple[Any, tuple[str, ...]]:
    save_tokenizer(tokenizer, folder, BOS in ids)
    notes = add_prefix(Prefix(token_ids=ids, text="?", ratio=1.0), tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder), notes


CASES = {
    "none": (None, (BOS, LINE), [BOS, LINE, A, B]),
    "BOS in the prefix": (WITH_BOS, (BOS, LINE), [BOS, LINE, A, B]),
    "BOS behind the prefix": (WITH_BOS, (LINE,), [LINE, BOS, A, B]),
    "bytes": (BYTES, (LINE, LINE), [LINE, LINE, A, B]),
    "several": (processors.Sequence([BYTES, WITH_BOS]), (LINE,), [LINE, BOS, A, B]),
}


@pytest.mark.parametrize("case", CASES)
def test_texts_begin_with_the_prefix(tmp_path: Path, case: str) -> None:
    processor, ids, expected = CASES[case]
    tokenizer, notes = written(tmp_path, tokenizer_with(processor), ids)
    assert tokenizer("ab").input_ids == expected
    assert tokenizer("ab", add_special_tokens=False).input_ids == [A, B]
    assert not notes


@pytest.mark.parametrize("ids", [(BOS, LINE), (BOS, token_of("'"), token_of("\\"))], ids=["line", "quotes"])
def test_chats_begin_with_the_prefix_once(tmp_path: Path, ids: tuple[int, ...]) -> None:
    tokenizer, notes = written(tmp_path, tokenizer_with(WITH_BOS, TEMPLATE), ids)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert tokenizer(chat, add_special_tokens=False).input_ids == [*ids, A, B]
    assert not notes


def test_a_prefix_that_is_no_text_is_told(tmp_path: Path) -> None:
    """A byte that is no character alone: decoded and encoded, it is another token."""
    broken = 2 + 0xE4
    tokenizer, notes = written(tmp_path, tokenizer_with(WITH_BOS, TEMPLATE), (BOS, broken))
    assert notes == (BARE_CHATS,)
    assert tokenizer("ab").input_ids == [BOS, broken, A, B]
