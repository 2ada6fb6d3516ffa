"""Several corpora, each a kind of text of its own, and how many windows calibration takes of each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from spike_export.artifacts.errors import CorpusError
from spike_export.artifacts.recipe import CorpusPart, CorpusSource, WindowKind
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.token_windows import TokenWindows, token_windows, windows_throughout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Kind:
    """One corpus of a mixture.

    Attributes:
        corpus: The text.
        weight: How many windows calibration takes of it, in proportion to the others' weights; > 0.
        judges: Whether evaluation takes windows of it too. Text that the model wrote itself says nothing about how
            well the model predicts text.
    """

    corpus: Corpus
    weight: float = 1.0
    judges: bool = True


@dataclass(frozen=True)
class Mixture:
    """Kinds of text to calibrate on, in the user's order; at least one of them judges.

    With one kind, name, hash and windows are those of its corpus.
    """

    kinds: tuple[Kind, ...]

    @classmethod
    def of(cls, corpus: Corpus) -> "Mixture":
        """Return the mixture of one corpus."""
        return cls((Kind(corpus),))

    @property
    def name(self) -> str:
        """What to call it in a report."""
        return " + ".join(kind.corpus.name for kind in self.kinds)

    @cached_property
    def sha256(self) -> str:
        """Hash of all texts, in hexadecimal."""
        return _joined_hash([kind.corpus.sha256 for kind in self.kinds])

    @cached_property
    def boundaries_sha256(self) -> str:
        """Hash of where the documents end, in hexadecimal."""
        return _joined_hash([kind.corpus.boundaries_sha256 for kind in self.kinds])

    @property
    def characters(self) -> int:
        """Characters of all texts."""
        return sum(kind.corpus.characters for kind in self.kinds)

    @property
    def judging(self) -> "Mixture":
        """The kinds of which evaluation takes windows."""
        return Mixture(tuple(kind for kind in self.kinds if kind.judges))

    def shares(self, samples: int) -> tuple[int, ...]:
        """Return how many of `samples` windows each kind gets: by weight, rounded so that the sum is exact.

        Raises:
            CorpusError: A kind would get none.
        """
        found = shares([kind.weight for kind in self.kinds], samples)
        for kind, share in zip(self.kinds, found, strict=True):
            if not share:
                raise CorpusError(
                    f"{kind.corpus.name}: its weight gives it none of the {samples} calibration windows; give more "
                    "--samples, a larger --corpus-weight, or leave this corpus out"
                )
        return found

    def windows(
        self,
        tokenizer: "PreTrainedTokenizerBase | None",
        samples: int,
        length: int,
        seed: int,
        kind: WindowKind = "packed",
        bos: int | None = None,
    ) -> TokenWindows:
        """Cut windows of every kind, one kind after the other; arguments and errors as in `token_windows`."""

        def cut(each: Kind, share: int) -> TokenWindows:
            if each.judges:
                return token_windows(each.corpus, tokenizer, share, length, seed, kind, bos)
            return windows_throughout(each.corpus, tokenizer, share, length, bos)

        parts = [cut(each, share) for each, share in zip(self.kinds, self.shares(samples), strict=True)]
        kinds = np.repeat(np.arange(len(parts)), [len(part.calibration) for part in parts])
        judging = [part.evaluation for part in parts if len(part.evaluation)]
        most = max(1, max(len(each) for each in judging) // len(judging))
        return TokenWindows(
            np.concatenate([part.calibration for part in parts]),
            np.concatenate([each[:: len(each) // min(most, len(each))][:most] for each in judging]),
            kinds,
        )

    def source(self, samples: int, length: int, seed: int, windows: WindowKind) -> CorpusSource:
        """Return what a recipe says of the text it was calibrated on."""
        parts = [
            CorpusPart(name=kind.corpus.name, sha256=kind.corpus.sha256, samples=share)
            for kind, share in zip(self.kinds, self.shares(samples), strict=True)
        ]
        return CorpusSource(
            name=self.name,
            sha256=self.sha256,
            samples=samples,
            length=length,
            seed=seed,
            windows=windows,
            parts=tuple(parts) if len(parts) > 1 else (),
        )


def shares(weights: Sequence[float], samples: int) -> tuple[int, ...]:
    """Split `samples` by weight; what rounding down leaves goes to the largest remainders, the first of equals."""
    exact = [samples * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (whole[index] - exact[index], index))
    for index in by_remainder[: samples - sum(whole)]:
        whole[index] += 1
    return tuple(whole)


def _joined_hash(hashes: Sequence[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
