"""The real model: Gemma 3 270M, whose layers alternate in window and rope, against transformers."""

from pathlib import Path

import numpy as np
import pytest

from spike_export.calibration.corpus.corpus import default_corpus
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.perplexity import model_perplexity, with_bos
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.accuracy.comparison import likelihood
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.tiny_models import CachedSession

pytestmark = pytest.mark.model

CONTENT = 127
PIECE = 4_000
"""Characters of the text that surely hold as many tokens."""


def test_perplexity_in_onnx_runtime_is_that_of_transformers(gemma3: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(gemma3))
    assert checkpoint.config.windows == (512, None)
    assert checkpoint.tokenizer is not None
    encoded = checkpoint.tokenizer.backend_tokenizer.encode(default_corpus().text[:PIECE], add_special_tokens=False)
    content = np.asarray([encoded.ids[:CONTENT]], np.int64)
    fed = with_bos(content, checkpoint.bos_token_id)
    export_bundle(checkpoint, None, ExportOptions("float32"), tmp_path / "bundle")
    session = CachedSession(tmp_path / "bundle")
    expected = model_perplexity(Decoder(checkpoint), fed, CONTENT)
    for chunks in [(), (100, 1, 27)]:
        # The first content token is not scored, and nothing follows the last.
        logits = session.run(fed, chunks)[0, 1:-1]
        assert likelihood(logits, content[0, 1:]).perplexity == pytest.approx(expected, rel=1e-3)
