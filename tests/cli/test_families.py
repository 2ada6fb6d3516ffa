"""From a Hugging Face directory to a checked bundle, for the families whose layers differ most from LLaMA's."""

from pathlib import Path

import pytest

from spike_export.artifacts.results.check_document import load_check
from tests.support.tiny.checkpoints import VOCAB, write_hf
from tests.support.tiny.cli_models import SMALL, call, write_corpus
from tests.support.tiny.families import tiny_family

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["gemma2", "granite", "olmo2", "phi3"])
def test_a_family_goes_from_its_directory_to_a_checked_bundle(tmp_path: Path, name: str) -> None:
    model = write_hf(tmp_path / "model", tiny_family(name, vocab_size=VOCAB, num_hidden_layers=2).reference)
    corpus, run = write_corpus(tmp_path / "corpus.txt"), tmp_path / "run"
    assert call("calibrate", model, "--work-dir", run, "--corpus", corpus, *SMALL).code == 0
    bundle = tmp_path / "bundle"
    exported = call("export", model, "--recipe", run / "recipe.json", "--out", bundle)
    assert exported.code == 0, exported.err
    checked = call("check", bundle, "--reference", model, "--corpus", corpus, *SMALL)
    assert checked.code == 0, checked.err
    check = load_check(tmp_path / "bundle.check.json")
    shipped, expected = check.shipped, check.reference.behind_prefix or check.reference.perplexity
    assert shipped is not None
    assert (shipped.int8_linears, shipped.kept_linears) == (8 if name == "phi3" else 14, 0)
    # The logits of random weights are all but flat, so that rounding moves their perplexity little; a wrong graph's is
    # infinite or that of another model.
    assert shipped.perplexity == pytest.approx(expected, rel=0.03)
