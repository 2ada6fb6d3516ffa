"""The real model: Gemma 3 270M, whose layers alternate in window and rope, as its file says and as published."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spike_export.calibration.corpus.corpus import default_corpus
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.perplexity import model_perplexity, with_bos
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.accuracy.distances import likelihood
from spike_export.engines.generation.bundle_tokenizer import BundleTokenizer
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.files.tokenizer_files import save_tokenizer
from tests.support.help_topics import FIGURES_CORPUS
from tests.support.tiny.models import CachedSession

pytestmark = pytest.mark.model

CONTENT = 127


@pytest.fixture(scope="module")
def checkpoint(gemma3: Path) -> Checkpoint:
    return open_checkpoint(str(gemma3))


def test_the_model_is_configured_as_published(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim, config.vocab_size) == (18, 640, 256, 262144)
    assert (config.sliding_window, config.tie_word_embeddings, config.factors.final_softcap) == (512, True, None)
    assert config.windows == (512, None)
    assert config.hf["query_pre_attn_scalar"] == 256
    full = [index for index, kind in enumerate(config.hf["layer_types"]) if kind == "full_attention"]
    assert full == [5, 11, 17]
    assert config.hf["rope_parameters"] == {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }


def test_the_tokenizer(checkpoint: Checkpoint) -> None:
    tokenizer: Any = checkpoint.tokenizer
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3)
    assert checkpoint.bos_token_id == 2
    assert tokenizer.chat_template is None  # not the instruction-tuned model
    backend = tokenizer.backend_tokenizer
    # Ids from an implementation of llama.cpp's algorithm on the file's own pieces and scores.
    known = {
        "Hello world\n\nfoo": [9259, 1902, 108, 26537],
        "  def f(x):\n\treturn x+1\n\n\n": [
            *(138, 2063, 517, 236769, 236781, 1473, 107),
            *(255968, 2060, 1123, 236862, 236770, 109),
        ],
        "\u00fcn\u00efcode \u6f22\u5b57 \U0001f916": [5701, 238527, 3970, 236743, 201637, 236743, 246143],
        "<start_of_turn>user\n": [105, 2364, 107],
    }
    for text, ids in known.items():
        assert backend.encode(text, add_special_tokens=False).ids == ids
        assert tokenizer.decode(ids) == text
    assert backend.encode("hi").ids[0] == 2
    text = default_corpus().text
    assert tokenizer.decode(backend.encode(text, add_special_tokens=False).ids) == text


def test_a_bundle_reads_the_tokenizer_without_transformers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokenizer: Any = checkpoint.tokenizer
    save_tokenizer(tokenizer, tmp_path, prefix_holds_bos=False)
    read, text = BundleTokenizer.read(tmp_path), default_corpus().text[:20_000]
    for part in (text, " a  b\n\u00fc\u6f22\U0001f916<start_of_turn>user\n"):
        assert read.encode(part) == tokenizer.encode(part)
        assert read.decode(read.encode(part)) == tokenizer.decode(tokenizer.encode(part))
    assert read.eos_token_id == tokenizer.eos_token_id


def test_perplexity_is_the_known_one_also_in_onnx_runtime(checkpoint: Checkpoint, tmp_path: Path) -> None:
    corpus, tokenizer = default_corpus(), checkpoint.tokenizer
    assert tokenizer is not None
    ids = np.asarray(tokenizer.backend_tokenizer.encode(corpus.text, add_special_tokens=False).ids, np.int64)
    content = ids[None, 60_000 : 60_000 + CONTENT]
    fed = with_bos(content, checkpoint.bos_token_id)
    expected = model_perplexity(Decoder(checkpoint), fed, CONTENT)
    if corpus.sha256 == FIGURES_CORPUS:
        assert expected == pytest.approx(30.027, rel=1e-3)
    export_bundle(checkpoint, None, ExportOptions("float32"), tmp_path / "bundle")
    session = CachedSession(tmp_path / "bundle")
    for chunks in [(), (50, 1, CONTENT - 50)]:
        # The first content token is not scored, and nothing follows the last.
        logits = session.run(fed, chunks)[0, 1:-1]
        assert likelihood(logits, content[0, 1:]).perplexity == pytest.approx(expected, rel=1e-3)
