"""The text that a bundle is judged on."""

from dataclasses import dataclass, field

from spike_export.artifacts.recipe import WindowKind
from spike_export.calibration.corpus.files import CorpusOptions


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
