"""A check whose windows several processes run: the figures of one process."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.manifest import load_manifest
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.methods.context import Calibration
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.engines.accuracy import comparison, reference_model
from spike_export.engines.accuracy.comparison import compare_by, references
from spike_export.engines.accuracy.predictions import predictions
from spike_export.engines.accuracy.reference_model import predicted, predicted_by
from spike_export.engines.accuracy.variants import Text, Variant, check_variants
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.calibration.methods.test_spreading import Processes
from tests.support.tiny.models import TinyModel, input_scales, model_with_bos, tiny_llama, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

BOS = 1


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return model_with_bos(tiny_llama(), BOS)


@pytest.fixture(scope="module")
def content() -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(3, 99, (3, 20))


def test_the_check_is_that_of_one_process(model: TinyModel, content: NDArray[np.int64], tmp_path: Path) -> None:
    recipe = tiny_recipe(model.checkpoint, input_scales(model, content), prefix=(BOS, 5))
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / "b")
    told: list[tuple[int, int]] = []
    check = partial(
        check_variants,
        model.checkpoint,
        lambda: Decoder(model.checkpoint),
        Corpus("test", ("text",)),
        content,
        [Variant("plain", None), Variant("shipped", recipe, tmp_path / "b")],
        ExportOptions("float32"),
        lambda _, done, total: told.append((done, total)),
        texts=[Text("other", "0f", content[:2, :12])],
    )
    alone = check()
    steps, told[:] = list(told), []
    processes = Processes(model.checkpoint, 2)
    assert check(workers=processes) == alone
    assert told == steps
    # The reference without and with the prefix and on the text; two variants, one of them on the text too.
    assert processes.calls == [2] * 6


def test_samples_of_the_reference_are_drawn_alike(
    model: TinyModel, content: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary with more tokens than are kept leaves some to chance."""
    monkeypatch.setattr(reference_model, "predictions", partial(predictions, kept=8))
    alone = np.stack(list(predicted(Decoder(model.checkpoint), BOS, content, ())))
    assert alone["others"].shape[-1] > 0
    np.testing.assert_array_equal(np.stack(list(predicted_by(Processes(model.checkpoint, 3), content, ()))), alone)


def test_another_bundle_at_the_same_place_is_refused(
    model: TinyModel, content: NDArray[np.int64], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle(model.checkpoint, None, ExportOptions("float32"), tmp_path / "b")
    other = load_manifest(tmp_path / "b").model_copy(update={"dtype": "float16"})
    places = iter([other])
    monkeypatch.setattr(comparison, "load_manifest", lambda place: next(places, None) or load_manifest(place))
    with (
        references(lambda: Decoder(model.checkpoint), [(content, ())], BOS) as (reference,),
        pytest.raises(ArtifactError, match="another bundle lies here; let all machines share its folder"),
    ):
        compare_by(Processes(model.checkpoint, 1), tmp_path / "b", reference)


def test_a_worker_reads_its_weights_again(model: TinyModel) -> None:
    none = TokenWindows(np.empty((0, 0), np.int64), np.empty((0, 0), np.int64))
    calibration = Calibration(model.checkpoint, none, CalibrationOptions())
    before = calibration.model
    calibration.forget()
    assert calibration.model is not before
