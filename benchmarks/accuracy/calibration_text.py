"""The noise of static INT8 on texts that calibration never saw, by the text that scales and smoothing are made of.

Of each text under --made-of, and of all of them in equal parts, as many windows make the scales. Smoothing is chosen as
calibration does, on other windows of the first text. The figures are the squared error that INT8 adds at all inputs of
the model, relative to the residual stream, estimated to first order and summed up, with constant scales everywhere and
with a scale per token at `down_proj`; smaller is better.
Run: python -m benchmarks.accuracy.calibration_text [--made-of TEXT ...] [--prefix ID ...] TEXT [TEXT ...]
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.unseen_text import text_windows
from benchmarks.fetch_models import smollm2_path
from spike_export.calibration.corpus.files import HELP_TOPICS
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.perplexity import with_bos
from spike_export.calibration.methods.smoothing_search import SiteChoice, SmoothingSearch, _Plans
from spike_export.calibration.statistics.measure import measure_spikes
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import InputSite
from spike_export.checkpoint.opening import open_checkpoint

if TYPE_CHECKING:
    from torch import nn

STRIDE = 4
"""Every how many tokens one is looked at."""

Content = NDArray[np.int64]
"""Windows [windows, tokens]."""


class Noise(NamedTuple):
    """The noise of a whole model: all inputs with constants, and with a scale per token at `down_proj`.

    Smoothing is what is best for either kind.
    """

    static: float
    mixed: float

    @classmethod
    def of(cls, static: Mapping[str, SiteChoice], own: Mapping[str, SiteChoice]) -> "Noise":
        """Sum up the inputs' noise, with the smoothing for constants and with that for scales per token."""
        constant = {name: each.noise for name, each in static.items()}
        tokens = {name: each.tokens.noise for name, each in own.items() if name.endswith("down_proj")}
        return cls(sum(constant.values()), sum((constant | tokens).values()))


@dataclass
class FixedSmoothing(SmoothingSearch):
    """A search that has one candidate for each input: what another search chose for one kind of scales."""

    chosen: Mapping[str, SiteChoice] = field(default_factory=dict)
    own: bool = False

    def _plans(self, group: Sequence[InputSite], layer: "nn.Module", names: Mapping[str, str]) -> Iterator[_Plans]:
        chosen = self.chosen[names[group[0].representative]]
        plan = chosen.tokens.final if self.own else chosen.final
        yield _Plans(plan, plan)


def made_windows(texts: Mapping[str, Content]) -> tuple[Content, dict[str, NDArray[np.int64]]]:
    """Return all windows, and the name of each set → its rows: each text, and equal parts of all, as many windows."""
    names, count = list(texts), len(next(iter(texts.values())))
    sets = {name: np.arange(count) + count * place for place, name in enumerate(names)}
    mixed = np.concatenate([sets[name][place :: len(names)] for place, name in enumerate(names)])
    return np.concatenate(list(texts.values())), {**sets, " + ".join(names): mixed}


def noises(
    checkpoint: Checkpoint,
    made_of: Mapping[str, Content],
    choosing: Content,
    texts: Mapping[str, Content],
    prefix: Sequence[int],
) -> Iterator[tuple[str, str, Noise]]:
    """Yield set, text and the noise there.

    Args:
        checkpoint: The model.
        made_of: Name → as many windows of each text.
        choosing: Windows on which smoothing is chosen.
        texts: Name → windows that nothing is made of.
        prefix: Token ids before every window.
    """
    decoder, bos = Decoder(checkpoint), checkpoint.bos_token_id
    content, sets = made_windows(made_of)

    def fed(windows: Content) -> Content:
        return windows if bos in prefix else with_bos(windows, bos)

    statistics = measure_spikes(decoder, fed(content), tuple(prefix))
    made = {name: statistics.select(rows) for name, rows in sets.items()}
    searches = {name: SmoothingSearch(**_options(decoder, each)) for name, each in made.items()}
    decoder.run(fed(choosing), prefix, visits=[search.visit for search in searches.values()])
    for text, windows in texts.items():
        judges = {
            name: [
                FixedSmoothing(**_options(decoder, made[name]), chosen=search.choices, own=own) for own in (False, True)
            ]
            for name, search in searches.items()
        }
        decoder.run(fed(windows), prefix, visits=[judge.visit for pair in judges.values() for judge in pair])
        for name, (static, own) in judges.items():
            yield name, text, Noise.of(static.choices, own.choices)


def _options(decoder: Decoder, statistics: SpikeStatistics) -> dict[str, Any]:
    return {
        "config": decoder.config,
        "statistics": statistics,
        "compared": statistics,
        "weights": "int8-per-channel",
        "activations": "static",
        "activation_range": "sample-mean",
        "smoothing": True,
        "rotated": False,
        "stride": STRIDE,
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--model", help="HF directory or .gguf file; SmolLM2-135M-Instruct without")
    parser.add_argument("--made-of", action="append", default=[], help="text that scales are made of")
    parser.add_argument("--made-windows", type=int, default=16, help="windows that scales are made of")
    parser.add_argument("--text-field", help="key of the texts in the records of a .jsonl or .parquet file")
    parser.add_argument("--windows", type=int, default=2, help="windows of each text that judges")
    parser.add_argument("--prefix", type=int, nargs="*", default=[], help="token ids")
    arguments = parser.parse_args(given)
    checkpoint = open_checkpoint(arguments.model or str(smollm2_path()))
    made_of = arguments.made_of or [HELP_TOPICS]
    count = arguments.made_windows
    made = {Path(each).name: text_windows(checkpoint, each, None, count + arguments.windows) for each in made_of}
    texts = {each: text_windows(checkpoint, each, arguments.text_field, arguments.windows) for each in arguments.texts}
    # Of the first text every few windows choose, and make nothing.
    first = next(iter(made))
    held = np.linspace(1, count, arguments.windows).astype(np.int64)
    choosing, made[first] = made[first][held], np.delete(made[first], held, axis=0)
    made = {name: windows[:count] for name, windows in made.items()}
    for name, text, noise in noises(checkpoint, made, choosing, texts, arguments.prefix):
        print(f"{name:50} {Path(text).name:24} {noise.static:.5f} {noise.mixed:.5f}", flush=True)


if __name__ == "__main__":
    main()
