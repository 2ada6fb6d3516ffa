"""The text that a bundle is judged on."""

from dataclasses import dataclass

from spike_export.artifacts.recipe import WindowKind


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """Where the text comes from, and how windows are cut from it.

    Attributes:
        corpus: File, folder or hub name of the corpus; None for the default one.
        text_field: Key of the text, or of the messages, in its records; None for the usual keys.
        corpus_split: Split of a dataset; None for `train`.
        chat_template: Render the corpus's conversations with the model's chat template.
        samples: Calibration windows, from which the evaluation windows keep apart.
        length: Tokens per window, BOS included.
        seed: Places the calibration windows.
        windows: From where they are cut.
    """

    corpus: str | None = None
    text_field: str | None = None
    corpus_split: str | None = None
    chat_template: bool = False
    samples: int = 32
    length: int = 512
    seed: int = 0
    windows: WindowKind = "packed"
