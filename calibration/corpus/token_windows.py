"""Token windows of a corpus, of which none for calibration shares a token with one for evaluation."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import CorpusError
from spike_export.calibration.corpus.corpus import DEFAULT_CORPUS, Corpus
from spike_export.calibration.corpus.excerpts import Wanted, encoded, packed_windows, windows_inside_documents

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from spike_export.artifacts.recipe import WindowKind

EVALUATION_WINDOWS = 8
EVALUATION_SHARE = 0.25
"""Part of a corpus, at its end, that is kept for evaluation: of its tokens, or of its documents."""

WHOLE_CHARACTERS = 1 << 20
"""Characters up to which a corpus is encoded whole, in some 200 MB; of a larger one the windows alone are."""

# Where the default corpus is evaluated. Fixed, so that figures of different runs and tools can be compared.
_PYDOC_EVALUATION_START = 60_000
_PYDOC_EVALUATION_STEP = 3_000


@dataclass(frozen=True)
class TokenWindows:
    """Content windows without BOS, [windows, tokens] int64 each; calibration and evaluation share no token.

    Attributes:
        calibration: To measure on and to choose by.
        evaluation: To judge the result on.
        kinds: [calibration windows] int64; of which kind of text each is, counted from 0. All of one kind by default.
    """

    calibration: NDArray[np.int64]
    evaluation: NDArray[np.int64]
    kinds: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        """Count all windows as one kind where nobody said."""
        if not len(self.kinds):
            object.__setattr__(self, "kinds", np.zeros(len(self.calibration), np.int64))


def token_windows(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase | None",
    samples: int,
    length: int,
    seed: int,
    kind: "WindowKind" = "packed",
    bos: int | None = None,
) -> TokenWindows:
    """Cut windows of `length` tokens from a corpus.

    Packed, calibration takes `samples` windows, one at a random place of each of as many equal parts of the corpus's
    first region; evaluation takes `EVALUATION_WINDOWS` evenly spaced windows of the rest (fewer where they would
    overlap). Inside documents, only documents of at least `length` tokens count: calibration takes random ones of the
    first of them, each as often as any other, and a random place in each; evaluation takes evenly spaced places of the
    last. The seed does not move evaluation windows.

    A corpus of more than `WHOLE_CHARACTERS` is not encoded whole: its regions and parts are measured in characters, the
    last quarter of all documents is for evaluation, and each window begins at a word (see `excerpts`).

    Args:
        corpus: The documents.
        tokenizer: transformers' fast tokenizer.
        samples: Calibration windows.
        length: Tokens per window, without BOS.
        seed: Chooses documents and places.
        kind: From where windows are cut.
        bos: Id that the model is fed before each window; a window that would begin with it begins one token later
            where it has room.

    Raises:
        CorpusError: There is no tokenizer, there are too few tokens or too few long documents for a window of each
            kind, or no window holds two different tokens.
    """
    backend = _backend(tokenizer)
    wanted = Wanted(samples, EVALUATION_WINDOWS, EVALUATION_SHARE, length, seed, bos)
    if corpus.characters > WHOLE_CHARACTERS:
        cut = _excerpts_packed if kind == "packed" else _excerpts_inside_documents
    else:
        cut = _packed if kind == "packed" else _inside_documents
    windows = cut(corpus, backend, wanted)
    _require_variety(corpus.name, windows.calibration, "calibration", backend)
    _require_variety(corpus.name, windows.evaluation, "evaluation", backend)
    return windows


def windows_throughout(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase | None",
    samples: int,
    length: int,
    bos: int | None = None,
    *,
    overlapping: bool = True,
) -> TokenWindows:
    """Cut `samples` evenly spaced windows from the whole of a corpus, and none for evaluation.

    Arguments and errors are those of `token_windows`. Unless windows may be `overlapping`, a short corpus gives fewer.
    """
    backend = _backend(tokenizer)
    tokens = encoded(backend, corpus.text, corpus.name)
    if len(tokens) < length:
        raise CorpusError(
            f"{corpus.name}: {len(tokens)} tokens; a window has {length}: give a longer corpus or a smaller --length"
        )
    count = samples if overlapping else min(samples, len(tokens) // length)
    starts = np.linspace(0, len(tokens) - length, count).astype(np.int64)
    starts = _off_bos(tokens, starts, np.full(count, len(tokens) - length), bos)
    windows = windows_at(tokens, starts, length)
    _require_variety(corpus.name, windows, "calibration", backend)
    return TokenWindows(windows, np.empty((0, length), np.int64))


def _backend(tokenizer: "PreTrainedTokenizerBase | None") -> "Tokenizer":
    if tokenizer is None:
        raise CorpusError("the checkpoint has no tokenizer, so that no text can be calibrated on; add tokenizer.json")
    backend: Tokenizer = tokenizer.backend_tokenizer
    return backend


def _packed(corpus: Corpus, tokenizer: "Tokenizer", wanted: Wanted) -> TokenWindows:
    samples, length = wanted.samples, wanted.length
    tokens = encoded(tokenizer, corpus.text, corpus.name)
    if len(tokens) < 2 * length:
        raise CorpusError(
            f"{corpus.name}: {len(tokens)} tokens; calibration and evaluation need at least {2 * length} "
            f"(two windows of {length}): give a longer corpus or a smaller --length"
        )
    starts = _evaluation_starts(corpus.name, len(tokens), length)
    region = int(starts[0])
    stride = region / samples
    jitter = np.random.default_rng(wanted.seed).random(samples) * max(stride - length, 0.0)
    first = np.minimum((np.arange(samples) * stride + jitter).astype(np.int64), region - length)
    first = _off_bos(tokens, first, np.full(samples, region - length), wanted.bos)
    starts = _off_bos(tokens, starts, np.append(starts[1:], len(tokens)) - length, wanted.bos)
    return TokenWindows(windows_at(tokens, first, length), windows_at(tokens, starts, length))


def _evaluation_starts(name: str, tokens: int, length: int) -> NDArray[np.int64]:
    pydoc = _PYDOC_EVALUATION_START + _PYDOC_EVALUATION_STEP * np.arange(EVALUATION_WINDOWS, dtype=np.int64)
    if name == DEFAULT_CORPUS and length <= _PYDOC_EVALUATION_STEP and pydoc[-1] + length <= tokens:
        return pydoc
    region = min(max(length, int(tokens * EVALUATION_SHARE)), tokens - length)
    count = min(EVALUATION_WINDOWS, region // length)
    return tokens - region + (np.arange(count, dtype=np.int64) * (region - length)) // max(1, count - 1)


def _inside_documents(corpus: Corpus, tokenizer: "Tokenizer", wanted: Wanted) -> TokenWindows:
    samples, length = wanted.samples, wanted.length
    tokens_of = (encoded(tokenizer, document, corpus.name) for document in corpus.documents)
    long = [tokens for tokens in tokens_of if len(tokens) >= length]
    if len(long) < 2:
        raise CorpusError(
            f"{corpus.name}: {len(long)} of {len(corpus.documents)} documents have {length} tokens or more; "
            "calibration and evaluation need one each: give longer documents, a smaller --length, or --windows packed"
        )
    kept = min(max(1, int(len(long) * EVALUATION_SHARE)), len(long) - 1)
    calibration, evaluation = long[:-kept], long[-kept:]
    generator = np.random.default_rng(wanted.seed)
    rounds = -(-samples // len(calibration))
    drawn = np.concatenate([generator.permutation(len(calibration)) for _ in range(rounds)])[:samples]
    chosen = [calibration[index] for index in drawn]
    places = [_Place(tokens, int(generator.integers(len(tokens) - length + 1)), len(tokens)) for tokens in chosen]
    slots = [
        # Behind a document's last slot there may be tokens to spare; behind the others the next slot begins.
        _Place(tokens, start, start + length if start + 2 * length <= len(tokens) else len(tokens))
        for tokens in evaluation
        for start in range(0, len(tokens) - length + 1, length)
    ]
    spaced = np.linspace(0, len(slots) - 1, min(EVALUATION_WINDOWS, len(slots))).astype(np.int64)
    return TokenWindows(
        np.stack([place.window(length, wanted.bos) for place in places]),
        np.stack([slots[index].window(length, wanted.bos) for index in spaced]),
    )


def _excerpts_packed(corpus: Corpus, tokenizer: "Tokenizer", wanted: Wanted) -> TokenWindows:
    found = packed_windows(corpus, tokenizer, wanted)
    if len(found[0]) < wanted.samples or not found[1]:
        raise CorpusError(
            f"{corpus.name}: its {corpus.characters:,} characters have too few tokens for {wanted.samples} windows of "
            f"{wanted.length} and one more for evaluation: give a longer corpus or a smaller --length"
        )
    return TokenWindows(np.stack(found[0]), np.stack(found[1]))


def _excerpts_inside_documents(corpus: Corpus, tokenizer: "Tokenizer", wanted: Wanted) -> TokenWindows:
    count = len(corpus.documents)
    if count < 2:
        raise CorpusError(f"{corpus.name}: one document; windows inside documents need two: give --windows packed")
    found = windows_inside_documents(corpus, tokenizer, wanted)
    for windows, use, which in zip(found, ("calibration", "evaluation"), ("first", "last"), strict=True):
        if not windows:
            raise CorpusError(
                f"{corpus.name}: none of the {which} of {count} documents, which are for {use}, has {wanted.length} "
                "tokens: give longer documents, a smaller --length, or --windows packed"
            )
    return TokenWindows(np.stack(found[0]), np.stack(found[1]))


@dataclass(frozen=True)
class _Place:
    """Where in a document's tokens a window begins, and where it must have ended."""

    tokens: NDArray[np.int64]
    start: int
    end: int

    def window(self, length: int, bos: int | None) -> NDArray[np.int64]:
        starts = _off_bos(self.tokens, np.array([self.start]), np.array([self.end - length]), bos)
        return windows_at(self.tokens, starts, length).reshape(length)


def _off_bos(
    tokens: NDArray[np.int64], starts: NDArray[np.int64], last: NDArray[np.int64], bos: int | None
) -> NDArray[np.int64]:
    """Move starts that are at a BOS one token on, but none beyond its `last`: the model is fed BOS anyway."""
    if bos is None:
        return starts
    return np.where((tokens[starts] == bos) & (starts < last), starts + 1, starts)


def windows_at(tokens: NDArray[np.int64], starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Return the windows [len(starts), length] of `tokens` that begin at `starts`."""
    return np.stack([tokens[start : start + length] for start in starts])


def _require_variety(name: str, windows: NDArray[np.int64], use: str, tokenizer: "Tokenizer") -> None:
    """Refuse windows of which each is one token, repeated: neither ranges nor a perplexity can be taken from them."""
    if windows.shape[1] > 1 and (windows == windows[:, :1]).all():
        token = int(windows[0, 0])
        raise CorpusError(
            f"{name}: every {use} window is one token, repeated (the first: {tokenizer.id_to_token(token)!r}, id "
            f"{token}); give a corpus of ordinary text"
        )
