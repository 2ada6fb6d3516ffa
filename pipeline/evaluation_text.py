"""The text that a bundle is judged on."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.recipe import WindowKind
from spike_export.calibration.corpus.chat import rendered
from spike_export.calibration.corpus.files import CorpusOptions, OwnText, load_corpora, require_judge
from spike_export.calibration.corpus.mixture import Kind, Mixture
from spike_export.calibration.corpus.model_windows import model_windows
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.pipeline.job import require_length, require_room


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """Where the text comes from, and how windows are cut from it.

    Attributes:
        corpus: The corpus that calibration used, or another one.
        samples: Calibration windows, from which the evaluation windows keep apart.
        length: Tokens per window, BOS included.
        seed: Places the calibration windows.
        windows: From where they are cut.
        further: Texts of other kinds, on which the bundle is judged too; some source code by default.
    """

    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    samples: int = 32
    length: int = 512
    seed: int = 0
    windows: WindowKind = "packed"
    further: CorpusOptions = field(default_factory=CorpusOptions)


def evaluation_windows(
    checkpoint: Checkpoint, capacity: int | None, text: EvaluationText
) -> tuple[Mixture, NDArray[np.int64]]:
    """Return the corpora that a model is judged on, and the evaluation windows [windows, tokens] cut from them.

    Args:
        checkpoint: The model.
        capacity: Tokens that a static cache holds; None for a dynamic one.
        text: What to cut.

    Raises:
        CorpusError: The corpus cannot be used.
        RecipeError: The windows are longer than the model's sequences or the bundle's static cache.
    """
    require_length(text.length, checkpoint)
    require_room(text.length, capacity)
    read = load_corpora(text.corpus)
    require_judge(read)
    judging = [rendered(each, checkpoint.tokenizer) for each in read if not isinstance(each, OwnText)]
    corpus, samples = Mixture(tuple(Kind(each) for each in judging)), max(text.samples, len(judging))
    windows = model_windows(checkpoint, corpus, samples, text.length - 1, text.seed, text.windows)
    return corpus, windows.evaluation
